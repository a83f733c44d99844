"""Readers by device, for loads of which the next begins before one has ended."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import torch

from weightlift.loading.reader import ReaderPool
from weightlift.loading.readers import open_readers
from weightlift.loading.settings import Settings


class Pools:
    """The readers that loads have in common. A context manager; leaving it ends them.

    Args:
        settings: Threads and memory.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pools: dict[torch.device, ReaderPool] = {}
        self._lock = threading.Lock()

    def of(self, device: torch.device) -> ReaderPool:
        """Readers for a device that can read: others than those that could not."""
        with self._lock:
            found = self._pools.get(device)
            if found is not None and found.failure is not None:
                found.close()
                found = None
            if found is None:
                found = self._pools[device] = open_readers(device, self._settings)
            return found

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as closing:
            for pool in self._pools.values():
                closing.callback(pool.close)
