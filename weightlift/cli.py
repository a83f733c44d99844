"""The command ``weightlift``: is it in place, what is in a checkpoint, how fast does it load."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import weightlift

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Load model weights at the speed of the hardware in SGLang and vLLM.",
)
out = Console()
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
CheckpointPath = Annotated[
    Path, typer.Argument(help="A directory of safetensors files, or one file.", exists=True)
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(weightlift.__version__)
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before a command."""


def _fail(message: str) -> typer.Exit:
    err.print(f"weightlift: {message}", style="red", highlight=False)
    return typer.Exit(1)


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show the engines found here, whether they are supported, and what became of each patch.

    Ends with 1 if the start-up hook is missing or an installed engine is not patched.
    """
    from weightlift.hooks.status import hook_folder, statuses

    with err.status("Importing the engines in a process of their own"):
        folder, found = hook_folder(), statuses()
    if as_json:
        engines = [_plain(dataclasses.asdict(item)) for item in found]
        out.print_json(json.dumps({"hook": str(folder) if folder else None, "engines": engines}))
    else:
        _print_status(folder, found)
    installed = [item for item in found if item.engine]
    if folder is None or any(not item.is_patched for item in installed):
        raise typer.Exit(1)


def _plain(value: Any) -> Any:
    """Enums as their values, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return getattr(value, "value", value)


def _print_status(folder: Path | None, found: list[Any]) -> None:
    hook = (
        f"in {folder}" if folder else "missing: install weightlift with pip into this environment"
    )
    out.print(f"weightlift {weightlift.__version__}, start-up hook {hook}", highlight=False)
    table = Table("engine", "installed", "tested", "module", "outcome", "detail")
    for item in found:
        installed = item.engine.version or "unknown" if item.engine else "-"
        rows = item.modules or {"": item.result}
        for number, (module, result) in enumerate(rows.items()):
            facts = (item.name, installed, item.versions) if number == 0 else ("", "", "")
            table.add_row(*facts, module, result.outcome.value, result.detail)
    out.print(table)


@app.command()
def inspect(checkpoint: CheckpointPath, as_json: AsJson = False) -> None:
    """Show files, tensors, bytes and dtypes of a checkpoint, and how much is in the page cache."""
    from weightlift.loading.checkpoint import Checkpoint
    from weightlift.loading.errors import WeightliftError
    from weightlift.loading.report import human

    rows: list[dict[str, Any]] = []
    try:
        with Checkpoint.from_path(checkpoint) as opened:
            for shard in opened.shards:
                dtypes: dict[str, int] = {}
                for entry in shard.tensors.values():
                    name = str(entry.dtype).removeprefix("torch.")
                    dtypes[name] = dtypes.get(name, 0) + entry.nbytes
                file = shard.file
                facts = {"file": file.path, "tensors": len(shard.tensors), "bytes": file.size}
                rows.append({**facts, "dtypes": dtypes, "cached_bytes": file.cached_bytes()})
    except WeightliftError as error:
        raise _fail(str(error)) from error
    if as_json:
        out.print_json(json.dumps(rows))
        return
    table = Table("file", "tensors", "size", "dtypes", "in page cache")
    for row in rows:
        dtypes_text = ", ".join(f"{name} {human(size)}" for name, size in row["dtypes"].items())
        cached = f"{row['cached_bytes'] / max(row['bytes'], 1):.0%}"
        name = os.path.basename(row["file"])
        table.add_row(name, str(row["tensors"]), human(row["bytes"]), dtypes_text, cached)
    totals = {key: sum(row[key] for row in rows) for key in ("tensors", "bytes", "cached_bytes")}
    table.add_section()
    cached = f"{totals['cached_bytes'] / max(totals['bytes'], 1):.0%}"
    table.add_row(f"{len(rows)} files", str(totals["tensors"]), human(totals["bytes"]), "", cached)
    out.print(table)


