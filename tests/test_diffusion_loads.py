"""The real SGLang Diffusion loads and runs pipelines: stock and weightlift leave the same everywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from engines.diffusion_harness import NAMES
from engines.environment import (
    DIFFUSION_VERSIONS,
    diffusion_and_sglang,
    diffusion_releases,
    releases,
)
from engines.runs import Runs, run_cases, run_harness

ASKED = {"WEIGHTLIFT_PARALLEL_MODULE_LOAD": "1"}
NEWEST = "0.5.23"
WIDTH = 40_000
"""Of the inner layers where the weights must be larger than the memory for bytes in flight."""
LITTLE_MIB = 16
TRIALS = 100
RESIDENT = (
    "--text-encoder-cpu-offload false --image-encoder-cpu-offload false --vae-cpu-offload false "
    "--dit-cpu-offload false"
).split()
"""What releases up to 0.5.10 need on a CPU, for they would wrap text encoders for a GPU."""

ON_THE_HOST = [
    *("--text-encoder-cpu-offload", "true", "--image-encoder-cpu-offload", "true"),
    *("--pin-cpu-memory", "false"),  # torch page-locks nothing without a GPU
]

pytestmark = pytest.mark.engine


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline of each kind, two whose encoders come second in size, and others."""
    folder = tmp_path_factory.mktemp("pipelines")
    engine = diffusion_and_sglang(NEWEST)
    made = {f"sound {kind}": (kind, 64) for kind in NAMES}
    made |= {f"broad {kind}": (kind, 1024) for kind in ("wan", "flux")}
    made |= {f"damaged {component}": ("wan", 64) for component in ("transformer", "text_encoder")}
    arguments: list[object] = []
    for place, (kind, width) in {**made, "wide": ("wan", WIDTH)}.items():
        arguments += [kind, folder / place.removesuffix(f" {kind}") / NAMES[kind], 1, width]
    run_harness("diffusion_checkpoints.py", arguments, *engine)
    for component in ("transformer", "text_encoder"):
        shards = (folder / f"damaged {component}").rglob(f"{component}/*.safetensors")
        shard = max(shards)
        os.truncate(shard, shard.stat().st_size - 100)
    return folder


def is_before(version: str, other: str) -> bool:
    """Whether a release came before another."""
    return DIFFUSION_VERSIONS.index(version) < DIFFUSION_VERSIONS.index(other)


def wraps(version: str) -> bool:
    """Whether a release has FSDP wrap an encoder that it filled on the host."""
    return not is_before(version, "0.5.8.post1") and is_before(version, "0.5.18")


def run(version: str, cases: list[dict[str, Any]], folder: Path) -> Runs:
    """Run cases in a release."""
    flags = RESIDENT if is_before(version, "0.5.11") else []
    cases = [{**case, "flags": [*flags, *case.get("flags", [])]} for case in cases]
    return run_cases("diffusion_harness.py", cases, folder, *diffusion_and_sglang(version))


@pytest.mark.parametrize("version", diffusion_releases())
def test_stock_and_weightlift_leave_and_make_the_same(
    version: str, pipelines: Path, tmp_path: Path
) -> None:
    cases: list[dict[str, Any]] = []
    for kind, name in NAMES.items():
        makes_video = kind == "wan" and not is_before(version, "0.5.11")
        case = {"model": str(pipelines / "sound" / name), "generate": makes_video}
        cases += [
            {**case, "name": f"{kind} stock", "stock": True},
            {**case, "name": kind, "flags": ["--enable-parallel-module-load"]},
        ]
    wan = {"model": str(pipelines / "sound" / NAMES["wan"])}
    cases += [
        {**wan, "name": "off", "flags": ["--disable-parallel-module-load"], "env": ASKED},
        {**wan, "name": "not asked"},
        {**wan, "name": "mapped", "mapped": True, "env": ASKED},
    ]
    flux = {"model": str(pipelines / "sound" / NAMES["flux"])}
    cases.append({**flux, "name": "hindered", "hindered": True, "env": ASKED})
    for component in ("transformer", "text_encoder"):
        model = pipelines / f"damaged {component}" / NAMES["wan"]
        cases.append({"model": str(model), "name": f"damaged {component}", "env": ASKED})
    before = sizes(pipelines)
    runs = run(version, cases, tmp_path)
    for kind in NAMES:
        (stock,), (ours,) = runs.told[f"{kind} stock"], runs.told[kind]
        assert "error" not in stock, stock["trace"]
        assert {**ours, "case": ""} == {**stock, "case": ""}, kind
    for name in ("off", "not asked", "mapped"):
        assert runs.told[name][0]["components"] == runs.told["wan stock"][0]["components"]
    (hindered,), (stock,) = runs.told["hindered"], runs.told["flux stock"]
    assert {**hindered, "case": ""} == {**stock, "case": ""}
    # Weightlift did it: the transformers, the text encoders; VAEs too where they have no mapping.
    reports = [report for report in runs.reports if not report["fallback_reason"]]
    modes = {report["architecture"]: report["mode"] for report in reports}
    wanted = {"WanTransformer3DModel", "FluxTransformer2DModel", "QwenImageTransformer2DModel"}
    wanted |= {"T5EncoderModel", "CLIPTextModel"}
    assert modes.keys() >= wanted and set(modes.values()) == {"weightlift"}, modes
    assert all(report["planned"] and not report["materialised"] for report in reports)
    # Of the transformers but what is joined, or stays in another dtype, was read while they were built.
    landed = {report["architecture"]: report["landed"] / report["planned"] for report in reports}
    assert landed["FluxTransformer2DModel"] == 1 and landed["QwenImageTransformer2DModel"] > 0.8
    assert landed["WanTransformer3DModel"] > 0.9 or version == "0.5.7"  # which has it on the host
    reasons = {
        report["architecture"]: report["fallback_reason"]
        for report in runs.reports
        if report["fallback_reason"]
    }
    assert reasons.keys() == {"WanTransformer3DModel", "FluxTransformer2DModel"}
    assert "host" in reasons["WanTransformer3DModel"]
    assert "does not say" in reasons["FluxTransformer2DModel"]
    # Damage is told, with its file where the engine does not see it first; nothing deletes that.
    assert runs.error("damaged transformer")
    error = runs.error("damaged text_encoder")
    assert "text_encoder" in error and ".safetensors" in error and "truncated" in error
    assert sizes(pipelines) == before


