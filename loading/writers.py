"""From a crew's memory to the targets: the device waits for the readers by itself, or a thread does."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import queue
import time
from collections.abc import Callable

import torch

from weightlift.loading.batch import batch_copy
from weightlift.loading.crew import Crew
from weightlift.loading.stream_words import StreamWords, stream_words
from weightlift.loading.threads import start_thread
from weightlift.loading.words import LINE
from weightlift.loading.writer import CopyList, Issued, Writer

logger = logging.getLogger("weightlift")

STREAMS = 2
"""Windows go by turns: while a copy ends on one stream, the next begins on the other."""

_NAP = 5e-5


class CudaWriter:
    """Streams of the device that wait for the readers themselves.

    Args:
        device: A CUDA device.
        crew: The readers, with pinned memory.
        words: The driver's functions.

    Raises:
        RuntimeError: The device cannot wait for words of this memory.
    """

    def __init__(self, device: torch.device, crew: Crew, words: StreamWords) -> None:
        self._words = words
        self._device = device
        self._slots = crew.spec.slots
        first = words.address(crew.ring.memory.data_ptr())
        self._read, self._free = (first + place for place in crew.words.places)
        self._streams = [torch.cuda.Stream(device) for _ in range(STREAMS)]
        self._handles = [stream.cuda_stream for stream in self._streams]
        self._turn = 0
        words.wait(self._handles[0], self._read, 1, 0)

    def begin(self, ready: torch.Event | None) -> None:
        """The next stream's turn."""
        self._turn = (self._turn + 1) % STREAMS
        if ready is not None:
            self._streams[self._turn].wait_event(ready)

    def await_read(self, window: int, parts: int) -> None:
        """The stream waits."""
        line = self._read + window % self._slots * LINE * 4
        self._words.wait(self._handles[self._turn], line, parts, window)

    def write(self, copies: CopyList) -> None:
        """Start these copies."""
        if len(copies.sizes) == 1:
            where = copies.targets[0], copies.sources[0], copies.sizes[0]
            self._words.copy(self._handles[self._turn], *where)
        else:
            batch_copy()(copies.targets, copies.sources, copies.sizes, self._streams[self._turn])

    def run(self, work: Callable[[], object]) -> None:
        """Start this."""
        stream = self._streams[self._turn]
        before = torch._C._cuda_getCurrentStream(stream.device_index)
        # What ``torch.cuda.stream`` does for a stream of the current device, in a tenth of the time
        torch._C._cuda_setStream(stream.stream_id, stream.device_index, stream.device_type)
        try:
            with torch.inference_mode():
                work()
        finally:
            torch._C._cuda_setStream(*before)

    def fetch(self, data: torch.Tensor) -> torch.Tensor:
        """Memory of its own, and a copy into it that is started; some 10 us, where ``to`` takes 30."""
        fetched = torch.empty_like(data, device=self._device)
        where = fetched.data_ptr(), data.data_ptr(), data.numel()
        self._words.copy(self._handles[self._turn], *where)
        return fetched

    def free(self, window: int) -> None:
        """The stream writes the word."""
        address = self._free + window % self._slots * LINE * 4
        self._words.write(self._handles[self._turn], address, window)

    def tell(self, issued: Issued) -> None:
        """Give an event."""
        event = torch.cuda.Event()
        event.record(self._streams[self._turn])
        issued(event)

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Return once the streams are done."""
        while not all(stream.query() for stream in self._streams):
            meanwhile()
            time.sleep(_NAP)


class ThreadWriter:
    """A thread that waits in the device's place: for the CPU, and where streams cannot wait.

    Args:
        device: Where the targets are.
        crew: The readers.
        failed: Gets what goes wrong in the thread, which goes on.
    """

    def __init__(
        self, device: torch.device, crew: Crew, failed: Callable[[BaseException], None]
    ) -> None:
        self._crew = crew
        self._device = device
        self._failed = failed
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = start_thread(self._go, "writer")

    def begin(self, ready: torch.Event | None) -> None:
        """Wait for it."""
        if ready is not None:
            self._work.put(ready.synchronize)

    def await_read(self, window: int, parts: int) -> None:
        """Look at the words until they say so."""
        words = self._crew.words
        line = window % words.slots * LINE

        def look() -> None:
            while any(words.read[line + part] < window for part in range(parts)):
                time.sleep(_NAP)

        self._work.put(look)

    def write(self, copies: CopyList) -> None:
        """Make these copies, on the host one by one."""

        def copy() -> None:
            if self._stream is not None:
                batch_copy()(copies.targets, copies.sources, copies.sizes, self._stream)
                return
            for each in zip(copies.targets, copies.sources, copies.sizes, strict=True):
                ctypes.memmove(*each)

        self._work.put(copy)

    def run(self, work: Callable[[], object]) -> None:
        """Do this."""
        self._work.put(work)

    def fetch(self, data: torch.Tensor) -> torch.Tensor:
        """As they are where the device is the host."""
        return data.to(self._device, non_blocking=True)

    def free(self, window: int) -> None:
        """Write the word."""

        def write() -> None:
            self._synchronize()
            self._crew.words.free[window % self._crew.words.slots * LINE] = window

        self._work.put(write)

    def tell(self, issued: Issued) -> None:
        """Call it when all is written."""

        def call() -> None:
            try:
                self._synchronize()
            finally:
                issued(None)

        self._work.put(call)

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """End the thread."""
        self._work.put(None)
        while self._thread.is_alive():
            meanwhile()
            self._thread.join(_NAP)

    def _synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _go(self) -> None:
        where = torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()
        with torch.inference_mode(), where:
            while (work := self._work.get()) is not None:
                try:
                    work()
                except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
                    self._failed(error)


def make_writer(
    device: torch.device, crew: Crew, failed: Callable[[BaseException], None]
) -> Writer:
    """A writer for this device, which is the calling thread's.

    A stream waits only for readers in processes: threads need the interpreter, and who holds it may
    be waiting for the device.
    """
    if device.type == "cuda":
        words = stream_words()
        if words is not None and crew.in_processes and crew.ring.is_pinned:
            try:
                return CudaWriter(device, crew, words)
            except RuntimeError as error:
                logger.info("weightlift: a thread waits in the place of this device: %s", error)
    return ThreadWriter(device, crew, failed)
