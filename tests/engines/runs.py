"""Runs the cases of a harness in the real engine and reads what they told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines import environment

HERE = Path(__file__).parent


class Runs:
    """What the cases of one release told."""

    def __init__(self, output: str, reports: Path) -> None:
        self.output = output
        self.told: dict[str, list[dict[str, Any]]] = {}
        for line in output.splitlines():
            if line.startswith("RESULT "):
                told = json.loads(line.removeprefix("RESULT "))
                self.told.setdefault(told["case"], []).append(told)
        lines = reports.read_text().splitlines() if reports.exists() else []
        self.reports = [json.loads(line) for line in lines]

    def error(self, case: str) -> str:
        """Of its first rank."""
        return str(self.told[case][0]["error"])

    def hashes(self, case: str) -> dict[int, str]:
        """By rank."""
        assert all("hash" in told for told in self.told[case]), self.told[case]
        return {told["rank"]: told["hash"] for told in self.told[case]}


def run_cases(harness: str, cases: list[dict[str, Any]], folder: Path, *engines: Path) -> Runs:
    """All cases, for one import of the engine.

    Args:
        harness: File name of the harness, beside this file.
        cases: See ``engines.forked``.
        folder: For the cases and the reports.
        engines: Folders with the releases, as ``engines.environment`` makes them.
    """
    (folder / "cases.json").write_text(json.dumps(cases))
    reports = folder / "reports.jsonl"
    ran = run_harness(harness, [folder / "cases.json"], *engines, WEIGHTLIFT_REPORT=str(reports))
    found = Runs(ran, reports)
    for case in cases:
        assert len(found.told.get(case["name"], ())) == case.get("tp", 1), f"{case['name']}: {ran}"
    return found


def run_harness(harness: str, arguments: Sequence[object], *engines: Path, **environ: str) -> str:
    """What a harness prints, on either stream.

    Raises:
        AssertionError: It failed.
    """
    ran = subprocess.run(
        [sys.executable, str(HERE / harness), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        env={**environment.vllm_environ(*engines), **environ},
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout
