"""The real SGLang loads models: bit by bit what its own loader loads, in every release."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import environment
from engines.cases import PLANNED, STOCK, Case, all_cases, expert_parallel_flags, run_cases
from engines.checkpoints import CONFIGS, make_checkpoint
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.engine

ENDS = environment.releases("0.4.9.post2", "0.5.23")
DEEP = environment.releases(*ENDS, more=["0.5.9"])
EVERY = environment.releases(
    *environment.SGLANG_VERSIONS[::3], *ENDS, more=environment.SGLANG_VERSIONS
)
"""Every third one every day; ``scripts/matrix`` has them all."""
MLA_NEEDS = "MLA optimization not supported on CPU"
"""Releases up to 0.5.2 load DeepSeek on a CPU with AMX alone."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        kind: (
            make_checkpoint(folder / f"{kind}-0", kind, 0),
            make_checkpoint(folder / f"{kind}-1", kind, 1),
        )
        for kind in CONFIGS
    }


@pytest.mark.parametrize("version", EVERY)
def test_every_release_loads_a_mixture_of_experts(
    version: str, checkpoints: dict[str, tuple[Path, Path]]
) -> None:
    first, second = checkpoints["qwen3moe"]
    (outcome,) = run_cases(version, [Case("moe", first, (second, first))]).values()
    assert outcome.is_same, (outcome.told, outcome.output[-3000:])
    (rank,) = outcome.told[PLANNED]
    assert not rank["moved"], "parameters must stay where CUDA graphs know them to be"
    assert rank["launch"] == rank["update 1"] != rank["update 0"]
    assert [report["phase"] for report in outcome.reports] == ["launch", "update", "update"]
    # 45 tensors, 9 of them norms of one dimension: a launch reads those at once. An update writes
    # nothing before all is planned, and the one after it plans nothing.
    facts = ("tensors", "planned", "materialised", "replayed")
    counts = [tuple(report[fact] for fact in facts) for report in outcome.reports]
    assert counts == [(45, 36, 9, 0), (45, 45, 0, 0), (45, 0, 0, 45)]
    for report in outcome.reports:
        assert (report["mode"], report["version"]) == (PLANNED, version)


@pytest.mark.parametrize("version", DEEP)
def test_every_model_and_parallelism(
    version: str, checkpoints: dict[str, tuple[Path, Path]]
) -> None:
    outcomes = run_cases(version, all_cases(version, checkpoints))
    for name, outcome in outcomes.items():
        if name.startswith("deepseek") and MLA_NEEDS in outcome.error(STOCK):
            assert version == "0.4.9.post2"
            continue
        assert outcome.verdict == "same", (name, outcome.told, outcome.reports)


def _bytes(
    folder: Path,
    wanted: Callable[[str], bool],
    part: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight,
) -> int:
    """Bytes of these tensors of a checkpoint, or of a part of each."""
    return sum(
        part(tensor).nbytes
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if wanted(name)
    )


def half_a_row(weight: torch.Tensor) -> torch.Tensor:
    return weight[0, ::2]


@pytest.mark.parametrize("version", ("0.5.3.post3", "0.5.9", "0.5.17", "0.5.23"))
def test_stored_fp8_is_loaded_as_it_is(version: str, tmp_path: Path) -> None:
    """Up to post-processing, which needs AMX on a CPU, as DeepSeek's does within its load."""
    cases = []
    for kind in ("qwen3", "qwen3moe"):
        model = make_checkpoint(tmp_path / kind, kind, 0, block_fp8=True)
        for ranks in (1, 2):
            env = {"HARNESS_SKIP_POST_PROCESSING": "1"}
            cases.append(Case(f"{kind} tp{ranks}", model, tp=ranks, env=env))
    for name, outcome in run_cases(version, cases).items():
        assert outcome.verdict == "same", (name, outcome.told, outcome.reports)


def test_fp8_updates_of_releases_that_rebind_are_left_to_the_engine(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "fp8", "qwen3", 0, block_fp8=True)
    case = Case("fp8", model, (model,), env={"HARNESS_SKIP_POST_PROCESSING": "1"})
    (outcome,) = run_cases("0.5.2", [case]).values()
    assert outcome.is_same, outcome.told
    assert outcome.each("mode") == [PLANNED, STOCK]
    assert "replaced what the loader goes by" in outcome.each("fallback_reason")[1]


ATTENTION_COLUMNS = ("q_proj", "k_proj", "v_proj", "embed_tokens", "lm_head")
COLUMN_PARALLEL = (*ATTENTION_COLUMNS, "gate_proj", "up_proj")


