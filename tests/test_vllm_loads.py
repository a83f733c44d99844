"""The real vLLM loads models: stock and weightlift leave the same bytes in every parameter."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import environment
from engines.checkpoints import make_checkpoint
from engines.runs import Runs, run_cases
from engines.verdicts import RELOADS_FROM
from packaging.version import Version
from safetensors.torch import load_file

ASKED = {"WEIGHTLIFT_MULTITHREAD_LOAD": "1"}
VERSIONS = (
    environment.VLLM_VERSIONS
    if os.environ.get("WEIGHTLIFT_TEST_MORE")
    else environment.VLLM_EVERYDAY
)

TEXT = ("qwen3", "qwen3moe")

pytestmark = pytest.mark.engine


def models_of(version: str) -> tuple[str, ...]:
    """What the release can load here; experts need kernels for a CPU."""
    return TEXT[:1] if version in environment.VLLM_OFFICIAL else TEXT


def fp8_of(version: str) -> tuple[str, ...]:
    """What it can load in FP8 here; 0.20 has nothing for a CPU."""
    return () if version.startswith("0.20") else TEXT


def cases_of(folder: Path, version: str) -> list[dict[str, Any]]:
    """What is loaded, the checkpoints made."""
    kinds = models_of(version)
    models = {kind: str(make_checkpoint(folder / kind, kind, 1, head=32)) for kind in kinds}
    broken = make_checkpoint(folder / "broken", "qwen3", 1, head=32)
    os.truncate(broken / "model-00002-of-00002.safetensors", 20_000)
    second = {kind: str(make_checkpoint(folder / f"{kind} 2", kind, 2, head=32)) for kind in kinds}
    cases: list[dict[str, Any]] = []
    for kind, model in models.items():
        for size in (1, 2):
            case = {"model": model, "tp": size}
            cases += [
                {**case, "name": f"{kind} {size} stock", "stock": True},
                {**case, "name": f"{kind} {size}", "env": ASKED},
            ]
            if can_reload(version):
                case["reload"] = second[kind]
                cases += [
                    {**case, "name": f"{kind} {size} stock, reloaded", "stock": True},
                    {**case, "name": f"{kind} {size} reloaded"},
                ]
    if can_reload(version):
        cases += reloads_of(models["qwen3"], second["qwen3"], str(broken))
    for kind in fp8_of(version):
        model = str(make_checkpoint(folder / f"{kind} fp8", kind, 1, head=32, block_fp8=True))
        for size in (1, 2):
            case = {"model": model, "tp": size, "as_stored": True, "name": f"{kind} fp8 {size}"}
            cases += [
                {**case, "name": f"{case['name']} stock", "stock": True},
                {**case, "env": ASKED},
            ]
    dense = {"model": models["qwen3"]}
    processes = {**ASKED, "WEIGHTLIFT_READERS": "processes"}
    eager = {"safetensors_load_strategy": "eager"}
    return [
        *cases,
        {**dense, "name": "processes", "env": processes},
        {**dense, "name": "collected", "collect": True, "env": ASKED},
        {**dense, "name": "not asked"},
        {**dense, "name": "off", "env": {"WEIGHTLIFT_MULTITHREAD_LOAD": "0"}},
        {**dense, "name": "eager", "options": eager, "env": ASKED},
        {"model": str(broken), "name": "broken", "env": ASKED},
    ]


def reloads_of(model: str, second: str, broken: str) -> list[dict[str, Any]]:
    """Reloads of a dense model that do not go well, or have to be the engine's."""
    dense = {"model": model, "damaged": broken}
    asking = {"reload": second, "asks_for_addresses": True}
    sound = {"model": model, "reload": second}
    pickled = {"model": model, "reload": str(pickled_copy(second))}
    return [
        {**dense, "name": "damaged reload"},
        {**dense, **asking, "name": "next reload"},
        {**dense, **asking, "name": "asked reload", "env": ASKED},
        {**sound, "name": "half way", "fault": (1, "damage", 0), "then_damaged": broken},
        {**sound, "name": "a bug half way", "fault": (1, "bug", 0)},
        {**sound, "name": "one of two ranks", "tp": 2, "fault": (0, "damage", 1)},
        {**pickled, "name": "pickled, reloaded"},
        {**pickled, "name": "pickled, asked", "env": ASKED},
        {**pickled, "name": "pickled, refused", "env": ASKED, "is_refused": True},
    ]


