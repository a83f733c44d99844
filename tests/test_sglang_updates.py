"""Updates of the real SGLang: replayed, bit by bit, and on every rank or on none."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import environment
from engines.cases import PLANNED, STOCK, Case, run_cases
from engines.checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.engine

ENDS = environment.releases("0.4.9.post2", "0.5.23")
GENERATIONS = environment.releases(
    *ENDS, "0.5.13.post1", more=["0.5.2", "0.5.5.post3", "0.5.9", "0.5.17"]
)
UPDATES = {version: 20 if version in ENDS else 4 for version in GENERATIONS}
"""``scripts/updates`` takes the real server through twenty in every generation."""
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("pairs")
    return {
        kind: (
            make_checkpoint(folder / f"{kind}-0", kind, 0),
            make_checkpoint(folder / f"{kind}-1", kind, 1),
        )
        for kind in ("qwen3", "qwen3moe")
    }


@pytest.mark.parametrize("version", GENERATIONS)
def test_alternating_updates_are_as_fresh_launches(
    version: str, pairs: dict[str, tuple[Path, Path]]
) -> None:
    count = UPDATES[version]
    cases = [
        Case(f"{kind} tp{ranks} from {start}", pairs[kind][start], tp=ranks, updates=updates)
        for kind in pairs
        for ranks in (1, 2)
        for start, updates in ((0, (pairs[kind][1], pairs[kind][0]) * (count // 2)), (1, ()))
    ]
    outcomes = run_cases(version, cases, [PLANNED])
    launches = run_cases(version, [case for case in cases if not case.updates], [STOCK])
    for kind in pairs:
        for ranks in (1, 2):
            name = f"{kind} tp{ranks} from"
            outcome = outcomes[f"{name} 0"]
            for rank, told in enumerate(outcome.told[PLANNED]):
                assert not told["moved"]
                for cost in told["cost"]:
                    assert cost == {"opened": SHARDS, "left": []}
                fresh = launches[f"{name} 1"].told[STOCK][rank]["launch"]
                assert told["launch"] != fresh
                for number in range(count):
                    assert told[f"update {number}"] == (told["launch"] if number % 2 else fresh)
            updates = [report for report in outcome.reports if report["phase"] == "update"]
            assert [report["plan"] for report in updates[:ranks]] == ["full"] * ranks
            for report in updates[ranks:]:
                assert (report["plan"], report["planned"], report["materialised"]) == (
                    "replay",
                    0,
                    0,
                )
                assert report["replayed"] == report["tensors"] > 0


def _truncate(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change what a shard holds, and the index with it."""
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    file = weight_map[Q_PROJ]
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    kept = {name: shard for name, shard in weight_map.items() if shard != file or name in tensors}
    index.write_text(json.dumps({"weight_map": kept | dict.fromkeys(tensors, file)}))


def _drop(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors.pop(Q_PROJ))


def _widen(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors.update({Q_PROJ: torch.zeros(72, 64).bfloat16()}))


def _lose_a_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "truncated"),
    "missing key": (_drop, f"tensor '{Q_PROJ}': it is in none of the files"),
    "wrong shape": (_widen, f"tensor '{Q_PROJ}': its shape is \\(72, 64\\)"),
    "missing shard": (_lose_a_shard, "model-00002-of-00002.safetensors"),
    "removed": (shutil.rmtree, "Failed to"),
}


