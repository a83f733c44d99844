"""Readers: they take windows and put them in place on one device."""

from __future__ import annotations

import abc
import queue
import threading
from collections import Counter
from typing import Final

import torch

from weightlift.loading.placement import HostPlacer
from weightlift.loading.plan import Window
from weightlift.loading.threads import start_thread

WINDOWS_AHEAD: Final = 4096
"""Windows planned and not yet placed. A window in the queue holds no data, only references."""


class ReaderPool(abc.ABC):
    """Readers for one device, of one load or of several that follow each other. Fed by one thread at a
    time: the one that plans, which may do some of the work.

    Args:
        device: Where the windows go: the CPU or a CUDA device.
        readers: How many.

    Attributes:
        readers: How many.
    """

    def __init__(self, device: torch.device, readers: int) -> None:
        self.readers = readers
        self._device = device
        self._placed: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._under_way: Counter[object] = Counter()
        self._left: set[object] = set()
        self._failure: BaseException | None = None
        self._workers: list[threading.Thread] = []
        self._knows_places = False  # whether a window that is finished is in place for certain
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._index = device.index or 0
        if device.type == "cuda" and device.index is None:
            self._index = torch.cuda.current_device()

    def start(self, threads: int, name: str) -> None:
        """Start threads that :meth:`work`."""
        try:
            for number in range(threads):
                self._workers.append(start_thread(self.work, f"{name}-{number}"))
        except BaseException:
            self.close()
            raise

    @abc.abstractmethod
    def work(self) -> None:
        """What each thread does until :meth:`end`."""

    @abc.abstractmethod
    def hand_on(self, window: Window) -> None:
        """Have a window read, and then :meth:`finish` it."""

    @abc.abstractmethod
    def end(self) -> None:
        """Have the threads drop the windows that wait, and end."""

    def submit(self, window: Window, load: object = None) -> None:
        """Hand on a window of a load; waits while too many are ahead of the readers.

        Raises:
            CheckpointError: A window before this one could not be read.
        """
        window.load = load
        if not self.offer(window):
            self._check()

    def offer(self, window: Window) -> bool:
        """Hand on a window as :meth:`submit` does; False if one before it could not be read."""
        if self._failure is not None:
            return False
        if window.ready is None:
            window.ready = self.work_before()
        if self._under_way.total() >= WINDOWS_AHEAD:
            self._await_one()
        self._under_way[window.load] += 1
        self.hand_on(window)
        return True

    def work_before(self) -> torch.Event | None:
        """What this thread's stream still does to targets (zero-fills), and must come first."""
        if self._device.type == "cpu":
            return None
        # By number: to make an object of a stream takes 15 us, and models have thousands of windows.
        number, index, kind = torch._C._cuda_getCurrentStream(self._index)
        stream = self._streams.get(number)
        if stream is None:
            stream = torch.cuda.Stream(stream_id=number, device_index=index, device_type=kind)
            self._streams[number] = stream
        return None if stream.query() else stream.record_event()

    @property
    def failure(self) -> BaseException | None:
        """Why a window could not be read; those after it are not."""
        return self._failure

    def drain(self, load: object = None) -> None:
        """Return once every window of a load is in place; None: of those that are of none.

        Raises:
            CheckpointError: One of them, or of another load, could not be read.
        """
        self.wait(load)
        self._check()
        if self._device.type == "cuda" and (load is None or not self._knows_places):
            torch.cuda.synchronize(self._device)  # would wait for other loads' windows, too

    def wait(self, load: object = None) -> None:
        """Return once nothing of a load is under way, whatever became of it."""
        while self._under_way[load]:
            self._await_one()

    def leave(self, load: object) -> None:
        """Drop what waits of a load that ends, and return once nothing of it is under way."""
        self._left.add(load)
        self.wait(load)
        self._left.discard(load)
        if self._device.type == "cuda" and not self._knows_places:
            torch.cuda.synchronize(self._device)  # copies may be on their way

    def close(self) -> None:
        """Drop what waits, end the threads and wait for them."""
        self._failure = self._failure or RuntimeError("this load is closed")
        self.end()
        for worker in self._workers:
            worker.join()

    def fail(self, error: BaseException) -> None:
        """Note why windows are not read from now on."""
        self._failure = self._failure or error

    def finish(self, window: Window) -> None:
        """Note that a window is in place, or never will be."""
        if window.issued is not None:
            window.issued(None)
        self._placed.put(window.load)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _await_one(self) -> None:
        load = self._placed.get()
        self._under_way[load] -= 1
        if not self._under_way[load]:
            del self._under_way[load]  # it may have ended


class HostReaders(ReaderPool):
    """Threads that read straight into targets on the CPU."""

    def __init__(self, device: torch.device, readers: int) -> None:
        super().__init__(device, readers)
        self._waiting: queue.SimpleQueue[Window | None] = queue.SimpleQueue()
        self.start(readers, "reader")

    def hand_on(self, window: Window) -> None:
        """For whichever thread is free."""
        self._waiting.put(window)

    def end(self) -> None:
        """One None for each."""
        for _ in self._workers:
            self._waiting.put(None)

    def work(self) -> None:
        """Take windows until there comes None."""
        placer = HostPlacer()
        with torch.inference_mode():
            while (window := self._waiting.get()) is not None:
                try:
                    if self._failure is None and window.load not in self._left:
                        placer.place(window)
                except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
                    self.fail(error)
                self.finish(window)
                del window  # and with it what it filled