@pytest.mark.parametrize(
    "version",
    releases(
        *("0.5.17", NEWEST),
        more=[v for v in diffusion_releases() if not is_before(v, "0.5.13.post1")],
    ),
)
def test_text_encoders_are_read_before_their_turn(
    version: str, pipelines: Path, tmp_path: Path
) -> None:
    cases: list[dict[str, Any]] = []
    for kind in ("wan", "flux"):
        case = {"model": str(pipelines / "broad" / NAMES[kind]), "flags": RESIDENT}
        asked = {**case, "env": ASKED, "ahead": True}
        cases += [{**case, "name": f"{kind} stock", "stock": True}, {**asked, "name": kind}]
        if is_before(version, "0.5.18"):  # later ones keep nothing on the host of a CPU
            cases.append({**asked, "name": f"{kind} on the host", "flags": ON_THE_HOST})
    runs = run(version, cases, tmp_path)
    landed = []
    for kind in ("wan", "flux"):
        (stock,), (ours,) = runs.told[f"{kind} stock"], runs.told[kind]
        assert {**ours, "case": ""} == {**stock, "case": ""}, kind
    for load in runs.reports:
        component = Path(load["model_path"]).name
        if component.startswith("text_encoder") and load["landed"]:
            assert load["landed"] == load["planned"]
            landed.append(component)
    assert landed == ["text_encoder", "text_encoder_2"], "what comes next, if it is not on the host"


@pytest.mark.parametrize(
    "version", releases("0.5.17", more=[v for v in diffusion_releases() if wraps(v)])
)
def test_encoders_on_the_host_are_wrapped_as_in_stock(
    version: str, pipelines: Path, tmp_path: Path
) -> None:
    cases: list[dict[str, Any]] = []
    for kind, name in NAMES.items():
        case = {"model": str(pipelines / "sound" / name), "offloaded": True, "flags": ON_THE_HOST}
        case["generate"] = kind == "wan" and not is_before(version, "0.5.11")
        cases += [
            {**case, "name": f"{kind} stock", "stock": True},
            {**case, "name": kind, "env": ASKED},
        ]
    runs = run(version, cases, tmp_path)
    for kind in NAMES:
        (stock,), (ours,) = runs.told[f"{kind} stock"], runs.told[kind]
        assert "error" not in stock, stock["trace"]
        assert stock["components"]["text_encoder"]["kinds"] == ["DTensor"]
        without, data, memories = stock.pop("wrapped")
        assert not without and data and memories > 1
        assert ours.pop("wrapped") == [data, 0, 1], "FSDP gets no data, and that is in one block"
        assert {**ours, "case": ""} == {**stock, "case": ""}, kind
    assert "no page-locked memory" not in runs.output
    encoders = [report for report in runs.reports if "Encoder" in report["architecture"]]
    assert encoders and all(not report["fallback_reason"] for report in encoders), encoders


@pytest.mark.parametrize(
    "version",
    releases("0.5.19", more=[v for v in diffusion_releases() if is_before(v, "0.5.20")]),
)
def test_layers_are_moved_to_the_host_as_in_stock(
    version: str, pipelines: Path, tmp_path: Path
) -> None:
    case = {"model": str(pipelines / "sound" / NAMES["wan"]), "layers": True}
    case["generate"] = not is_before(version, "0.5.11")
    case["flags"] = ["--pin-cpu-memory", "false"]
    cases = [{**case, "name": "stock", "stock": True}, {**case, "name": "ours", "env": ASKED}]
    runs = run(version, cases, tmp_path)
    (stock,), (ours,) = runs.told["stock"], runs.told["ours"]
    assert "error" not in stock, stock["trace"]
    assert stock["layers"]["layers"] == 3
    assert {**ours, "case": ""} == {**stock, "case": ""}


