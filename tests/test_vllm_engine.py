"""The whole vLLM engine on a CPU: the same tokens and parameters as stock, also after reloads."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import environment
from engines.checkpoints import make_checkpoint
from engines.runs import run_harness

MORE = bool(os.environ.get("WEIGHTLIFT_TEST_MORE"))
VERSIONS = ("0.28.0", "0.30.0", "0.32.0") if MORE else ("0.30.0",)
KINDS = ("qwen3", "qwen3moe") if MORE else ("qwen3",)
ASKED = {"WEIGHTLIFT_MULTITHREAD_LOAD": "1"}
STOCK = {"WEIGHTLIFT": "0"}

pytestmark = pytest.mark.engine


def told(version: str, models: list[Path], ranks: int, environ: dict[str, str]) -> list[Any]:
    """Tokens and hashes after the launch and after each reload."""
    engine = environment.vllm(version, Path(sys.executable))
    output = run_harness("vllm_engine.py", [ranks, *models], engine, **environ)
    (line,) = (line for line in output.splitlines() if line.startswith("RESULT "))
    found: list[Any] = json.loads(line.removeprefix("RESULT "))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_tokens_and_parameters_are_those_of_stock(version: str, kind: str, tmp_path: Path) -> None:
    models = [make_checkpoint(tmp_path / str(seed), kind, seed, head=32) for seed in (1, 2)]
    damaged = make_checkpoint(tmp_path / "damaged", kind, 2, head=32)
    shard = max(damaged.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 100)
    report = tmp_path / "report.jsonl"
    asked = {**ASKED, "WEIGHTLIFT_REPORT": str(report)}
    first, second, again, failed = told(version, [*models, damaged], 1, asked)
    assert [first, second, again] == told(version, models, 1, STOCK)
    assert first != second
    if kind == "qwen3":  # a reload of experts leaves others than a launch, in the stock engine too
        assert first == again
    assert failed[:2] == again, "the weights before are in place"
    assert shard.name in failed[2] and "truncated" in failed[2]
    launch, *reloads = map(json.loads, report.read_text().splitlines())
    assert [told["phase"] for told in (launch, *reloads)] == ["launch", "update", "update"]
    for load in (launch, *reloads):
        assert load["mode"] == "weightlift" and load["planned"] > 0
        assert load["bytes_needed"] == launch["bytes_needed"], "each byte once"
        assert load["materialised"] <= launch["materialised"], "no more is read at once"


@pytest.mark.skipif(not MORE, reason="takes minutes; WEIGHTLIFT_TEST_MORE=1 runs it")
@pytest.mark.parametrize("version", VERSIONS)
def test_two_ranks_answer_as_in_stock(version: str, tmp_path: Path) -> None:
    models = [make_checkpoint(tmp_path / str(seed), "qwen3", seed, head=32) for seed in (1, 2)]
    report = tmp_path / "report.jsonl"
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    asked = {**ASKED, **bound, "WEIGHTLIFT_REPORT": str(report)}
    launched, reloaded, again = told(version, models, 2, asked)
    assert [launched, reloaded, again] == told(version, models, 2, {**bound, **STOCK})
    assert launched == again != reloaded and len(set(launched[1])) == 2
    loads = [json.loads(line) for line in report.read_text().splitlines()]
    assert sorted((load["phase"], load["rank"]) for load in loads) == [
        *(("launch", rank) for rank in (0, 1)),
        *(("update", rank) for rank in (0, 0, 1, 1)),
    ]
    assert {load["mode"] for load in loads} == {"weightlift"}
