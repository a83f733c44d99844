"""A reader outside of the interpreter: takes jobs from a pipe, reads files into shared memory.

The program of the reader processes, and of the threads that stand in for them where there are none.
It imports built-in modules alone, so that a process is ready in 10 ms, and speaks of numbers alone:
which file (its descriptor comes by a socket of each reader's own), from which byte, how many, to where.
Windows stand in a table in the shared memory; a pipe gives the number of each part to one of the readers.

What is read and what is free again stands in words of the shared memory, for whoever waits for it:
the device itself, mostly. Nobody is told, so that no reader and no copy waits for an interpreter.

    worker.py MEMORY SLOTS DONE JOBS OWN...    a number: SLOTS; the rest are descriptors: shared memory,
                                               a pipe for answers, one for jobs, a socket of each reader
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import sys
import time
from _socket import socket

JOB = struct.Struct("=QQQQIIII")
"""A window: the first byte that is read of the file, the byte after the last that must come, the one after
the last that is read (past the page cache come whole pages), where in the memory the first goes, how many
bytes a part has, the number of the file, that of the file as it is read through the page cache, and the
number of the window."""

JOB_BYTES = 64
MOST_WINDOWS = 64
"""Windows that are asked for and not yet free again, at most: places in the table. The numbers of all their
parts fit the smallest pipe that Linux makes."""

NUMBER = struct.Struct("=I")
"""Of a part: its own within the window, and :data:`LINE` times the place of that in the table."""

DESCRIPTOR = struct.Struct("=i")
CLOSE = 0xFFFFFFFF
"""In place of the number of a part: close every file."""

FILE = struct.Struct("=I")
"""The number of a file whose descriptor comes along. 0: go on, all have closed theirs."""

DONE = struct.Struct("=II")
"""Number of the reader and its answer."""

READY, CLOSED = 1, 2
"""Answers: there it is, and it has no file open."""

LINE = 16
"""Words for a slot: the numbers of the windows whose parts were read last, a word each. Windows are
numbered from the number of slots on, and window ``n`` is in slot ``n`` modulo that."""

NEVER = 0x7FFFFFFF
"""In place of all numbers, once something failed: nobody is to wait any more."""

_ONE_DESCRIPTOR = 32  # CMSG_SPACE of one, with room to spare
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE
_NAPS, _NAP, _LONG_NAP_MS = 1000, 2e-5, 1


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
    return -(-(3 * slots * LINE * 4 + MOST_WINDOWS * JOB_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE


class Reader:
    """One reader.

    Args:
        number: Given in its answers.
        jobs: The reading end of the pipe for numbers of jobs, each for one of those who listen.
        own: Where descriptors come from; None for one whose ``files`` are kept by who asks.
        done: The writing end of the pipe for answers.
        memory: Where bytes go.
        slots: How many slots it has.

    Attributes:
        files: Descriptors by number of the file.
    """

    def __init__(
        self, number: int, jobs: int, own: socket | None, done: int, memory: memoryview, slots: int
    ) -> None:
        self.files: dict[int, int] = {}
        self._number = number
        self._jobs = jobs
        self._own = own
        self._done = done
        self._memory = memory
        self._words = Words(memory, slots)
        self._end = select.poll()
        self._end.register(jobs, 0)  # tells of its end alone

    def serve(self) -> None:
        """Do jobs until the other side closes the pipe of their numbers."""
        try:
            self._answer(READY)
            if self._own is not None:
                map_pages(self._memory)  # while the other side pins them
            while message := os.read(self._jobs, NUMBER.size):
                number = NUMBER.unpack(message)[0]
                if number == CLOSE:
                    self._close_all()
                else:
                    job, part = divmod(number, LINE)
                    self._read(part, *JOB.unpack_from(self._words.jobs, job * JOB_BYTES))
        except (BrokenPipeError, ConnectionError, EOFError):
            return  # nobody waits any more
        finally:
            if self._own is not None:
                self._close_files()

    def _read(self, part: int, *job: int) -> None:
        """Read a part of a window; the other numbers are those of ``JOB``."""
        first, stop, end, place, most, file, plain, window = job
        slot = window % self._words.slots
        self._await_free(slot, window - self._words.slots)
        if self._words.free[slot * LINE] == NEVER:
            return
        before, length, needed = part_of(part, first, stop, end, most)
        offset, room = first + before, self._memory[place + before : place + before + length]
        got = read(self._descriptor(file), offset, room)
        if got < needed and plain != file:
            got += read(self._descriptor(plain), offset + got, room[got:needed])
        if got < needed:
            self._words.short[slot * LINE + part] = window
        self._words.read[slot * LINE + part] = window

    def _await_free(self, slot: int, window: int) -> None:
        """Return once this window, the last one in the slot, was fetched from there."""
        free, naps = self._words.free, 0
        while free[slot * LINE] < window:
            naps += 1
            if naps < _NAPS:
                time.sleep(_NAP)
            elif self._end.poll(_LONG_NAP_MS):
                raise EOFError

    def _descriptor(self, file: int) -> int:
        while file not in self.files:
            self._receive()
        return self.files[file]

    def _receive(self) -> int:
        """Take the next descriptor; returns the number of its file."""
        assert self._own is not None
        message, along, _, _ = self._own.recvmsg(FILE.size, _ONE_DESCRIPTOR)
        if not message:
            raise EOFError
        file: int = FILE.unpack(message)[0]
        if file and not along:
            raise OSError("the kernel gave no descriptor: there are too many")
        for _, _, data in along:
            self.files[file] = DESCRIPTOR.unpack_from(data)[0]
        return file

    def _close_all(self) -> None:
        """Close all files, those too that wait to be taken, and go on when all readers have."""
        waiting = select.poll()
        waiting.register(self._own, select.POLLIN)  # type: ignore[arg-type]
        while waiting.poll(0):
            self._receive()
        self._close_files()
        self._answer(CLOSED)
        self._receive()

    def _close_files(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files.clear()

    def _answer(self, answer: int) -> None:
        os.write(self._done, DONE.pack(self._number, answer))


def part_of(part: int, first: int, stop: int, end: int, most: int) -> tuple[int, int, int]:
    """Of a part of ``most`` bytes: those of the window before it, its own, and how many of them must come."""
    before = part * most
    return before, min(most, end - first - before), min(most, stop - first - before)


def read(file: int, offset: int, room: memoryview) -> int:
    """Fill ``room`` from byte ``offset`` on; returns how many came."""
    got = 0
    while got < len(room):
        try:
            count = os.preadv(file, [room[got:]], offset + got)
        except OSError:
            break
        if count == 0:
            break
        got += count
    return got


def map_pages(memory: memoryview) -> None:
    """Have the kernel map all pages of some memory into this process.

    It would at the first read into each: 96 MiB were filled in 47 ms that way, in 12 ms when mapped, which
    took 22.
    """
    try:
        memory.obj.madvise(POPULATE_WRITE)  # type: ignore[attr-defined]
    except OSError:  # Linux before 5.14: at the first read, then
        pass


def _fork(
    number: int, memory: memoryview, slots: int, done: int, jobs: int, own: list[int]
) -> None:
    if os.fork():
        return
    for other, descriptor in enumerate(own):
        if other != number:
            os.close(descriptor)  # or its reader would not see the other side go
    status = 1
    try:
        mine = socket(fileno=own[number])
        Reader(number, jobs, mine, done, memory, slots).serve()
        status = 0
    finally:
        os._exit(status)


def main(shared: int, slots: int, done: int, jobs: int, *own: int) -> None:
    """Have a process for each socket, and end when all of them have."""
    memory = memoryview(mmap.mmap(shared, os.fstat(shared).st_size))
    for number in range(len(own)):
        _fork(number, memory, slots, done, jobs, list(own))
    for descriptor in (done, jobs, *own):
        os.close(descriptor)
    left, is_sound = len(own), True
    while left:
        ended, status = os.waitpid(-1, 0 if is_sound else os.WNOHANG)
        left -= ended > 0
        is_sound = is_sound and not status
        if not is_sound:  # the device may wait for one that was killed; the others may still write
            Words(memory, slots).let_go()
            time.sleep(0 if ended else 0.01)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