@pytest.mark.parametrize("version", releases("0.5.17", more=diffusion_releases()))
def test_ranks_that_share_tensors_or_sequences_load_as_in_stock(
    version: str, pipelines: Path, tmp_path: Path
) -> None:
    cases: list[dict[str, Any]] = []
    for kind, name in NAMES.items():
        for sequence in (False, True):
            model = str(pipelines / "sound" / name)
            case = {"model": model, "tp": 2, "sequence": sequence, "name": f"{kind} {sequence}"}
            cases += [
                {**case, "name": f"{case['name']} stock", "stock": True},
                {**case, "env": ASKED},
            ]
    runs = run(version, cases, tmp_path)
    for case in cases:
        name = str(case["name"]).removesuffix(" stock")
        stock, ours = (
            {told["rank"]: told.get("components") for told in runs.told[which]}
            for which in (f"{name} stock", name)
        )
        assert stock == ours and set(stock) == {0, 1} and None not in stock.values(), name
    assert all(report["planned"] and not report["fallback_reason"] for report in runs.reports)
    assert {report["rank"] for report in runs.reports} == {0, 1}


def sizes(folder: Path) -> dict[Path, int]:
    """Of all shards."""
    return {file: file.stat().st_size for file in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("version", releases("0.5.17", more=("0.5.13.post1", NEWEST)))
def test_keywords_of_the_python_api_reach_the_worker(
    version: str, pipelines: Path, tmp_path: Path
) -> None:
    given = {"enable_parallel_module_load": True, "num_load_threads": 3}
    reports = tmp_path / "reports.jsonl"
    model = pipelines / "sound" / NAMES["wan"]
    told = run_harness(
        "diffusion_api.py",
        [model, json.dumps(given)],
        *diffusion_and_sglang(version),
        WEIGHTLIFT_REPORT=str(reports),
        TORCHDYNAMO_DISABLE="1",
    )
    found = [json.loads(line) for line in reports.read_text().splitlines()]
    assert {"WanTransformer3DModel", "UMT5EncoderModel"} <= {load["architecture"] for load in found}
    assert {(load["mode"], load["threads"]) for load in found} == {("weightlift", 3)}
    left = json.loads(told.partition("RESULT ")[2].splitlines()[0])
    assert left == [], "they hold for that engine alone"


def test_a_hundred_loads_with_readers_in_random_order_are_the_same(
    pipelines: Path, tmp_path: Path
) -> None:
    case = {"model": str(pipelines / "sound" / NAMES["wan"])}
    cases = [
        {**case, "name": "stock", "stock": True},
        {**case, "name": "trials", "trials": TRIALS, "env": ASKED},
    ]
    runs = run("0.5.17", cases, tmp_path)
    (tried,) = runs.told["trials"]
    assert tried.get("trials") == [TRIALS], tried
    assert tried["components"] == runs.told["stock"][0]["components"]


def test_memory_beside_the_weights_is_what_readers_may_take(
    pipelines: Path, tmp_path: Path
) -> None:
    case = {"model": str(pipelines / "wide" / NAMES["wan"]), "memory": True}
    little = {**ASKED, "WEIGHTLIFT_STAGING_MIB": str(LITTLE_MIB)}
    cases = [
        {**case, "name": "stock", "stock": True},
        {**case, "name": "planned", "env": little},
    ]
    runs = run("0.5.17", cases, tmp_path)
    (stock,), (planned,) = runs.told["stock"], runs.told["planned"]
    assert planned["components"] == stock["components"]
    weights = sum(component.get("nbytes", 0) for component in planned["components"].values())
    assert weights > 4 * (LITTLE_MIB << 20)
    # Another 32 MiB for what building a pipeline takes: modules, tokenizers, threads.
    assert planned["memory"] < weights + (LITTLE_MIB + 32 << 20), (planned["memory"], weights)


@pytest.mark.parametrize("version", releases("0.5.6.post2", more=("0.5.5.post3",)))
def test_who_asks_in_a_release_before_those_that_are_known_is_told(version: str) -> None:
    package = "pipelines" if version.startswith("0.5.5") else "pipelines_core"
    module = f"{package}.composed_pipeline_base"
    told = run_harness("diffusion_old.py", [module], *diffusion_and_sglang(version))
    asked, not_asked = told.split("RESULT ")[1:]
    assert asked.startswith("WeightliftError") and version in asked and "0.5.7" in asked
    assert not_asked.startswith("AttributeError")  # the engine's own method, without a pipeline
