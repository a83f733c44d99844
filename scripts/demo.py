"""What ``scripts/demo`` shows: the same server, stock and with weightlift, side by side."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engines.cases import PLANNED, STOCK, Case, run_cases
from engines.checkpoints import make_checkpoint
from engines.server import Server
from rich.console import Console
from rich.table import Table

from weightlift.loading.report import human

console = Console()


def serve(version: str, model: Path, folder: Path, *, with_weightlift: bool) -> dict[str, Any]:
    """Start the server, generate, stop; what it answered and what weightlift reported."""
    name = PLANNED if with_weightlift else STOCK
    report = folder / "report.jsonl"
    environ = {"WEIGHTLIFT": str(int(with_weightlift)), "WEIGHTLIFT_REPORT": str(report)}
    with console.status(f"starting the server, {name}"):
        with Server(version, model, folder / f"{name}.log", environ=environ) as server:
            tokens = server.tokens()
    lines = report.read_text().splitlines() if with_weightlift else []
    return {
        "tokens": tokens,
        "start": server.start_s,
        "load": json.loads(lines[0]) if lines else {},
    }


def main(version: str) -> None:
    """Compare and print; ends with 1 if anything differs."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_checkpoint(folder / "qwen3", "qwen3", 0)
        console.print(f"a small random Qwen3 in {len(list(model.glob('*.safetensors')))} shards")
        results = [serve(version, model, folder, with_weightlift=on) for on in (False, True)]
        with console.status("loading once more, to compare every parameter"):
            outcome = run_cases(version, [Case("qwen3", model)])["qwen3"]
    table = Table("SGLang " + version, STOCK, PLANNED)
    table.add_row("tokens", *(str(result["tokens"]) for result in results))
    hashes = [outcome.told[kind][0].get("launch", outcome.error(kind)) for kind in (STOCK, PLANNED)]
    table.add_row("SHA-256 of all parameters", *(text[:16] for text in hashes))
    load = results[1]["load"]
    table.add_row("bytes read", "by page faults", human(load["bytes_read"]))
    made = f"{load['planned']} planned, {load['materialised']} at once, {load['threads']} threads"
    table.add_row("copies", "one by one", made)
    table.add_row("load", "", f"{load['seconds']:.3f} s")
    table.add_row("start to first answer", *(f"{result['start']:.1f} s" for result in results))
    console.print(table)
    same = results[0]["tokens"] == results[1]["tokens"] and outcome.is_same
    verdict = "the same tokens and parameters" if same else "[red]DIFFERENT[/red]"
    console.print(f"{verdict}, in {time.monotonic() - started:.0f} s")
    console.print("A checkpoint this small shows that it works, not how fast: docs/benchmarks.md")
    raise SystemExit(0 if same and load["mode"] == PLANNED else 1)


if __name__ == "__main__":
    main(sys.argv[1])
