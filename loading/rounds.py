"""What the ranks of a host read together: a checkpoint cut into rounds, the same on every rank.

A round is a range of a file. Each rank reads its part of it from the disk or the page cache, all of
them get the whole over NVLink, and each takes from it what its parameters need. So every byte is
read once a host, however many ranks want it, and a row-parallel slice, which lies in the file as
thousands of short runs, is cut out on the device.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from weightlift.loading.checkpoint import Shard
from weightlift.loading.header import TensorEntry
from weightlift.loading.transfer import Run, Transfer

ALIGNMENT = 4096
"""Parts of a round are multiples of it."""


@dataclass(slots=True)
class Round:
    """A range of a file, and what this rank takes from it.

    Attributes:
        shard: Number of the shard.
        start: First byte.
        stop: The byte after the last.
        pieces: This rank's work that lies in it.
    """

    shard: int
    start: int
    stop: int
    pieces: list[Run | Transfer] = field(default_factory=list)

    @property
    def span(self) -> int:
        """Bytes that it covers."""
        return self.stop - self.start

    @property
    def read_alone(self) -> int:
        """Bytes of the file that this rank would read of it by itself."""
        return sum(piece.stop - piece.offset for piece in self.pieces)

    def length(self, size: int) -> int:
        """Bytes that each of ``size`` ranks has room for; together they may be more than it has."""
        length = -(-self.span // size)
        return length + -length % ALIGNMENT

    def part(self, rank: int, size: int) -> tuple[int, int]:
        """The bytes of the file that one of ``size`` ranks reads: from, to; perhaps none."""
        length = self.length(size)
        start = min(self.start + rank * length, self.stop)
        return start, min(start + length, self.stop)


def cut(shards: Iterable[Shard], most: int) -> list[Round]:
    """Rounds of at most ``most`` bytes that cover every tensor of these shards.

    They end between tensors, or between rows of a tensor that is larger.
    """
    rounds: list[Round] = []
    for number, shard in enumerate(shards):
        current: Round | None = None
        for entry in shard.tensors.values():
            for start, stop in _stretches(entry, most):
                if current is None or stop - current.start > most:
                    current = Round(number, start, stop)
                    rounds.append(current)
                current.stop = stop
    return rounds


def _stretches(entry: TensorEntry, most: int) -> Iterator[tuple[int, int]]:
    stop = entry.offset + entry.nbytes
    step = entry.nbytes
    if entry.nbytes > most:
        row = entry.nbytes // (entry.shape or (1,))[0]
        step = most // row * row or most
    for start in range(entry.offset, stop, step or 1):
        yield start, min(start + step, stop)


def assign(rounds: Sequence[Round], pieces: Iterable[Run | Transfer]) -> list[Run | Transfer]:
    """Give pieces of a shard to its rounds; returns those that lie in none of them."""
    starts = [shared.start for shared in rounds]
    outside: list[Run | Transfer] = []
    waiting = list(pieces)
    while waiting:
        piece = waiting.pop()
        shared = rounds[bisect.bisect_right(starts, piece.offset) - 1]
        if isinstance(piece, Transfer) and (piece.offset - shared.start) % piece.dtype.itemsize:
            outside.append(piece)  # at no address that such elements can be read from
        elif piece.stop <= shared.stop:
            shared.pieces.append(piece)
        elif parts := piece.cut(shared.stop):
            waiting.extend(parts)
        else:
            outside.append(piece)
    return outside