def pickled_copy(folder: str) -> Path:
    """The same checkpoint in PyTorch's own format."""
    copy = Path(f"{folder} pickled")
    copy.mkdir()
    for file in Path(folder).iterdir():
        if file.suffix == ".safetensors":
            torch.save(load_file(file), copy / f"pytorch_{file.stem}.bin")
        elif "index" not in file.name:
            shutil.copy(file, copy)
    return copy


def run(version: str, folder: Path) -> Runs:
    """All cases, for one import of the engine."""
    engine = environment.vllm(version, Path(sys.executable))
    return run_cases("vllm_harness.py", cases_of(folder, version), folder, engine)


def can_reload(version: str) -> bool:
    """Whether the engine reloads module by module; before, it loads once more as at launch."""
    return Version(version) >= RELOADS_FROM


# One test a release: each worker that has one of it imports the engine and runs all cases.
@pytest.mark.parametrize("version", VERSIONS)
def test_stock_and_weightlift_leave_the_same(version: str, tmp_path: Path) -> None:
    runs = run(version, tmp_path)
    for kind in models_of(version):
        for size in (1, 2):
            stock, planned = runs.hashes(f"{kind} {size} stock"), runs.hashes(f"{kind} {size}")
            assert planned == stock and len(planned) == size, f"{kind} on {size} ranks"
            if can_reload(version):
                stock = runs.hashes(f"{kind} {size} stock, reloaded")
                assert runs.hashes(f"{kind} {size} reloaded") == stock != planned
    for kind in fp8_of(version):
        for size in (1, 2):
            name = f"{kind} fp8 {size}"
            assert runs.hashes(name) == runs.hashes(f"{name} stock"), name
    for case in ("processes", "collected", "off", "not asked"):
        assert runs.hashes(case) == runs.hashes("qwen3 1 stock"), case
    if can_reload(version):  # damage leaves what was there; a model that asks too much is reloaded
        assert runs.hashes("damaged reload") == runs.hashes("qwen3 1 stock")
        assert runs.hashes("next reload") == runs.hashes("qwen3 1 stock, reloaded")
        assert any("needs the memory of" in report["fallback_reason"] for report in runs.reports)
        assert "asked for and cannot be had" in runs.error("asked reload")
        # Half way, or on one of several ranks, it leaves no weights rather than those of two
        # checkpoints, until one is reloaded that is whole.
        (half_way,) = runs.told["half way"]
        assert half_way.get("there") == [], half_way
        there = {told["rank"]: told.get("there") for told in runs.told["one of two ranks"]}
        assert there == {0: None, 1: []}
        stock = runs.hashes("qwen3 1 stock, reloaded")
        assert runs.hashes("half way") == stock
        assert runs.hashes("one of two ranks") == runs.hashes("qwen3 2 stock, reloaded")
        assert runs.hashes("a bug half way") == runs.hashes("qwen3 1 stock, reloaded")
        # The engine reloads what has no safetensors files, or nothing does and the weights stay.
        assert runs.hashes("pickled, reloaded") == runs.hashes("qwen3 1 stock, reloaded")
        assert "no safetensors files" in runs.error("pickled, asked")
        assert runs.hashes("pickled, refused") == runs.hashes("qwen3 1 stock")
    # The engine's log says so, which shows no other logger's lines.
    assert re.search(r"^INFO .* weightlift: launch of Qwen3ForCausalLM", runs.output, re.MULTILINE)
    # Weightlift did it: each model on one rank and on two, and the cases more that load.
    planned_loads = [report for report in runs.reports if report["mode"] == "weightlift"]
    reloads = [report for report in planned_loads if report["phase"] == "update"]
    launches = len(planned_loads) - len(reloads)
    models, stored = len(models_of(version)), len(fp8_of(version))
    reloaded = models * 3 + 3 + 4 + 3 if can_reload(version) else 0
    assert launches == models * 3 + stored * 3 + 3 + reloaded
    assert len(reloads) == (models * 3 + 3 if can_reload(version) else 0)
    for report in planned_loads:
        assert report["engine"] == "vllm"
        assert report["planned"] > 0 and report["threads"] > 0 and not report["fallback_reason"]
    # What was asked for and cannot be had is an error, and a damaged file is named.
    assert "--safetensors-load-strategy eager was asked for" in runs.error("eager")
    broken = runs.error("broken")
    assert "model-00002-of-00002.safetensors" in broken and "truncated" in broken
