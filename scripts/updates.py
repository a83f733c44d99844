"""What ``scripts/updates`` does: the real server, twenty updates to and fro, tokens against a fresh one."""

from __future__ import annotations

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engines.checkpoints import make_checkpoint
from engines.server import Server
from rich.console import Console
from rich.table import Table

VERSIONS = ("0.4.9.post2", "0.5.2", "0.5.9", "0.5.13.post1", "0.5.17", "0.5.23")
KINDS = ("qwen3", "qwen3moe")
UPDATES = 20
PARALLEL = 2
FAST = ("--enable-fast-load",)
console = Console(stderr=True)


def fresh(
    version: str, model: Path, folder: Path, flags: list[str], environ: dict[str, str]
) -> Any:
    """The tokens of a stock server of this checkpoint."""
    log = folder / "stock.log"
    with Server(version, model, log, flags=flags, environ={**environ, "WEIGHTLIFT": "0"}) as server:
        return server.tokens()


def check(version: str, kind: str, ranks: int, folder: Path) -> str:
    """``same``, or what was not."""
    folder.mkdir()
    first, second = (make_checkpoint(folder / str(seed), kind, seed, layers=6) for seed in (0, 1))
    flags = ["--tp-size", str(ranks)]
    environ = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if ranks == 2 else {}
    try:
        wanted = [fresh(version, path, folder, flags, environ) for path in (second, first)]
    except OSError as error:
        return f"stock fails: {error}"
    report = folder / "report.jsonl"
    ours = {**environ, "WEIGHTLIFT_REPORT": str(report)}
    with Server(version, first, folder / "log", flags=[*flags, *FAST], environ=ours) as server:
        if server.tokens() != wanted[1]:
            return "the launch differs"
        for number in range(UPDATES):
            if not server.update(first if number % 2 else second)["success"]:
                return f"update {number} failed"
            if server.tokens() != wanted[number % 2]:
                return f"update {number} differs"
    loads = [json.loads(line) for line in report.read_text().splitlines()]
    plans = [load["plan"] for load in loads]
    expected = ["fast"] * 2 * ranks + ["replay"] * (UPDATES - 1) * ranks
    return "same" if plans == expected else f"plans {sorted(set(plans))}"


def main() -> None:
    """Run, print; ends with 1 if anything differs."""
    versions = sys.argv[1:] or list(VERSIONS)
    cases = [(version, kind, ranks) for version in versions for kind in KINDS for ranks in (1, 2)]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(PARALLEL) as pool:

        def one(case: tuple[str, str, int]) -> str:
            try:
                verdict = check(*case, Path(name, "-".join(map(str, case))))
            except Exception as error:  # noqa: BLE001 - told in the table
                verdict = f"{type(error).__name__}: {str(error)[-300:]}"
            console.print(*case, verdict)
            return verdict

        verdicts = dict(zip(cases, pool.map(one, cases), strict=True))
    table = Table("SGLang", *(f"{kind} tp{ranks}" for kind in KINDS for ranks in (1, 2)))
    for version in versions:
        row = [verdicts[version, kind, ranks] for kind in KINDS for ranks in (1, 2)]
        table.add_row(version, *row)
    Console().print(table)
    good = all(text == "same" or text.startswith("stock fails") for text in verdicts.values())
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
