"""Windows cut into what one reader reads at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from weightlift.loading.files import Way
from weightlift.loading.plan import Window
from weightlift.loading.transfer import Run


@dataclass(slots=True)
class Journey:
    """A window on its way.

    Attributes:
        window: The window.
        way: How its file is read.
        scratch: Its bytes on the device, where they cannot go to their targets as they are.
        to_come: How many of its chunks are not written yet.
        got: Bytes that were read.
    """

    window: Window
    way: Way
    scratch: torch.Tensor | None
    to_come: int = 0
    got: int = 0


@dataclass(slots=True)
class Chunk:
    """A part of a window that is read as one.

    Attributes:
        journey: That of its window.
        start: First byte of the file that is wanted.
        stop: The byte after the last.
        first: First byte that is read.
        length: Bytes that are read.
        parts: Where its bytes go: the address for byte 0 of the file if it went there as well,
            first byte, and the byte after the last.
    """

    journey: Journey
    start: int
    stop: int = 0
    first: int = 0
    length: int = 0
    parts: list[tuple[int, int, int]] = field(default_factory=list)

    def end(self, stop: int) -> Chunk:
        """The same, complete: it ends here."""
        alignment = self.journey.way.alignment
        self.stop, self.first = stop, self.start - self.start % alignment
        self.length = -(-(stop - self.first) // alignment) * alignment
        return self


def chunks_of(journey: Journey, runs: Sequence[Run], most: int) -> Iterator[Chunk]:
    """Chunks of at most ``most`` bytes that hold these runs, which ascend and do not overlap."""
    chunk = Chunk(journey, runs[0].offset)
    stop = chunk.start
    for run in runs:
        zero, position = run.address - run.offset, run.offset
        while position < run.stop:
            if position - chunk.start >= most:
                yield chunk.end(stop)
                chunk = Chunk(journey, position)
            stop = min(run.stop, chunk.start + most)
            chunk.parts.append((zero, position, stop))
            position = stop
    yield chunk.end(stop)