@app.command()
def bench(
    checkpoint: CheckpointPath,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N. Default: cuda if there.")] = "",
    calls: Annotated[int, typer.Option(help="Calls of each loader.", min=1)] = 5,
    warm: Annotated[bool, typer.Option(help="With the files in the page cache.")] = True,
    cold: Annotated[bool, typer.Option(help="With the page cache dropped.")] = True,
    loader: Annotated[
        list[str] | None, typer.Option(help="Only these loaders; may be given again.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the tensors to fill, such as bfloat16. Default: as stored.")
    ] = "",
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart to this PNG.")] = None,
) -> None:
    """Time weightlift against safetensors and the installed peers, and check that all agree."""
    import torch

    from weightlift.loading.checkpoint import Checkpoint
    from weightlift.loading.errors import WeightliftError
    from weightlift.loading.peers import LOADERS
    from weightlift.timings import bar_chart, timings_table

    if plot and importlib.util.find_spec("matplotlib") is None:
        raise _fail("a plot needs matplotlib: pip install 'weightlift[plot]'")
    try:
        Checkpoint.from_path(checkpoint).close()
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if where == torch.device("cuda"):  # some peers want to know which
            where = torch.device("cuda", torch.cuda.current_device())
    except (WeightliftError, RuntimeError) as error:
        raise _fail(str(error)) from error
    known = [name for name, item in LOADERS.items() if item.is_available(where)]
    unknown = sorted(set(loader or ()) - set(known))
    if unknown:
        raise _fail(f"no loader {', '.join(unknown)} on {where} here; there are {', '.join(known)}")
    target_dtype = getattr(torch, dtype, None) if dtype else None
    if dtype and not isinstance(target_dtype, torch.dtype):
        raise _fail(f"torch has no dtype {dtype!r}")
    states = ["warm"] * warm + ["cold"] * cold
    if not states:
        raise _fail("--no-warm and --no-cold leave nothing to time")
    timings = _timed(checkpoint, where, loader or known, states, calls, target_dtype)
    if as_json:
        facts = [{**dataclasses.asdict(item), "median_s": item.median_s} for item in timings]
        out.print_json(json.dumps(facts))
    else:
        out.print(timings_table(timings))
        note = "speed-up is against safetensors, median against median"
        out.print(f"on {where}; {note}", highlight=False)
    if plot and any(item.is_equal for item in timings):
        bar_chart(timings, plot)
        err.print(f"chart written to {plot}")
    if any(item.is_equal is False for item in timings if not item.problem):
        raise _fail("a loader's tensors differ from the file's")
    if any(item.problem for item in timings if item.loader == "weightlift"):
        raise _fail("weightlift itself could not load this")


def _timed(
    checkpoint: Path, where: Any, loaders: list[str], states: list[str], *how: Any
) -> list[Any]:
    """Time these loaders, with a progress bar."""
    from weightlift.loading.benchmark import compare

    text, bar = TextColumn("{task.description}"), BarColumn()
    columns = (text, bar, MofNCompleteColumn(), TimeElapsedColumn())
    timings = []
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("Timing loaders", total=len(states) * (len(loaders) + 1))
        for timing in compare(checkpoint, where, loaders, states, *how):
            timings.append(timing)
            progress.advance(task)
    return timings


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(help="The command and its arguments, after --.")],
    num_load_threads: Annotated[str, typer.Option(help="As WEIGHTLIFT_NUM_LOAD_THREADS.")] = "",
    report: Annotated[str, typer.Option(help="As WEIGHTLIFT_REPORT.")] = "",
    config: Annotated[str, typer.Option(help="As WEIGHTLIFT_CONFIG.")] = "",
) -> None:
    """Run a command with weightlift in place: weightlift run -- python -m sglang.launch_server ...

    Checks that the start-up hook is installed, sets the environment, and becomes the command.
    """
    from weightlift.hooks.options import CONFIG_ENV, OptionError, settings
    from weightlift.hooks.status import hook_folder

    if hook_folder() is None:
        raise _fail(
            "the start-up hook is missing; install weightlift with pip here, then try again"
        )
    given = {
        "WEIGHTLIFT_NUM_LOAD_THREADS": num_load_threads,
        "WEIGHTLIFT_REPORT": report and os.path.abspath(report),
        CONFIG_ENV: config and os.path.abspath(config),
    }
    environ = {
        **os.environ,
        "WEIGHTLIFT": "1",
        **{key: text for key, text in given.items() if text},
    }
    try:
        settings(environ)
    except OptionError as error:
        raise _fail(str(error)) from error
    program = shutil.which(command[0])
    if program is None:
        raise _fail(f"there is no command {command[0]!r}")
    os.execve(program, command, environ)


if __name__ == "__main__":
    app()
