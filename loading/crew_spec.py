"""What a crew is to be like, and how it is to read a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from weightlift.loading.pages import PAGE
from weightlift.loading.words import LINE, words_bytes

PART_BYTES = 2 << 20
"""A part of a window that comes from the page cache. Of smaller ones the bytes stay longer in the
processor's cache until the device fetches them."""

DIRECT_READ_BYTES = 6 << 20
"""A read past it: a window on CUDA is two. Twelve readers then have 72 MiB under way. Into huge
pages a virtual disk gave 3.2 GB/s that way, and 3.0 by reads of 2 MiB; an H100 host's slower one 1.7 GB/s
where those of 2 MiB had 1.4 to 1.9."""


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
