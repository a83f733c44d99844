"""The real SGLang Diffusion updates its pipelines from disk: as stock does, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines.diffusion_harness import NAMES
from engines.environment import diffusion_and_sglang, diffusion_releases, releases
from engines.runs import run_cases
from packaging.version import Version

ASKED = {"WEIGHTLIFT_PARALLEL_MODULE_LOAD": "1"}
RELEASES = [version for version in diffusion_releases() if version not in ("0.5.7", "0.5.8.post1")]
"""Those that have updates; and 0.5.10 and before need flags on a CPU."""
RESIDENT = ["--text-encoder-cpu-offload", "false", "--dit-cpu-offload", "false"]

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("version", RELEASES)
def test_an_update_leaves_what_a_launch_does_or_the_weights_before(
    version: str, wan_pipelines: Path, tmp_path: Path
) -> None:
    paths = {
        place: str(wan_pipelines / place / NAMES["wan"]) for place in ("first", "second", "damaged")
    }
    there_and_back = [{"path": paths[place]} for place in ("second", "first")]
    failing: list[dict[str, Any]] = [
        {"path": paths["damaged"]},
        {"path": paths["second"], "unreadable": "text_encoder"},
        {"path": paths["damaged"], "early": True},
    ]
    again: list[dict[str, Any]] = [*failing[:2], {"path": paths["second"]}]
    case: dict[str, Any] = {"flags": RESIDENT, "model": paths["first"]}
    cases = [
        {**case, "name": "stock", "stock": True, "updates": there_and_back},
        {**case, "name": "second", "stock": True, "model": paths["second"]},
        {**case, "name": "ours", "env": ASKED, "updates": [*failing, *there_and_back, *again]},
    ]
    engine = diffusion_and_sglang(version)
    runs = run_cases("diffusion_harness.py", cases, tmp_path, *engine)
    (stock,), (second,), (ours,) = (runs.told[name] for name in ("stock", "second", "ours"))
    assert "error" not in stock, stock["trace"]
    first = stock["components"]
    *failures, there, back, damaged, unreadable, last = ours["updates"]
    failures += damaged, unreadable
    assert [update["done"] for update in failures] == [False] * 5
    for update in failures:
        assert update["components"] == first, "the weights before are in place"
    assert there["done"] and back["done"], ours["updates"]
    assert there["components"] == second["components"] != first
    assert back["components"] == first
    assert last["done"] and last["components"] == second["components"]
    for name in ("vae", "transformer") if has_translation(version) else ("vae",):
        assert there["components"][name] == stock["updates"][0]["components"][name]
    for update, reason in ((0, "truncated"), (1, "injected"), (3, "truncated"), (4, "injected")):
        assert reason in failures[update]["message"]
    assert all(2 in update["collected"] for update in stock["updates"]), "of all objects"
    for update in ours["updates"]:
        assert update["collected"][-1] == (1 if update["done"] else 2), "of those since, or of all"
    updates = [report for report in runs.reports if report["phase"] == "update"]
    assert [report["mode"] for report in updates] == ["weightlift"] * 8
    followed = [report["plan"] == "replay" for report in updates]
    assert followed == [False, False, False, False, True, False, True, False]
    assert updates[4]["replayed"] == updates[3]["planned"] > 0 == updates[4]["planned"]


@pytest.mark.parametrize("version", releases("0.5.11", more=["0.5.9", "0.5.13.post1"]))
def test_what_the_engine_updates_by_itself_has_its_names_translated(
    version: str, wan_pipelines: Path, tmp_path: Path
) -> None:
    first, second = (str(wan_pipelines / place / NAMES["wan"]) for place in ("first", "second"))
    updates = [{"path": second}, {"path": second, "modules": ["transformer"]}]
    case: dict[str, Any] = {"flags": RESIDENT, "name": "ours", "env": ASKED, "model": first}
    cases = [
        {**case, "sharded": True, "updates": updates},
        {**case, "name": "second", "stock": True, "model": second},
    ]
    runs = run_cases("diffusion_harness.py", cases, tmp_path, *diffusion_and_sglang(version))
    (ours,), (launched,) = runs.told["ours"], runs.told["second"]
    whole, transformer = ours["updates"]
    assert not whole["done"] and "skips its fused parameters" in whole["message"]
    assert whole["components"] == ours["components"], "the weights before are in place"
    assert transformer["done"], transformer["message"]
    after = launched["components"]["transformer"]
    assert transformer["components"]["transformer"] == after != ours["components"]["transformer"]


@pytest.mark.parametrize("version", releases("0.5.17", more=diffusion_releases()[1:]))
def test_all_ranks_update_or_none(version: str, wan_pipelines: Path, tmp_path: Path) -> None:
    first, second, damaged = (
        str(wan_pipelines / place / NAMES["wan"]) for place in ("first", "second", "damaged")
    )
    elsewhere: list[dict[str, Any]] = [
        {"path": damaged},
        {"unreadable": "text_encoder"},
        {"path": damaged, "early": True},
        {"path": str(tmp_path)},
    ]
    failing: list[dict[str, Any]] = [{"path": second, "rank 1": change} for change in elsewhere]
    early = {"path": second, "modules": ["text_encoder"], "early": True}
    failing.append({**early, "rank 1": {"path": str(tmp_path)}})  # rank 0 asks while it loads
    sharing = (
        {"tensors": False, "sequences": True} if has_translation(version) else {"sequences": True}
    )
    cases: list[dict[str, Any]] = []
    for name, sequence in sharing.items():
        folded = ["--encoder-parallel", "fold"] if sequence and can_fold(version) else []
        case: dict[str, Any] = {"flags": [*RESIDENT, *folded], "tp": 2, "sequence": sequence}
        case["python"] = version not in RELEASES
        updates = [*failing, {"path": second}, {"path": first}]
        cases += [
            {**case, "name": f"first, {name}", "stock": True, "model": first},
            {**case, "name": f"second, {name}", "stock": True, "model": second},
            {**case, "name": name, "env": ASKED, "model": first, "updates": updates},
        ]
    runs = run_cases("diffusion_harness.py", cases, tmp_path, *diffusion_and_sglang(version))
    if version in RELEASES:  # the last, and on rank 0 while rank 1 plans, whose one before failed
        ranks = [report["rank"] for report in runs.reports if report["plan"] == "replay"]
        assert ranks.count(0) > ranks.count(1) == len(sharing)
    for name in sharing:
        before, after, ours = (
            sorted(runs.told[kind], key=lambda told: int(told["rank"]))
            for kind in (f"first, {name}", f"second, {name}", name)
        )
        for rank in (0, 1):
            assert ours[rank]["components"] == before[rank]["components"]
            *failures, there, back = ours[rank]["updates"]
            for failure in failures:
                assert not failure["done"], failure["message"]
                assert failure["components"] == before[rank]["components"], failure["message"]
            assert there["done"] and there["components"] == after[rank]["components"]
            assert back["done"] and back["components"] == before[rank]["components"]
        messages = [failure["message"] for failure in ours[0]["updates"][: len(failing)]]
        assert all("rank 1: " in message for message in messages), messages
        assert "truncated" in messages[0] and "injected" in messages[1]


def has_translation(version: str) -> bool:
    """Whether the release translates names of transformers in updates."""
    return Version(version) >= Version("0.5.14")


def can_fold(version: str) -> bool:
    """Whether ranks that share sequences can be told to share the tensors of encoders."""
    return Version(version) >= Version("0.5.17")


@pytest.mark.parametrize("version", releases("0.5.8.post1", more=["0.5.7", "0.5.17"]))
def test_a_python_call_updates_what_has_no_update_of_its_own(
    version: str, wan_pipelines: Path, tmp_path: Path
) -> None:
    first, second, damaged = (
        str(wan_pipelines / place / NAMES["wan"]) for place in ("first", "second", "damaged")
    )
    failing: list[dict[str, Any]] = [
        {"path": damaged},
        {"path": second, "unreadable": "text_encoder"},
        {"path": damaged, "early": True},
        {"path": second, "modules": ["no_such_module"]},
        {"path": str(tmp_path)},
    ]
    partly = [{"path": second, "modules": ["transformer"]}, {"path": damaged, "early": True}]
    sound = [{"path": second}, {"path": first}]
    case: dict[str, Any] = {"flags": RESIDENT}
    cases = [
        {**case, "name": "first", "stock": True, "model": first},
        {**case, "name": "second", "stock": True, "model": second},
        {
            **case,
            "name": "ours",
            "env": ASKED,
            "model": first,
            "python": True,
            "updates": [*failing, *partly, *sound],
        },
    ]
    runs = run_cases("diffusion_harness.py", cases, tmp_path, *diffusion_and_sglang(version))
    (before,), (after,), (ours,) = (runs.told[name] for name in ("first", "second", "ours"))
    assert "error" not in ours, ours["trace"]
    *failures, one, failed, both, back = ours["updates"]
    assert [update["done"] for update in (*failures, failed)] == [False] * (len(failing) + 1)
    for update in failures:
        assert update["components"] == before["components"], "the weights before are in place"
    messages = [update["message"] for update in ours["updates"]]
    assert all(update["done"] for update in (one, both, back)), messages
    for name, component in one["components"].items():
        launched = after if name == "transformer" else before
        assert component == launched["components"][name]
    if version != "0.5.17":  # it asks the engine, which goes back to where it was launched from
        assert failed["components"] == one["components"]
    assert both["components"] == after["components"] != before["components"]
    assert back["components"] == before["components"]
    assert "truncated" in failures[0]["message"] and "injected" in failures[1]["message"]
    assert "no_such_module" in failures[3]["message"]
    assert "no safetensors files" in failures[4]["message"] or version == "0.5.17"
