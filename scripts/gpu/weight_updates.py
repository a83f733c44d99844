"""Weight updates of the real SGLang server on this GPU: stock and weightlift, tokens and seconds.

weight_updates.py OUT dense FIRST SECOND     two checkpoints of Qwen3-8B's shape, CUDA graphs captured
weight_updates.py OUT moe CHECKPOINT         one of Qwen3-30B-A3B's shape, updated from itself

Prints a table and writes OUT/updates-KIND.json. Needs SGLang and weightlift in this Python's path.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch import FLAGS, PROMPT, ask, wait_until_up

GRAPHS = ["--cuda-graph-max-bs", "2"]
ALTERNATIONS = 20
STAGE_GIB = "20"


@contextmanager
def server(
    model: str, logs: Path, name: str, flags: Sequence[str], *, weightlift: bool
) -> Iterator[Path]:
    """A running server; yields the file of weightlift's reports."""
    log, report = logs / f"{name}.log", logs / f"{name}.jsonl"
    report.touch()
    environ = dict(os.environ, WEIGHTLIFT=str(int(weightlift)), WEIGHTLIFT_REPORT=str(report))
    base = [flag for flag in FLAGS if flag != "--disable-cuda-graph"]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, *base, *flags]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environ, start_new_session=True
        )
    try:
        wait_until_up(process, log)
        yield report
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tokens() -> list[int]:
    """What the server generates, greedily."""
    found: list[int] = ask("generate", PROMPT)["output_ids"]
    return found


def timed_generation() -> float:
    """Seconds for 256 tokens."""
    sampling = {**PROMPT["sampling_params"], "max_new_tokens": 256}
    started = time.perf_counter()
    ask("generate", {**PROMPT, "sampling_params": sampling})
    return time.perf_counter() - started


def update(path: str) -> float:
    """Seconds from request to answer."""
    started = time.perf_counter()
    answer = ask("update_weights_from_disk", {"model_path": path})
    seconds = time.perf_counter() - started
    assert answer["success"], answer
    return seconds


def reports(file: Path) -> list[dict[str, Any]]:
    """weightlift's reports, paths shortened."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    for load in found:
        load["model_path"] = Path(load["model_path"]).name
    return found


def show(name: str, seconds: list[float], loads: list[dict[str, Any]]) -> None:
    """One line, and one for each kind of plan."""
    print(f"{name:34s} {' '.join(f'{s:.3f}' for s in seconds[:6])} s", flush=True)
    for load in loads[:4]:
        print(
            f"    {load['phase']:6s} {load['plan'] or '-':6s} {load['seconds']:.3f} s, plan "
            f"{load['plan_seconds']:.3f} s, planned {load['planned']}, extrapolated "
            f"{load['extrapolated']}, replayed {load['replayed']}, staged "
            f"{load['bytes_staged'] / 1e9:.1f} GB {load['plan_note']}",
            flush=True,
        )


def dense(logs: Path, first: str, second: str) -> dict[str, Any]:
    """Alternating updates with CUDA graphs, plain and staged."""
    results: dict[str, Any] = {}
    with server(second, logs, "fresh", GRAPHS, weightlift=False):
        fresh = tokens()
    with server(first, logs, "stock", GRAPHS, weightlift=False):
        before = tokens()
        stock = [update(path) for path in (second, first) * 2]
        assert tokens() == before != fresh
    results["stock"] = {"updates_s": stock}
    show("stock, CUDA graphs", stock, [])
    for name, flags in (("weightlift", []), ("weightlift fast load", ["--enable-fast-load"])):
        with server(
            first, logs, name.replace(" ", "-"), [*GRAPHS, *flags], weightlift=True
        ) as file:
            assert tokens() == before
            seconds = []
            for number in range(ALTERNATIONS):
                seconds.append(update(first if number % 2 else second))
                assert tokens() == (before if number % 2 else fresh), f"update {number}"
            results[name] = {"updates_s": seconds, "reports": reports(file)}
        show(name, seconds, results[name]["reports"])
        print(f"    median of replays {statistics.median(seconds[1:]):.3f} s", flush=True)
    flags = [*GRAPHS, "--weight-stage-gib", STAGE_GIB]
    with server(first, logs, "staged", flags, weightlift=True) as file:
        seconds, staging = [], []
        quiet = [timed_generation() for _ in range(3)]
        busy = []
        for number in range(6):
            path = first if number % 2 else second
            ask("stage_weights", {"model_path": path, "wait": False})
            busy.append(timed_generation())
            staged = ask("stage_weights", {"model_path": path})
            assert staged["success"], staged
            staging.append(staged["ranks"][0]["seconds"])
            seconds.append(update(path))
            assert tokens() == (before if number % 2 else fresh), f"staged update {number}"
        results["staged"] = {"updates_s": seconds, "stage_s": staging, "reports": reports(file)}
    show("weightlift, staged before", seconds, results["staged"]["reports"])
    print(f"    staging {' '.join(f'{s:.2f}' for s in staging)} s, while generation goes on")
    print(
        f"    256 tokens take {statistics.median(quiet):.2f} s, and {statistics.median(busy):.2f} s "
        "(longest {:.2f} s) while a checkpoint is staged".format(max(busy)),
        flush=True,
    )
    results["staged"] |= {"generation_s": quiet, "generation_while_staging_s": busy}
    print("the tokens are those of a fresh stock server after every update")
    return results


def moe(logs: Path, model: str) -> dict[str, Any]:
    """Many tensors: what planning costs, and what fast load and replay save."""
    results: dict[str, Any] = {}
    flags = ["--disable-cuda-graph"]
    cases = {
        "stock": (False, []),
        "weightlift": (True, []),
        "weightlift fast load": (True, ["--enable-fast-load"]),
    }
    said: list[list[int]] = []
    for name, (ours, more) in cases.items():
        with server(
            model, logs, f"moe-{name}".replace(" ", "-"), [*flags, *more], weightlift=ours
        ) as file:
            said.append(tokens())
            seconds = [update(model) for _ in range(3 if ours else 2)]
            said.append(tokens())
            results[name] = {"updates_s": seconds, "reports": reports(file)}
        show(f"61 GB, {name}", seconds, results[name]["reports"])
    assert all(answer == said[0] for answer in said), said
    print("the tokens are the same in all launches, before and after updates")
    return results


def main() -> None:
    """Run, print, write."""
    out, kind, paths = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    out.mkdir(parents=True, exist_ok=True)
    logs = Path(tempfile.mkdtemp())
    try:
        results = dense(logs, *paths) if kind == "dense" else moe(logs, *paths)
    except BaseException:
        for log in sorted(logs.glob("*.log")):
            (out / log.name).write_text(log.read_text(errors="replace")[-20000:])
        raise
    (out / f"updates-{kind}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