@pytest.mark.parametrize("version", ENDS)
def test_what_cannot_be_loaded_leaves_the_old_weights(
    version: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    first, second = pairs["qwen3"]
    cases = []
    for name, (damage, _) in DAMAGE.items():
        broken = shutil.copytree(second, tmp_path / name)
        damage(broken)
        cases.append(Case(name, first, (broken, second, broken, first), tp=2))
    for name, outcome in run_cases(version, cases, [PLANNED]).items():
        for told in outcome.told[PLANNED]:
            assert "error" not in told, (name, told, outcome.output[-3000:])
            assert told["launch"] == told["update 0"] == told["update 3"], name
            assert told["update 1"] == told["update 2"] != told["launch"], name
            for failure in ("failure 0", "failure 2"):
                assert told[failure].endswith("The old weights are still in place."), told[failure]
                assert re.search(DAMAGE[name][1], told[failure]), told[failure]
            assert not {"failure 1", "failure 3"} & told.keys()


@pytest.mark.parametrize("version", ENDS)
def test_more_tensors_are_left_to_the_engine(
    version: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    first, second = pairs["qwen3"]
    larger = shutil.copytree(second, tmp_path / "larger")
    _rewrite(larger, lambda tensors: tensors.update(more=torch.zeros(4, 4).bfloat16()))
    (outcome,) = run_cases(version, [Case("more", first, (second, larger, first))]).values()
    assert outcome.is_same, (outcome.told, outcome.output[-3000:])
    assert outcome.each("plan") == ["full", "full", "full", "full"]


@pytest.mark.parametrize("version", ENDS)
def test_a_draft_model_takes_what_its_targets_checkpoint_has(
    version: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    first, second = pairs["qwen3"]
    smaller = shutil.copytree(second, tmp_path / "smaller")
    _drop(smaller)
    case = Case("draft", first, (smaller, second), env={"HARNESS_DRAFT": "1"})
    (outcome,) = run_cases(version, [case]).values()
    assert outcome.verdict == "same", (outcome.told, outcome.reports)
    (told,) = outcome.told[PLANNED]
    assert len({told["launch"], told["update 0"], told["update 1"]}) == 3


@pytest.mark.parametrize("version", ENDS)
def test_a_fault_half_way_brings_the_old_weights_back(
    version: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    first, second = pairs["qwen3"]
    stays = shutil.copytree(first, tmp_path / "stays")
    goes = shutil.copytree(second, tmp_path / "goes")
    faults = {"disk@1": second, "disk@0": second, "memory@1": second, "vanish@1": goes}
    cases = [
        Case(fault, stays, (path, second), tp=2, env={"HARNESS_FAULT": fault})
        for fault, path in faults.items()
    ]
    for name, outcome in run_cases(version, cases, [PLANNED]).items():
        for told in outcome.told[PLANNED]:
            assert "error" not in told, (name, told, outcome.output[-3000:])
            assert told["update 1"] != told["launch"] and "failure 1" not in told
            if name.startswith("disk"):
                assert told["update 0"] == told["launch"], name
                where = f"rank {name[-1]}: "
                assert where in told["failure 0"] and "Input/output error" in told["failure 0"]
                assert told["failure 0"].endswith(f"The weights of {stays} were loaded again.")
            else:  # the engine's own loader takes over; open files outlive their names
                assert told["update 0"] == told["update 1"], name


@pytest.mark.parametrize("version", ENDS)
def test_who_can_go_neither_on_nor_back_says_so(
    version: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    first, second = pairs["qwen3"]
    cases = [
        Case(
            fault,
            shutil.copytree(first, tmp_path / fault),
            (second,),
            tp=2,
            env={"HARNESS_FAULT": fault},
        )
        for fault in ("stranded@1", "die@1")
    ]
    sent = {"HARNESS_FAULT": "disk@1", "HARNESS_TENSOR_UPDATE": "1"}
    if version == ENDS[-1]:  # the harness sends no tensors to the oldest
        cases.append(Case("sent", first, (second,), tp=2, env=sent))
    outcomes = run_cases(version, cases, [PLANNED])
    for rank in outcomes["stranded@1"].told[PLANNED]:
        assert "holds parts of two checkpoints" in rank["failure 0"], rank
    for rank in outcomes["sent"].told[PLANNED] if "sent" in outcomes else ():
        assert "they are not those of a checkpoint" in rank["failure 0"], rank
    alive, dead = outcomes["die@1"].told[PLANNED]
    assert "one may be gone" in alive["failure 0"]
    assert "died" in dead["error"]
