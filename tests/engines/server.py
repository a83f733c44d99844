"""The real SGLang HTTP server on a CPU: start it, ask it, stop it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from engines import environment
from engines.harness import free_port

START_SECONDS = 180
STOP_SECONDS = 10
IDLE_SECONDS = 2
"""Releases up to 0.5.9 assert on an update that the request before it has left the scheduler."""
LAUNCH = ("-m", "sglang.launch_server")
SERVE = ("-c", "from sglang.cli.main import main; main()", "serve")
"""What the console script ``sglang serve`` does, from 0.5.5."""
FLAGS = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch --host 127.0.0.1 "
    "--disable-radix-cache --disable-overlap-schedule --skip-server-warmup "
    "--max-total-tokens 2048 --mem-fraction-static 0.3 --max-running-requests 4"
).split()
PROMPT = {
    "input_ids": [10, 20, 30, 40],
    "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
}


class Server:
    """A server, from start to stop. A context manager.

    Args:
        version: The SGLang release.
        model: Folder of the checkpoint.
        log: File for what it prints.
        flags: More of its command line.
        environ: More of its environment.
        command: How it is started.
    """

    def __init__(
        self,
        version: str,
        model: Path,
        log: Path,
        *,
        flags: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        command: Sequence[str] = LAUNCH,
    ) -> None:
        self._log = log
        self._port = free_port()
        port = ("--port", str(self._port))
        self._command = [
            sys.executable,
            *command,
            "--model-path",
            str(model),
            *FLAGS,
            *port,
            *flags,
        ]
        self._environ = {**environment.sglang_environ(version), **(environ or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self.start_s = 0.0

    def __enter__(self) -> Server:
        started = time.monotonic()
        with self._log.open("wb") as file:
            self._process = subprocess.Popen(
                self._command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,
                cwd=self._log.parent,
            )
        try:
            self._wait_until_up(self._process)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.monotonic() - started
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def tokens(self) -> list[int] | str:
        """What it generates, greedily, for a fixed prompt; releases before 0.5 give text alone."""
        answer = self.ask("generate", PROMPT)
        found: list[int] | str = answer.get("output_ids") or answer["text"]
        return found

    def update(self, model: Path) -> Any:
        """Have it load another checkpoint; its answer."""
        time.sleep(IDLE_SECONDS)
        return self.ask("update_weights_from_disk", {"model_path": str(model)})

    def ask(self, route: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer of a route."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/{route}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def stop(self) -> None:
        """End the server and every process that it started."""
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(STOP_SECONDS)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self._process.wait()

    def log(self) -> str:
        """What it printed so far."""
        return self._log.read_text(errors="replace")

    def _wait_until_up(self, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if process.poll() is not None:
                break
            try:
                self.ask("get_model_info")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        raise RuntimeError(f"the server did not start:\n{self.log()[-4000:]}")
