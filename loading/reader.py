"""Reader threads: they take windows off a queue and place them on one device.

What runs once a window holds the GIL for microseconds: at 8 MiB a window, PCIe 5 takes one every
150 us. So the queues are the C ones, and a CUDA event is made only where there is work to wait for.
"""

from __future__ import annotations

import queue
import threading
from typing import Final

import torch

from weightlift.loading.budget import reader_threads, staging_limit
from weightlift.loading.placement import Placer, make_placer, staging_bytes
from weightlift.loading.plan import Window
from weightlift.loading.settings import MIB, Settings
from weightlift.loading.staging import pinned_ring

WINDOWS_AHEAD: Final = 4096
"""Windows planned and not yet placed. A window in the queue holds no data, only references."""


def affordable_threads(device: torch.device, settings: Settings) -> int:
    """Readers for this device, within the staging memory and what the host allows."""
    memory = settings.staging_mib * MIB
    if "staging_mib" not in settings.asked:
        memory = min(memory, staging_limit() or memory)
    threads = settings.num_load_threads or reader_threads()
    return max(1, min(threads, memory // staging_bytes(device)))


def warm_up(device: torch.device, settings: Settings) -> None:
    """Begin to pin what a load to this device will need, while there is no load yet.

    Pinning 192 MiB takes 40 ms; an engine takes longer to construct a model.
    """
    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index

    def pin() -> None:
        torch.cuda.set_device(index)
        pinned_ring().fill(affordable_threads(device, settings), staging_bytes(device))

    threading.Thread(target=pin, name="weightlift-warm-up", daemon=True).start()


class ReaderPool:
    """The reader threads of one load, for one device. Fed by one thread at a time: its plan's.

    Args:
        device: Where the windows go: the CPU or a CUDA device.
        settings: How many threads, within how much staging memory.
    """

    def __init__(self, device: torch.device, settings: Settings) -> None:
        self.threads = affordable_threads(device, settings)
        self._device = device
        self._waiting: queue.SimpleQueue[Window | None] = queue.SimpleQueue()
        self._placed: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._under_way = 0
        self._failure: BaseException | None = None
        if device.type == "cuda":
            pinned_ring().reserve(self.threads)
        self._workers: list[threading.Thread] = []
        try:
            for number in range(self.threads):
                name = f"weightlift-reader-{number}"
                worker = threading.Thread(target=self._work, name=name, daemon=True)
                worker.start()
                self._workers.append(worker)
        except BaseException:
            self.close()
            raise

    def submit(self, window: Window) -> None:
        """Queue a window; waits while too many are ahead of the readers.

        Raises:
            CheckpointError: A window before this one could not be read.
        """
        if not self.offer(window):
            self._check()

    def offer(self, window: Window) -> bool:
        """Queue a window as :meth:`submit` does; False if one before it could not be read."""
        if self._failure is not None:
            return False
        if window.ready is None:
            window.ready = self.work_before()
        if self._under_way == WINDOWS_AHEAD:
            self._await_one()
        self._under_way += 1
        self._waiting.put(window)
        return True

    def work_before(self) -> torch.Event | None:
        """What this thread's stream still does to targets (zero-fills), and must come first."""
        if self._device.type == "cpu":
            return None
        stream = torch.cuda.current_stream(self._device)
        return None if stream.query() else stream.record_event()

    @property
    def failure(self) -> BaseException | None:
        """Why a window could not be read; those after it are not."""
        return self._failure

    def drain(self) -> None:
        """Return once every window is in place.

        Raises:
            CheckpointError: One of them could not be read.
        """
        self.wait()
        self._check()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def wait(self) -> None:
        """Return once nothing is under way, whatever became of it."""
        while self._under_way:
            self._await_one()

    def close(self) -> None:
        """Drop what is queued, end the threads and wait for them."""
        self._failure = self._failure or RuntimeError("this load is closed")
        for _ in self._workers:
            self._waiting.put(None)
        for worker in self._workers:
            worker.join()
        if self._device.type == "cuda":
            pinned_ring().reserve(-self.threads)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _await_one(self) -> None:
        self._placed.get()
        self._under_way -= 1

    def _work(self) -> None:
        placer: Placer | None = None
        with torch.inference_mode():
            while (window := self._waiting.get()) is not None:
                issued = None
                try:
                    if self._failure is None:
                        placer = placer or make_placer(self._device)
                        placer.place(window)
                        issued = placer.event() if window.issued else None
                except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for the load
                    self._failure = error
                if window.issued is not None:
                    window.issued(issued)
                self._placed.put(None)
            if placer is not None:
                placer.close()