@pytest.mark.parametrize("version", ENDS)
def test_each_rank_reads_its_part(version: str, checkpoints: dict[str, tuple[Path, Path]]) -> None:
    model = checkpoints["qwen3moe"][0]
    exact = {"HARNESS_MAX_GAP": "0"}  # tiny tensors would be read along to save a call
    cases = [
        Case("tp1", model, env=exact),
        Case("tp2", model, tp=2, env=exact),
        Case("ep2", model, tp=2, args=expert_parallel_flags(version), env=exact),
    ]
    outcomes = run_cases(version, cases)
    assert {outcome.verdict for outcome in outcomes.values()} == {"same"}
    read = {
        name: [report["bytes_read"] for report in outcome.reports]
        for name, outcome in outcomes.items()
    }
    whole = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    columns = _bytes(model, lambda name: any(part in name for part in COLUMN_PARALLEL))
    attention = _bytes(model, lambda name: any(part in name for part in ATTENTION_COLUMNS))
    experts = _bytes(model, lambda name: ".experts." in name)
    # Row-parallel tensors are read from a rank's first byte to its last: all but half a row.
    o_proj = _bytes(model, lambda name: "o_proj" in name, half_a_row)
    down_proj = _bytes(model, lambda name: "down_proj" in name, half_a_row)
    assert read["tp1"] == [whole]
    assert read["tp2"] == [whole - columns // 2 - o_proj - down_proj] * 2
    # With the experts spread, no byte of another rank's is read.
    assert read["ep2"] == [whole - attention // 2 - o_proj - experts // 2] * 2


@pytest.mark.parametrize("version", ENDS)
def test_the_engine_loads_by_itself_where_it_is_told_to(
    version: str, checkpoints: dict[str, tuple[Path, Path]]
) -> None:
    model = checkpoints["qwen3"][0]
    extra = "--model-loader-extra-config"
    cases = [
        Case("extra config", model, args=(extra, '{"enable_multithread_load": false}')),
        Case("flag", model, flags=("--disable-multithread-load",)),
        Case("variable", model, env={"WEIGHTLIFT_MULTITHREAD_LOAD": "0"}),
        Case("threads of the engine", model, args=(extra, '{"num_threads": 3}')),
        Case(
            "threads of the flag",
            model,
            args=(extra, '{"num_threads": 3}'),
            flags=("--num-load-threads", "5"),
        ),
        Case("asked for", model, flags=("--enable-multithread-load",)),
        Case("load format", model, args=("--load-format", "safetensors")),
    ]
    outcomes = run_cases(version, cases)
    assert all(outcome.is_same for outcome in outcomes.values()), outcomes
    reports = {name: outcome.reports[0] for name, outcome in outcomes.items()}
    for name, reason in {
        "extra config": "--model-loader-extra-config says enable_multithread_load=false",
        "flag": "multithread load is switched off",
        "variable": "multithread load is switched off",
    }.items():
        assert (reports[name]["mode"], reports[name]["fallback_reason"]) == (STOCK, reason)
    assert reports["threads of the engine"]["threads"] == 3
    assert reports["threads of the flag"]["threads"] == 5
    assert reports["asked for"]["mode"] == reports["load format"]["mode"] == PLANNED


def test_what_was_asked_for_and_cannot_be_had_is_an_error(
    checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoints["qwen3"][0], tmp_path / "pt")
    for file in model.glob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    (model / "model.safetensors.index.json").unlink()
    cases = [Case("not asked", model), Case("asked", model, flags=("--enable-multithread-load",))]
    outcomes = run_cases("0.5.17", cases, [PLANNED])
    assert not outcomes["not asked"].error(PLANNED)
    assert outcomes["not asked"].reports[0]["fallback_reason"] == "it has no safetensors files"
    assert "cannot be had here: it has no safetensors files" in outcomes["asked"].error(PLANNED)


@pytest.mark.parametrize("version", ENDS)
def test_a_loader_that_needs_the_memory_gets_it_from_the_engine(
    version: str, checkpoints: dict[str, tuple[Path, Path]]
) -> None:
    first, second = checkpoints["qwen3"]
    cases = [
        Case(sabotage, first, (second,), env={"HARNESS_SABOTAGE": sabotage})
        for sabotage in ("data_ptr", "rebind", "swallowed", "keep")
    ]
    for name, outcome in run_cases(version, cases).items():
        assert outcome.is_same, (name, outcome.told)
        assert {report["mode"] for report in outcome.reports} == {STOCK}, name
        assert outcome.reports[0]["fallback_reason"]


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1000)


def _lie_about_the_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])


def _drop_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, file)


def _store_another_dtype(file: Path) -> None:
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].float() + 1 / 3
    save_file(tensors, file)


def _widen_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(72, 64).bfloat16()
    save_file(tensors, file)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, "truncated"),
    "lying header": (_lie_about_the_header, "its header claims"),
    "missing tensor": (_drop_a_tensor, "not in the file"),
    "wrong shape": (_widen_a_tensor, ""),  # the engine's own complaint, natively as well
    "other dtype": (_store_another_dtype, ""),  # the engine casts
    "missing shard": (Path.unlink, "missing"),
}


@pytest.mark.parametrize("version", ENDS)
def test_a_damaged_checkpoint_fails_with_a_clear_error(
    version: str, checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    cases = []
    for name, (damage, _) in DAMAGE.items():
        model = shutil.copytree(checkpoints["qwen3"][0], tmp_path / name.replace(" ", "-"))
        damage(model / "model-00001-of-00002.safetensors")
        cases.append(Case(name, model))
    for name, outcome in run_cases(version, cases).items():
        message = DAMAGE[name][1]
        assert message in outcome.error(PLANNED), (name, outcome.told)
        if message:
            assert "model-00001-of-00002.safetensors" in outcome.error(PLANNED)
        else:
            assert outcome.told[PLANNED] == outcome.told[STOCK], name
