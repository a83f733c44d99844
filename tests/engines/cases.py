"""Cases for the harness, and what they tell: stock and weightlift side by side."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines import environment

HARNESS = Path(__file__).with_name("harness.py")
RUN_SECONDS = 540
STOCK, PLANNED = "stock", "weightlift"


@dataclass(frozen=True)
class Case:
    """A model loaded by the stock engine and by weightlift.

    Attributes:
        name: For people.
        model: Folder of the checkpoint that is launched.
        updates: Folders that the weights are then updated from, in this order.
        tp: Ranks.
        args: More of the engine's command line.
        flags: Flags that weightlift adds to it, unknown to the stock engine.
        env: More environment.
    """

    name: str
    model: Path
    updates: tuple[Path, ...] = ()
    tp: int = 1
    args: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def spec(self, kind: str) -> dict[str, Any]:
        """As the harness reads it."""
        return {
            "name": f"{self.name}/{kind}",
            "model": str(self.model),
            "updates": [str(path) for path in self.updates],
            "tp": self.tp,
            "args": [*self.args, *(self.flags if kind == PLANNED else ())],
            "env": dict(self.env),
            "stock": kind == STOCK,
        }


@dataclass(frozen=True)
class Outcome:
    """What one case did, by kind of load and then by rank.

    Attributes:
        told: What the harness said of each rank.
        reports: What weightlift reported of each load, in order.
        output: All that was printed.
    """

    told: Mapping[str, list[dict[str, Any]]]
    reports: list[dict[str, Any]]
    output: str

    def error(self, kind: str) -> str:
        """The first rank's error, or ''."""
        return next((rank["error"] for rank in self.told[kind] if "error" in rank), "")

    @property
    def is_same(self) -> bool:
        """Whether both loaded, with the same bytes on every rank after every step."""
        stock, planned = (
            [
                {key: value for key, value in rank.items() if key != "cost"}
                for rank in self.told[kind]
            ]
            for kind in (STOCK, PLANNED)
        )
        return not self.error(STOCK) and bool(stock) and stock == planned

    @property
    def verdict(self) -> str:
        """One word for a table."""
        if self.error(STOCK):
            return "stock fails" if self.error(PLANNED) else "STOCK FAILS"
        if not self.is_same:
            return "DIFFERENT"
        modes = {report["mode"] for report in self.reports}
        return "same" if modes == {PLANNED} else "SAME, BUT STOCK"

    def each(self, fact: str) -> list[Any]:
        """One fact of every report, in order."""
        return [report[fact] for report in self.reports]


def run_cases(
    version: str, cases: Sequence[Case], kinds: Sequence[str] = (STOCK, PLANNED)
) -> dict[str, Outcome]:
    """Run these cases on a release, in one process that imports it once; outcomes by case name."""
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder, "reports.jsonl")
        specs: list[dict[str, Any]] = []
        for case in cases:
            for kind in kinds:
                spec = case.spec(kind)
                if kind == PLANNED:
                    spec["env"]["WEIGHTLIFT_REPORT"] = f"{reports}.{len(specs)}"
                specs.append(spec)
        file = Path(folder, "cases.json")
        file.write_text(json.dumps(specs))
        output = _run_harness(version, file)
        told = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("RESULT ")]
        return {
            case.name: Outcome(
                {kind: _ranks(told, f"{case.name}/{kind}", case.tp) for kind in kinds},
                _reports(specs, case.name),
                output,
            )
            for case in cases
        }


def _run_harness(version: str, file: Path) -> str:
    ran = subprocess.run(
        [sys.executable, str(HARNESS), str(file)],
        env=environment.sglang_environ(version),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=RUN_SECONDS,
        cwd=file.parent,
    )
    if ran.returncode:
        raise RuntimeError(f"SGLang {version} cannot be imported:\n{ran.stdout[-3000:]}")
    return ran.stdout


def _ranks(told: list[dict[str, Any]], name: str, ranks: int) -> list[dict[str, Any]]:
    """What each rank said, without what it is called; a rank that said nothing died."""
    found = {item["rank"]: item for item in told if item["case"] == name}
    dead = {"error": "the rank died without a word"}
    return [
        {key: value for key, value in found.get(rank, dead).items() if key != "case"}
        for rank in range(ranks)
    ]


def _reports(specs: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    for spec in specs:
        if spec["name"] == f"{name}/{PLANNED}":
            file = Path(spec["env"]["WEIGHTLIFT_REPORT"])
            lines = file.read_text().splitlines() if file.exists() else []
            return [json.loads(line) for line in lines]
    return []


def expert_parallel_flags(version: str) -> tuple[str, ...]:
    """How a release is told to give each of two ranks half of the experts."""
    if version.startswith("0.4.9"):
        return ("--enable-ep-moe",)
    return ("--ep-size", "2")


def all_cases(version: str, checkpoints: Mapping[str, tuple[Path, Path]]) -> list[Case]:
    """Every architecture, on one rank, on two, and with the experts spread over two."""
    cases = []
    for kind, (first, second) in checkpoints.items():
        cases.append(Case(kind, first, (second, first)))
        cases.append(Case(f"{kind} tp2", first, (second,), tp=2))
        if kind in ("qwen3moe", "deepseek"):
            flags = expert_parallel_flags(version)
            cases.append(Case(f"{kind} ep2", first, (second,), tp=2, args=flags))
    return cases
