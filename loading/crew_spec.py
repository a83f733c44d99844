"""What a crew is to be like, and how it is to read a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from weightlift.loading.pages import PAGE
from weightlift.loading.words import LINE, words_bytes

PART_BYTES = 2 << 20
"""A part of a window that comes from the page cache. Of smaller ones the bytes stay longer in the
processor's cache until the device fetches them."""

DIRECT_READ_BYTES = 4 << 20
"""A read past it. Twelve readers then have 48 MiB under way. On an H200 host's disk 8 to 32 MiB reached 3.1
to 3.2 GB/s, and 64 MiB or more 2.2 to 2.7; of 16.4 GB on an H100 host, into huge pages, reads of 6 MiB made
9.6 s and reads of 2 MiB 8.8 to 12.0."""


class Way(NamedTuple):
    """How others are to read a file.

    Attributes:
        number: Of this way into the file; no other open file has it.
        descriptor: Where to read.
        alignment: First bytes and lengths of reads are multiples of it, but for the file's end.
    """

    number: int
    descriptor: int
    alignment: int

    @property
    def is_direct(self) -> bool:
        """Whether it goes past the page cache."""
        return self.alignment > 1


@dataclass(frozen=True)
class CrewSpec:
    """What a crew is to be like.

    Attributes:
        readers: How many.
        slots: How many windows it has memory for.
        window_bytes: The most that one of them spans.
        pinned: Whether their memory is page-locked, for CUDA.
        in_processes: Whether they are processes, where these can be started; threads otherwise.
    """

    readers: int
    slots: int
    window_bytes: int
    pinned: bool = False
    in_processes: bool = True

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: a window, from the page on that it begins in."""
        return self.window_bytes + 2 * PAGE

    @property
    def part_bytes(self) -> int:
        """The most of a part from the page cache: whole pages, and a window has no more parts than a line words."""
        least = -(-self.slot_bytes // LINE)
        return max(PART_BYTES, -(-least // PAGE) * PAGE)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all slots, and of the words behind them."""
        return self.slots * self.slot_bytes + words_bytes(self.slots)
