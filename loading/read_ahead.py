"""Brings files into the page cache while nobody else reads: what a load will need next."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from weightlift.loading.report import human
from weightlift.loading.residency import STRETCH, PageCache
from weightlift.loading.threads import start_thread

logger = logging.getLogger("weightlift")

CHUNK_BYTES = 8 << 20
"""What is read in one go: at 2 GB/s a load that begins meanwhile waits 4 ms for the disk."""

_PAUSE_SECONDS = 0.002


class ReadAhead:
    """A thread that reads files in order, as long as nobody is busy. A context manager.

    Args:
        is_busy: Whether somebody reads who must not be held up.
        most: Bytes to read at most; None for any number.

    Attributes:
        bytes_read: What was brought into the page cache; what was there already does not count.
    """

    def __init__(self, is_busy: Callable[[], bool], most: int | None = None) -> None:
        self.bytes_read = 0
        self._is_busy = is_busy
        self._most = most
        self._files: deque[Path] = deque()
        self._dropped: set[str] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_at_work = False

    def add(self, files: Iterable[Path]) -> None:
        """Read these after what was added before. Those that cannot be read are passed over."""
        with self._lock:
            self._files.extend(files)
            if self._is_at_work or not self._files:
                return
            try:
                self._thread = start_thread(self._work, "read-ahead")
                self._is_at_work = True
            except OSError as error:
                logger.debug("weightlift: nothing is read ahead: %s", error)

    def drop(self, files: Iterable[str]) -> None:
        """Read no more of these: somebody else does now."""
        self._dropped.update(os.path.realpath(file) for file in files)

    def end(self) -> None:
        """Read no more; returns when the thread has ended."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        if self.bytes_read:
            read = human(self.bytes_read)
            logger.info("weightlift: %s were read ahead while components were built", read)

    def _work(self) -> None:
        buffer = bytearray(CHUNK_BYTES)
        while (path := self._next()) is not None:
            try:
                self._read(path, buffer)
            except OSError as error:  # the load that needs the file will tell
                logger.debug("weightlift: %s is not read ahead: %s", path, error)

    def _next(self) -> Path | None:
        """The next file; after the last one whoever adds more starts another thread."""
        with self._lock:
            if self._files and not self._ended.is_set():
                return self._files.popleft()
            self._is_at_work = False
            return None

    def _read(self, path: Path, buffer: bytearray) -> None:
        name = os.path.realpath(path)
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if not size:
                return
            cache = PageCache(descriptor, size)
            try:
                for start in range(0, size, STRETCH):
                    stop = min(start + STRETCH, size)
                    if cache.is_cold(start, stop) and not self._bring(
                        descriptor, name, start, stop, buffer
                    ):
                        return
            finally:
                cache.close()
        finally:
            os.close(descriptor)

    def _bring(self, descriptor: int, name: str, start: int, stop: int, buffer: bytearray) -> bool:
        """Read these bytes of a file; False if it is not to be read on."""
        for offset in range(start, stop, CHUNK_BYTES):
            while self._is_busy() and not self._ended.is_set():
                time.sleep(_PAUSE_SECONDS)
            has_room = self._most is None or self.bytes_read < self._most
            if self._ended.is_set() or name in self._dropped or not has_room:
                return False
            self.bytes_read += os.preadv(descriptor, [buffer], offset)
        return True


def shards_in(folder: Path) -> list[Path]:
    """The safetensors files of a component that are there, in the order of their names."""
    return [file for file in sorted(folder.glob("*.safetensors")) if file.exists()]
