"""Reader threads: they take windows off a bounded queue and place them on one device."""

from __future__ import annotations

import queue
import threading
from typing import Final

import torch

from weightlift.loading.placement import make_placer, staging_bytes
from weightlift.loading.plan import Window
from weightlift.loading.settings import MIB, Settings

WINDOWS_AHEAD: Final = 4096
"""Windows planned and not yet read. A window in the queue holds no data, only references."""


class ReaderPool:
    """The reader threads of one load, for one device.

    Args:
        device: Where the windows go: the CPU or a CUDA device.
        settings: How many threads, within how much staging memory.
    """

    def __init__(self, device: torch.device, settings: Settings) -> None:
        affordable = settings.staging_mib * MIB // staging_bytes(device)
        self.threads = max(1, min(settings.threads(), affordable))
        self._device = device
        self._queue: queue.Queue[Window | None] = queue.Queue(WINDOWS_AHEAD)
        self._changed = threading.Condition()
        self._under_way = 0
        self._failure: BaseException | None = None
        self._workers = [
            threading.Thread(target=self._work, name=f"weightlift-reader-{number}", daemon=True)
            for number in range(self.threads)
        ]
        for worker in self._workers:
            worker.start()

    def submit(self, window: Window) -> None:
        """Queue a window; waits while too many are ahead of the readers.

        Raises:
            CheckpointError: A window before this one could not be read.
        """
        self.check()
        if self._device.type == "cuda":
            # What the planner's stream still does to the targets (zero-fills) comes first.
            window.ready = torch.cuda.current_stream(self._device).record_event()
        with self._changed:
            self._under_way += 1
        self._queue.put(window)

    def drain(self) -> None:
        """Return once every window is in place.

        Raises:
            CheckpointError: One of them could not be read.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._under_way == 0)
        self.check()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def check(self) -> None:
        """Raise what stopped a reader, if anything did."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Drop what is queued, end the threads and wait for them."""
        if self._failure is None:
            self._failure = RuntimeError("this load is closed")
        for _ in self._workers:
            self._queue.put(None)
        for worker in self._workers:
            worker.join()

    def _work(self) -> None:
        placer = None
        while (window := self._queue.get()) is not None:
            try:
                if self._failure is None:
                    with torch.inference_mode():
                        placer = placer or make_placer(self._device, self.threads)
                        placer.place(window)
            except BaseException as error:  # handed to the thread that waits for the load
                self._failure = error
            finally:
                self._one_less()
        if placer is not None:
            placer.close()

    def _one_less(self) -> None:
        with self._changed:
            self._under_way -= 1
            if not self._under_way:
                self._changed.notify_all()
