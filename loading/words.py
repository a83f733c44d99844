"""What engine and readers tell each other in the memory that they share, and by pipes: numbers alone.

Windows to be read stand in a table. What was read, and what is free again, stands in words, for whoever
waits for it: the device itself, mostly. Nobody is told, so that no reader and no copy waits for an
interpreter.
"""

from __future__ import annotations

import struct

from weightlift.loading.pages import PAGE

JOB = struct.Struct("=QQQQIIII")
"""A window: the first byte that is read of the file, the byte after the last that must come, the one after
the last that is read (past the page cache come whole pages), where in the memory the first goes, how many
bytes a part has, the number of the file, that of the file as it is read through the page cache, and the
number of the window."""

JOB_BYTES = 64
MOST_WINDOWS = 64
"""Windows that are asked for and not yet free again, at most: places in the table."""

LEAST_PIPE_BYTES = 2 * PAGE
"""Of a pipe that takes the numbers of all their parts and never has a writer wait. Linux before 5.14 makes
pipes of one page for who has a thousand."""

NUMBER = struct.Struct("=I")
"""Of a part: its own within the window, and :data:`LINE` times the place of that in the table."""

DESCRIPTOR = struct.Struct("=i")
CLOSE = 0xFFFFFFFF
"""In place of the number of a part: close every file."""

FILE = struct.Struct("=I")
"""The number of a file whose descriptor comes along. 0: go on, all memory is there or all have closed theirs."""

DONE = struct.Struct("=I")
"""The answer of a reader, to whom all give theirs."""

READY, CLOSED = 1, 2
"""Answers: there it is, and it has no file open."""

LINE = 16
"""Words for a slot: the numbers of the windows whose parts were read last, a word each. Windows are
numbered from the number of slots on, and window ``n`` is in slot ``n`` modulo that."""

NEVER = 0x7FFFFFFF
"""In place of all numbers, once something failed: nobody is to wait any more."""

LAYOUT = f"{JOB.format} {DONE.format} {JOB_BYTES} {MOST_WINDOWS} {LINE}"
"""What both sides must have the same of, though one may be of a version that was installed later."""


class Words:
    """What stands at the end of the shared memory: words, which :meth:`reset` begins, and jobs.

    Args:
        memory: All of it.
        slots: How many slots it has.

    Attributes:
        read: By slot and part, the window that was read last.
        short: By slot and part, the window of which bytes are missing.
        free: By slot, in the first word of its line, the window that was fetched last.
        places: The bytes of the memory where ``read`` and ``free`` begin.
        jobs: The table of jobs.
    """

    def __init__(self, memory: memoryview, slots: int) -> None:
        size = slots * LINE * 4
        jobs = len(memory) - MOST_WINDOWS * JOB_BYTES if slots else 0
        read, short, free = (jobs - part * size for part in (3, 2, 1))
        self.slots = slots
        self.places = read, free
        self.jobs = memory[jobs:]
        self.read, self.short, self.free = (
            memory[place : place + size].cast("I") for place in (read, short, free)
        )

    def reset(self) -> None:
        """Begin again: nothing was read, and all is free, as if windows before the first had gone."""
        self._fill(0)
        for slot in range(self.slots):
            self.free[slot * LINE] = slot

    def let_go(self) -> None:
        """Have nobody wait any more, for nobody reads any more."""
        self._fill(NEVER)

    def _fill(self, number: int) -> None:
        for words in (self.short, self.free, self.read):
            for place in range(len(words)):
                words[place] = number


def words_bytes(slots: int) -> int:
    """Bytes of words and jobs for so many slots: whole pages."""
    return -(-(3 * slots * LINE * 4 + MOST_WINDOWS * JOB_BYTES) // PAGE) * PAGE
