"""The real SGLang server on this GPU, stock, with weightlift and with peers in turn: load times, tokens.

launch.py CHECKPOINT OUT [--rounds N] [--ways WAY ...] [FLAG ...]

A way is stock, weightlift, exchange (weightlift, ranks share the reading) or what --load-format
takes, such as fastsafetensors. Other flags go to the server (--tp-size 2).

Prints a table and writes OUT/launch.json. Needs SGLang and weightlift in this Python's path. A
stock launch that compiles kernels comes first and does not count. A way that fails is not tried again;
the others go on. One that launches and cannot update has what its launch took in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

URL = "http://127.0.0.1:30000"
PROMPT: dict[str, Any] = {
    "input_ids": [1, 2, 3, 4, 5],
    "sampling_params": {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True},
}
FLAGS = (
    "--skip-tokenizer-init --attention-backend triton --sampling-backend pytorch "
    "--grammar-backend none --disable-radix-cache --disable-cuda-graph --mem-fraction-static 0.6 "
    "--port 30000"
).split()
OURS = ("weightlift", "exchange")
EXTRA = {"fastsafetensors": {"enable_gds": False}}
"""What ways need besides: direct storage, where the host has none, ends the server."""
START_SECONDS = 240
"""A first launch, which compiles kernels, took 188 s on a slow host."""
UPDATES = 3


def ask(route: str, body: dict[str, Any] | None = None) -> Any:
    """The server's JSON answer."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(
        f"{URL}/{route}", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=180) as answer:
        return json.loads(answer.read() or b"null")


def wait_until_up(server: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the server answers."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and server.poll() is None:
        try:
            ask("get_model_info")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")


def run(model: str, logs: Path, way: str, name: str, flags: list[str]) -> dict[str, Any]:
    """One launch: what its log and its answers tell."""
    log, report = logs / f"{name}.log", logs / f"{name}.jsonl"
    is_ours = way in OURS
    environ = dict(os.environ, WEIGHTLIFT=str(int(is_ours)), WEIGHTLIFT_REPORT=str(report))
    environ["WEIGHTLIFT_EXCHANGE"] = "auto" if way == "exchange" else "off"
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, *FLAGS, *flags]
    command += [] if is_ours or way == "stock" else ["--load-format", way]
    if way in EXTRA:
        command += ["--model-loader-extra-config", json.dumps(EXTRA[way])]
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=file, env=environ, start_new_session=True
        )
    try:
        wait_until_up(server, log)
        before = after = ask("generate", PROMPT)["output_ids"]
        updates, problem = [], ""
        try:
            for _ in range(UPDATES):
                updates.append(update(model))
            after = ask("generate", PROMPT)["output_ids"]
        except OSError as error:
            problem = f"{error}: {told_by(error) or log.read_text()[-2000:]}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    elapsed = re.findall(r"Load weight end\. elapsed=([\d.]+)", log.read_text())
    loads = [json.loads(line) for line in report.read_text().splitlines()] if is_ours else []
    for load in loads:
        load["model_path"] = Path(load["model_path"]).name
    return {
        "name": name,
        "way": way,
        "load_weight_s": max(map(float, elapsed), default=None),
        "updates_s": updates,
        "problem": problem,
        "reports": loads,
        "tokens": before,
        "tokens_after_update": after,
    }


def update(model: str) -> float:
    """Seconds of an update from request to answer."""
    started = time.perf_counter()
    answer = ask("update_weights_from_disk", {"model_path": model})
    assert answer["success"], answer
    return time.perf_counter() - started


def told_by(error: OSError) -> str:
    """What the server says of an error of its own."""
    return error.read().decode()[:500] if isinstance(error, urllib.error.HTTPError) else ""


def line_of(result: dict[str, Any]) -> str:
    """What a launch took, in one line."""
    inner = [f"{load['seconds']:.3f}" for load in result["reports"]]
    updates = " ".join(f"{seconds:.3f}" for seconds in result["updates_s"])
    return (
        f"{result['name']:10s} {result['way']:15s} Load weight {result['load_weight_s']} s, "
        f"updates {updates} s, inside {' '.join(inner)} {result['problem']}"
    )


def medians_of(way: str, results: list[dict[str, Any]]) -> str:
    """The medians of the launches of a way, in one line."""
    mine = [result for result in results if result["way"] == way]
    launch = statistics.median(result["load_weight_s"] for result in mine)
    seconds = [second for result in mine for second in result["updates_s"]]
    told = f"{statistics.median(seconds):.3f} s" if seconds else "none"
    return f"{way:15s} median: Load weight {launch:.2f} s, update {told}"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=["stock", "weightlift"])
    given, flags = parser.parse_known_args()
    given.out.mkdir(parents=True, exist_ok=True)
    logs = Path(tempfile.mkdtemp())
    results, failed = [], set()
    for number, way in enumerate(["stock", *given.ways * given.rounds]):
        if way in failed:
            continue
        try:
            results.append(run(given.model, logs, way, f"launch-{number}", flags))
        except (RuntimeError, AssertionError, OSError) as error:
            if not results:
                raise
            failed.add(way)
            print(f"{way} failed: {error}", flush=True)
            continue
        print(line_of(results[-1]), flush=True)
        if results[-1]["problem"]:
            failed.add(way)
        (given.out / "launch.json").write_text(json.dumps(results, indent=1))
    assert len({str(result["tokens"]) for result in results}) == 1, "the tokens differ"
    assert all(result["tokens"] == result["tokens_after_update"] for result in results)
    for way in dict.fromkeys(result["way"] for result in results[1:]):
        print(medians_of(way, results[1:]))
    print("the tokens are the same in all launches, before and after updates")
    if failed:
        raise SystemExit(f"failed: {', '.join(sorted(failed))}")


if __name__ == "__main__":
    main()
