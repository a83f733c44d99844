"""The real SGLang server on this GPU, stock and with weightlift in turn: load times and tokens.

launch.py CHECKPOINT OUT [LAUNCHES [FLAG ...]]    more flags for the server, such as --tp-size 2

Prints a table and writes OUT/launch.json. Needs SGLang and weightlift in this Python's path. The
first launch, a stock one, compiles kernels; it counts if there are fewer than three.
"""

from __future__ import annotations

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
START_SECONDS = 150
UPDATES = 3


def ask(route: str, body: dict[str, Any] | None = None) -> Any:
    """The server's JSON answer."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(
        f"{URL}/{route}", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
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
    raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")


def run(model: str, logs: Path, *, weightlift: bool, name: str) -> dict[str, Any]:
    """One launch: what its log and its answers tell."""
    log, report = logs / f"{name}.log", logs / f"{name}.jsonl"
    environ = dict(os.environ, WEIGHTLIFT=str(int(weightlift)), WEIGHTLIFT_REPORT=str(report))
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, *FLAGS]
    command += sys.argv[4:]
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=file, env=environ, start_new_session=True
        )
    try:
        wait_until_up(server, log)
        before = ask("generate", PROMPT)["output_ids"]
        updates = []
        for _ in range(UPDATES):
            started = time.perf_counter()
            answer = ask("update_weights_from_disk", {"model_path": model})
            updates.append(time.perf_counter() - started)
            assert answer["success"], answer
        after = ask("generate", PROMPT)["output_ids"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    elapsed = re.findall(r"Load weight end\. elapsed=([\d.]+)", log.read_text())
    loads = [json.loads(line) for line in report.read_text().splitlines()] if weightlift else []
    for load in loads:
        load["model_path"] = Path(load["model_path"]).name
    return {
        "name": name,
        "weightlift": weightlift,
        "load_weight_s": max(map(float, elapsed), default=None),
        "updates_s": updates,
        "reports": loads,
        "tokens": before,
        "tokens_after_update": after,
    }


def main() -> None:
    """Run, print, write."""
    model, out = sys.argv[1], Path(sys.argv[2])
    launches = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    out.mkdir(parents=True, exist_ok=True)
    logs = Path(tempfile.mkdtemp())
    results = []
    for number in range(launches):
        name = f"launch-{number}"
        result = run(model, logs, weightlift=number % 2 == 1, name=name)
        results.append(result)
        inner = [f"{load['seconds']:.3f}" for load in result["reports"]]
        print(
            f"{name:9s} {'weightlift' if result['weightlift'] else 'stock':10s} "
            f"Load weight {result['load_weight_s']} s, updates "
            f"{' '.join(f'{seconds:.3f}' for seconds in result['updates_s'])} s, "
            f"inside {' '.join(inner)}",
            flush=True,
        )
        (out / "launch.json").write_text(json.dumps(results, indent=1))
    assert len({str(result["tokens"]) for result in results}) == 1, "the tokens differ"
    assert all(result["tokens"] == result["tokens_after_update"] for result in results)
    timed = results[1:] if launches > 2 else results
    for kind in ("stock", "weightlift"):
        mine = [result for result in timed if result["weightlift"] == (kind == "weightlift")]
        launch = statistics.median(result["load_weight_s"] for result in mine)
        update = statistics.median(second for result in mine for second in result["updates_s"])
        print(f"{kind:10s} median: Load weight {launch:.2f} s, update {update:.3f} s")
    print("the tokens are the same in all launches, before and after updates")


if __name__ == "__main__":
    main()
