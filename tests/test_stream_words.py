"""What is asked of a CUDA stream for each window, carried out by threads: the order is all that counts."""

from __future__ import annotations

import ctypes
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from weightlift.loading import crew_spec, feeder, placement, readers, writers
from weightlift.loading.crew import Crew
from weightlift.loading.crews import Crews
from weightlift.loading.settings import Settings
from weightlift.loading.state_dict import load_into
from weightlift.loading.stream_words import StreamWords
from weightlift.loading.writers import CudaWriter

SLOTS = readers.FEWEST_SLOTS


class SoftStream:
    """Does one thing after the other, some of it late. Counts what by name."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle
        self.count: dict[str, int] = {}
        self._late = random.Random(handle)
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._go, daemon=True)
        self._thread.start()

    def put(self, name: str, work: Callable[[], object]) -> None:
        """Have this done after all before it."""
        self.count[name] = self.count.get(name, 0) + 1
        self._work.put(work)

    def end(self) -> None:
        """Return once all is done."""
        self._work.put(None)
        self._thread.join()

    def _go(self) -> None:
        while (work := self._work.get()) is not None:
            if self._late.random() < 0.2:
                time.sleep(1e-3)
            work()


class SoftWords(StreamWords):
    """The driver's functions, on such streams."""

    def __init__(self, streams: Sequence[SoftStream]) -> None:
        self._streams = {stream.cuda_stream: stream for stream in streams}

    def wait(self, stream: int, address: int, words: int, number: int) -> None:
        """Wait for words of memory."""

        def look() -> None:
            found = (ctypes.c_uint32 * words).from_address(address)
            while any(word < number for word in found):
                time.sleep(1e-5)

        self._streams[stream].put("wait", look)

    def write(self, stream: int, address: int, number: int) -> None:
        """Write a word."""
        word = ctypes.c_uint32.from_address(address)
        self._streams[stream].put("write", lambda: setattr(word, "value", number))

    def copy(self, stream: int, target: int, source: int, nbytes: int) -> None:
        """Copy."""
        self._streams[stream].put("copy", lambda: ctypes.memmove(target, source, nbytes))

    def many(
        self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: Any
    ) -> None:
        """Copy ranges, as ``batch_copy`` does."""
        for each in zip(targets, sources, sizes, strict=True):
            self.copy(stream.cuda_stream, *each)


class SoftWriter(CudaWriter):
    """The writer for CUDA, for a CPU."""

    def __init__(self, crew: Crew, streams: Sequence[SoftStream]) -> None:
        self._words = SoftWords(streams)
        self._slots = crew.spec.slots
        first = crew.ring.memory.data_ptr()
        self._read, self._free = (first + place for place in crew.words.places)
        self._soft = streams
        self._handles = [stream.cuda_stream for stream in streams]
        self._streams: Any = streams
        self._turn = 0

    def run(self, work: Callable[[], object]) -> None:
        """Do this on the stream."""
        self._soft[self._turn].put("run", work)

    def fetch(self, data: torch.Tensor) -> torch.Tensor:
        """The device is the host."""
        return data

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """End the streams."""
        for stream in self._soft:
            stream.end()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SoftStream]]:
    """Streams that all loads of this test use; crews of its own, of few slots."""
    made: list[SoftStream] = []
    own = Crews()

    def make(_: torch.device, crew: Crew, __: Any) -> SoftWriter:
        made[:] = [SoftStream(1), SoftStream(2)]
        writer = SoftWriter(crew, made)
        monkeypatch.setattr(writers, "batch_copy", lambda: SoftWords(made).many)
        return writer

    monkeypatch.setattr(feeder, "crews", own)
    monkeypatch.setattr(feeder, "make_writer", make)
    monkeypatch.setattr(placement, "HOST_WINDOW_BYTES", 1 << 20)
    monkeypatch.setattr(readers, "UNDER_WAY_BYTES", 1 << 20)
    monkeypatch.setattr(crew_spec, "PART_BYTES", 256 << 10)
    yield made
    own.release()


SHAPES = {
    "large": [(700, 1000)] * 12,
    "small": [(64, 16)] * 3000,
    "of all sizes": [(1 + number * number, 33) for number in range(150)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as stored", "cast"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_bytes_are_in_place_whoever_is_late(
    save: Any, streams: list[SoftStream], shapes: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    weights = {f"w{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    (path,) = save(weights)
    for _ in range(2):  # by a new crew, and by one that has read before
        targets = {name: torch.zeros(w.shape, dtype=dtype) for name, w in weights.items()}
        load_into(targets, path, Settings(num_load_threads=2, readers="processes"))
        assert all(torch.equal(targets[name], weights[name].to(dtype)) for name in weights)
        windows = sum(stream.count["wait"] for stream in streams)
        assert windows > SLOTS
        assert windows == sum(stream.count["write"] for stream in streams)
        in_torch = sum(stream.count.get("run", 0) for stream in streams)
        copied = sum(stream.count.get("copy", 0) for stream in streams)
        assert (in_torch, copied > 0) == ((0, True) if dtype == torch.float32 else (windows, False))
