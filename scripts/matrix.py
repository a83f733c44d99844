"""What ``scripts/matrix`` does: every release, every model, every parallelism."""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engines import environment
from engines.cases import all_cases, run_cases
from engines.checkpoints import CONFIGS, make_checkpoint
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

README = environment.TOP / "README.md"
START, END = "<!-- matrix -->", "<!-- /matrix -->"
PARALLEL = 2
NAMES = {"qwen3": "Qwen3", "qwen3moe": "Qwen3-MoE", "llama": "Llama", "deepseek": "DeepSeek-V3"}
console = Console(stderr=True)

Verdicts = dict[str, dict[str, str]]


def run(versions: list[str]) -> Verdicts:
    """Verdicts by release and case."""
    verdicts: Verdicts = {}
    with tempfile.TemporaryDirectory() as name:
        checkpoints = {
            kind: (
                make_checkpoint(Path(name, f"{kind}-0"), kind, 0),
                make_checkpoint(Path(name, f"{kind}-1"), kind, 1),
            )
            for kind in CONFIGS
        }

        def one(version: str) -> tuple[str, dict[str, str]]:
            outcomes = run_cases(version, all_cases(version, checkpoints))
            return version, {case: outcome.verdict for case, outcome in outcomes.items()}

        columns = (
            TextColumn("{task.description}"),
            *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
        )
        with Progress(*columns, console=console) as progress, ThreadPoolExecutor(PARALLEL) as pool:
            task = progress.add_task("SGLang releases", total=len(versions))
            for version, found in pool.map(one, versions):
                verdicts[version] = found
                progress.advance(task)
    return verdicts


def table(verdicts: Verdicts) -> str:
    """The verdicts as Markdown: releases down, models across."""
    kinds = list(NAMES)
    rows = [["SGLang", *(NAMES[kind] for kind in kinds)], ["---"] * (len(kinds) + 1)]
    for version, found in verdicts.items():
        row = [version]
        for kind in kinds:
            mine = {name: text for name, text in found.items() if name.split()[0] == kind}
            row.append(_cell(mine))
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(verdicts: dict[str, str]) -> str:
    """Parallelisms by verdict, such as ``tp1 tp2`` or ``tp1 (tp2: stock fails)``."""
    short = {name: name.split()[1] if " " in name else "tp1" for name in verdicts}
    same = " ".join(short[name] for name, text in verdicts.items() if text == "same")
    other: dict[str, list[str]] = {}
    for name, text in verdicts.items():
        if text != "same":
            other.setdefault(text, []).append(short[name])
    failed = "; ".join(f"{' '.join(names)}: {text}" for text, names in other.items())
    return f"{same} ({failed})".strip() if failed else same


def write(markdown: str) -> None:
    """Put the table between the README's marks."""
    text = README.read_text()
    before, rest = text.split(START)
    README.write_text(f"{before}{START}\n{markdown}\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Run, print, write; ends with 1 if anything differs from stock."""
    versions = sys.argv[1:] or list(environment.SGLANG_VERSIONS)
    verdicts = run(versions)
    markdown = table(verdicts)
    sys.stdout.write(f"{markdown}\n")
    if not sys.argv[1:]:
        write(markdown)
    bad = [
        f"{version} {case}: {text}"
        for version, found in verdicts.items()
        for case, text in found.items()
        if text not in ("same", "stock fails")
    ]
    if bad:
        console.print("\n".join(bad), style="red")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
