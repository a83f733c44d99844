"""What ``scripts/matrix`` does: every release, every model, every parallelism."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engines import environment, verdicts
from engines.cases import all_cases, run_cases
from engines.checkpoints import CONFIGS, make_checkpoint
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

README = environment.TOP / "README.md"
PARALLEL = 2
console = Console(stderr=True)

Verdicts = Mapping[str, str]
"""By case, such as ``qwen3 tp2``."""


@dataclass(frozen=True)
class Engine:
    """What is run of an engine.

    Attributes:
        title: Its name.
        versions: The releases.
        models: Titles of the columns, by the first word of the cases in them.
        make: Makes the checkpoints in a folder.
        run: Verdicts of a release with these checkpoints.
    """

    title: str
    versions: Sequence[str]
    models: Mapping[str, str]
    make: Callable[[Path], None]
    run: Callable[[str, Path], Verdicts]


def make_for_sglang(folder: Path) -> None:
    """Two checkpoints of each model."""
    for kind in CONFIGS:
        for seed in (0, 1):
            make_checkpoint(folder / f"{kind}-{seed}", kind, seed)


def of_sglang(version: str, folder: Path) -> Verdicts:
    """Launch and updates, by case."""
    checkpoints = {kind: (folder / f"{kind}-0", folder / f"{kind}-1") for kind in CONFIGS}
    outcomes = run_cases(version, all_cases(version, checkpoints))
    return {case: outcome.verdict for case, outcome in outcomes.items()}


ENGINES: Mapping[str, Engine] = {
    "sglang": Engine(
        "SGLang",
        environment.SGLANG_VERSIONS,
        {"qwen3": "Qwen3", "qwen3moe": "Qwen3-MoE", "llama": "Llama", "deepseek": "DeepSeek-V3"},
        make_for_sglang,
        of_sglang,
    ),
    "vllm": Engine(
        "vLLM",
        environment.VLLM_VERSIONS,
        dict(zip(verdicts.TEXT, ("Qwen3", "Qwen3-MoE", "Llama"), strict=True)),
        verdicts.make_text,
        verdicts.of_vllm,
    ),
    "vllm-omni": Engine(
        "vLLM-Omni",
        tuple(environment.OMNI_VERSIONS),
        {
            **dict(zip(verdicts.PIPELINES, ("Qwen-Image", "Wan2.2"), strict=True)),
            **{stage: f"Qwen3-Omni's {stage}" for stage in verdicts.STAGES},
        },
        verdicts.make_omni,
        verdicts.of_omni,
    ),
}


def run(engine: Engine, versions: Sequence[str]) -> dict[str, Verdicts]:
    """Verdicts by release."""
    found: dict[str, Verdicts] = {}
    columns = (
        TextColumn("{task.description}"),
        *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
    )
    with (
        tempfile.TemporaryDirectory() as name,
        Progress(*columns, console=console) as progress,
        ThreadPoolExecutor(PARALLEL) as pool,
    ):
        task = progress.add_task(f"{engine.title} releases", total=len(versions))
        engine.make(Path(name))
        each = pool.map(lambda version: engine.run(version, Path(name)), versions)
        for version, told in zip(versions, each, strict=True):
            found[version] = told
            progress.advance(task)
    return found


def table(engine: Engine, found: Mapping[str, Verdicts]) -> str:
    """The verdicts as Markdown: releases down, models across."""
    rows = [[engine.title, *engine.models.values()], ["---"] * (len(engine.models) + 1)]
    for version, told in found.items():
        row = [version]
        for kind in engine.models:
            mine = {case: text for case, text in told.items() if case.split()[0] == kind}
            row.append(_cell(mine))
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(told: Verdicts) -> str:
    """Parallelisms by verdict, such as ``tp1 tp2`` or ``tp1 (tp2: stock fails)``."""
    short = {case: case.split()[1] if " " in case else "tp1" for case in told}
    same = " ".join(short[case] for case, text in told.items() if text == "same")
    other: dict[str, list[str]] = {}
    for case, text in told.items():
        if text != "same":
            other.setdefault(text, []).append(short[case])
    failed = "; ".join(f"{' '.join(cases)}: {text}" for text, cases in other.items())
    return f"{same} ({failed})".strip() if failed else same


def write(name: str, markdown: str) -> None:
    """Put the table between the README's marks of this engine."""
    start, end = f"<!-- matrix {name} -->", f"<!-- /matrix {name} -->"
    before, rest = README.read_text().split(start)
    README.write_text(f"{before}{start}\n{markdown}\n{end}{rest.split(end)[1]}")


def main() -> None:
    """Run, print, write; ends with 1 if anything differs from stock."""
    bad = []
    for name in sys.argv[1:2] or ENGINES:
        engine = ENGINES[name]
        found = run(engine, sys.argv[2:] or engine.versions)
        markdown = table(engine, found)
        sys.stdout.write(f"{markdown}\n\n")
        if not sys.argv[2:]:
            write(name, markdown)
        bad += [
            f"{engine.title} {version} {case}: {text}"
            for version, told in found.items()
            for case, text in told.items()
            if text not in ("same", "stock fails")
        ]
    if bad:
        console.print("\n".join(bad), style="red")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
