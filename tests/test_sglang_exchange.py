"""Ranks of the real SGLang that share the reading, by Gloo on the CPU, bit by bit as stock."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import environment
from engines.cases import PLANNED, Case, expert_parallel_flags, run_cases
from engines.checkpoints import make_checkpoint

pytestmark = pytest.mark.engine

SHARED = ("--weight-exchange", "on")


@pytest.mark.parametrize("version", environment.releases("0.4.9.post2", "0.5.23", more=["0.5.9"]))
def test_what_is_shared_is_what_the_engine_loads(version: str, tmp_path: Path) -> None:
    fast, apart = (*SHARED, "--enable-fast-load"), expert_parallel_flags(version)
    pairs = {
        kind: [
            make_checkpoint(tmp_path / f"{kind}-{seed}", kind, seed, layers=4) for seed in (0, 1)
        ]
        for kind in ("qwen3", "qwen3moe")
    }
    dense, (first, second) = pairs["qwen3"], pairs["qwen3moe"]
    cases = [
        Case("dense", dense[0], (dense[1], dense[0], dense[1]), tp=2, flags=SHARED),
        Case("experts", first, (second, first, second), tp=2, flags=fast),
        Case("experts apart", first, (second,), tp=2, flags=SHARED, args=apart),
    ]
    for name, outcome in run_cases(version, cases).items():
        assert outcome.verdict == "same", (name, outcome.told, outcome.reports)
        notes = outcome.each("exchange_note")
        assert all("read once by 2 ranks" in note for note in notes), (name, notes)
        assert all(count > 0 for count in outcome.each("exchanged")), name


@pytest.mark.parametrize("version", environment.releases("0.5.23", more=["0.4.9.post2"]))
def test_a_fault_on_one_rank_brings_the_old_weights_back_on_both(
    version: str, tmp_path: Path
) -> None:
    first = make_checkpoint(tmp_path / "first", "qwen3", 0)
    second = make_checkpoint(tmp_path / "second", "qwen3", 1)
    # A direct read that fails is tried again through the page cache, where one fault is no failure.
    env = {"WEIGHTLIFT_DIRECT_IO": "off"}
    cases = [
        Case(
            *(fault, first, (second, second)),
            tp=2,
            flags=SHARED,
            env={**env, "HARNESS_FAULT": fault},
        )
        for fault in ("disk@1", "disk@0", "memory@1")
    ]
    for name, outcome in run_cases(version, cases, [PLANNED]).items():
        for told in outcome.told[PLANNED]:
            assert "error" not in told, (name, told, outcome.output[-3000:])
            assert told["update 1"] != told["launch"] and "failure 1" not in told
            if name.startswith("disk"):
                assert told["update 0"] == told["launch"], name
                assert "Input/output error" in told["failure 0"]
                assert told["failure 0"].endswith(f"The weights of {first} were loaded again.")
            else:
                assert told["update 0"] == told["update 1"], name


def test_a_rank_that_has_to_load_as_the_engine_does(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "qwen3", "qwen3", 0)
    env = {"HARNESS_SABOTAGE": "data_ptr"}
    (outcome,) = run_cases("0.5.17", [Case("one", model, tp=2, flags=SHARED, env=env)]).values()
    assert outcome.is_same, outcome.told
    assert {report["mode"] for report in outcome.reports} == {"stock"}
