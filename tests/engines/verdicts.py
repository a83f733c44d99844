"""What ``scripts/matrix`` runs of vLLM and vLLM-Omni: each release loads each model, as in stock or not."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.version import Version

from engines import environment
from engines.cases import PLANNED, STOCK, Outcome
from engines.checkpoints import make_checkpoint
from engines.runs import run_cases, run_harness

TEXT = ("qwen3", "qwen3moe", "llama")
PIPELINES = ("qwenimage", "wan")
STAGES = ("thinker", "talker", "code2wav")
ASKED = {"WEIGHTLIFT_MULTITHREAD_LOAD": "1"}
RELOADS_FROM = Version("0.18")
"""Before, vLLM loads once more as at launch."""


def make_text(folder: Path) -> None:
    """Two checkpoints of each model for vLLM."""
    for kind in TEXT:
        for seed in (1, 2):
            make_checkpoint(folder / f"{kind}-{seed}", kind, seed, head=32)
        make_checkpoint(folder / f"{kind}-fp8", kind, 1, head=32, block_fp8=True)


def of_vllm(version: str, folder: Path) -> dict[str, str]:
    """Verdicts of a release by case."""
    cases: dict[str, dict[str, Any]] = {}
    for kind in TEXT:
        first, second = (str(folder / f"{kind}-{seed}") for seed in (1, 2))
        cases[kind] = {"model": first}
        cases[f"{kind} tp2"] = {"model": first, "tp": 2}
        if Version(version) >= RELOADS_FROM:
            cases[f"{kind} reload"] = {"model": first, "reload": second}
        cases[f"{kind} fp8"] = {"model": str(folder / f"{kind}-fp8"), "as_stored": True}
    return _verdicts("vllm_harness.py", cases, environment.vllm(version, Path(sys.executable)))


def make_omni(folder: Path) -> None:
    """Checkpoints of pipelines, and of one model of several stages."""
    engines = environment.omni_and_vllm("0.30.0")
    made = [part for kind in PIPELINES for part in (kind, folder / kind, 1, 96)]
    run_harness("omni_harness.py", ["make", *made], *engines)
    run_harness("omni_stages.py", ["make", folder / "stages"], *engines)


def of_omni(version: str, folder: Path) -> dict[str, str]:
    """Verdicts of a release of vLLM-Omni by case."""
    pipelines: dict[str, dict[str, Any]] = {}
    for kind in PIPELINES:
        case = {"kind": kind, "model": str(folder / kind)}
        pipelines |= {kind: case, f"{kind} tp2": {**case, "tp": 2}}
    stages: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        stages[stage] = {"stage": stage, "model": str(folder / "stages")}
    stages["thinker tp2"] = {**stages["thinker"], "tp": 2}
    engines = environment.omni_and_vllm(version)
    return {
        **_verdicts("omni_harness.py", pipelines, *engines),
        **_verdicts("omni_stages.py", stages, *engines),
    }


def _verdicts(harness: str, cases: dict[str, dict[str, Any]], *engines: Path) -> dict[str, str]:
    """Each case by the stock engine and by weightlift."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        both: list[dict[str, Any]] = []
        for number, (case, spec) in enumerate(cases.items()):
            report = {"WEIGHTLIFT_REPORT": str(folder / f"{number}.jsonl")}
            both += [
                {**spec, "name": f"{case}/{STOCK}", "stock": True},
                {**spec, "name": f"{case}/{PLANNED}", "env": {**ASKED, **report}},
            ]
        runs = run_cases(harness, both, folder, *engines)
        verdicts = {}
        for number, case in enumerate(cases):
            told = {kind: _by_rank(runs.told[f"{case}/{kind}"]) for kind in (STOCK, PLANNED)}
            file = folder / f"{number}.jsonl"
            lines = file.read_text().splitlines() if file.exists() else []
            verdicts[case] = Outcome(told, [json.loads(line) for line in lines], "").verdict
        return verdicts


def _by_rank(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ranks = sorted(told, key=lambda rank: rank["rank"])
    return [{key: value for key, value in rank.items() if key != "case"} for rank in ranks]
