"""How the processes of one server tell each other what the engine has no message for.

A folder of small files, made by the process that starts the others, named to them by environment:
what to stage, how far each rank is, and whether the server is broken. Files are replaced whole.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ENV = "WEIGHTLIFT_CONTROL"


@dataclass(frozen=True)
class Staged:
    """How far a rank is with staging.

    Attributes:
        rank: The rank.
        request: The number of the request that this answers; 0 before any.
        path: The checkpoint.
        nbytes: Bytes that are staged.
        seconds: What that took.
        error: Why it could not be done, or ''.
    """

    rank: int
    request: int = 0
    path: str = ""
    nbytes: int = 0
    seconds: float = 0.0
    error: str = ""


class Control:
    """The folder of one server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._asking = threading.Lock()  # several requests may come at once

    @classmethod
    def make(cls) -> Control:
        """A new folder, readable to this user alone; it goes with this process."""
        control = cls(Path(tempfile.mkdtemp(prefix="weightlift-")))
        process = os.getpid()

        def remove() -> None:
            if os.getpid() == process:
                shutil.rmtree(control.folder, ignore_errors=True)

        atexit.register(remove)
        return control

    @classmethod
    def inherited(cls) -> Control | None:
        """That of the server which this process belongs to, if it has one."""
        folder = os.environ.get(ENV)
        return cls(Path(folder)) if folder and os.path.isdir(folder) else None

    def ask_to_stage(self, path: str) -> int:
        """Have every rank stage a checkpoint; the number of this request."""
        with self._asking:
            number = (self.request() or (0, ""))[0] + 1
            self._write("request", {"number": number, "path": path})
        return number

    def request(self) -> tuple[int, str] | None:
        """The last request to stage: its number and the checkpoint."""
        found = self._read("request")
        return (found["number"], found["path"]) if found else None

    def answer(self, staged: Staged) -> None:
        """Tell how far this rank is."""
        self._write(f"rank-{staged.rank}-{os.getpid()}", asdict(staged))

    def answers(self) -> list[Staged]:
        """How far the ranks are that can stage."""
        found = (self._read(file.name) for file in self.folder.glob("rank-*"))
        return sorted((Staged(**told) for told in found if told), key=lambda told: told.rank)

    def wait_for(self, request: int, seconds: float) -> list[Staged]:
        """The answers to a request once every rank gave its own, or when time is up."""
        until = time.monotonic() + seconds
        while any(told.request < request for told in self.answers()) and time.monotonic() < until:
            time.sleep(_LOOK_AGAIN_SECONDS)
        return self.answers()

    def mark_broken(self, model: int, why: str) -> None:
        """This process's model of that number holds parts of two checkpoints."""
        self._write(f"broken-{os.getpid()}-{model}", {"why": why})

    def mark_whole(self, model: int) -> None:
        """It holds one checkpoint again."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / f"broken-{os.getpid()}-{model}").unlink()

    def broken(self) -> str:
        """Why this server must not be used, or ''; whichever of its models is to blame."""
        found = (self._read(file.name) for file in self.folder.glob("broken-*"))
        return next((str(told["why"]) for told in found if told), "")

    def _write(self, name: str, content: dict[str, Any]) -> None:
        draft = self.folder / f".{name}-{os.getpid()}"
        draft.write_text(json.dumps(content))
        draft.replace(self.folder / name)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.folder / name).read_bytes())
        except FileNotFoundError:
            return None
        return found


_LOOK_AGAIN_SECONDS = 0.02
_mine: Control | None = None


def server_control() -> Control:
    """The folder of the server that this process starts."""
    global _mine
    _mine = _mine or Control.make()
    return _mine
