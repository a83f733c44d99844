"""A reader outside of the interpreter: takes jobs from a pipe, reads files into shared memory.

The program of the reader processes, and of the threads that stand in for them where there are none.
It imports little, so that a process is ready in 15 ms. A pipe gives the number of each part of a window to
one of the readers; the descriptors of files come by a socket of each reader's own.
"""

from __future__ import annotations

import os
import select
import sys
import time
from _socket import socket

from weightlift.loading.pages import address_of, map_pages, map_shared
from weightlift.loading.words import (
    CLOSE,
    CLOSED,
    DESCRIPTOR,
    DONE,
    FILE,
    JOB,
    JOB_BYTES,
    LAYOUT,
    LINE,
    NEVER,
    NUMBER,
    READY,
    Words,
)

_ONE_DESCRIPTOR = 32  # CMSG_SPACE of one, with room to spare
_NAPS, _NAP, _LONG_NAP_MS = 1000, 2e-5, 1


class Reader:
    """One reader.

    Args:
        jobs: The reading end of the pipe for numbers of jobs, each for one of those who listen.
        own: Where descriptors come from; None for one whose ``files`` are kept by who asks.
        done: The writing end of the pipe for answers.
        memory: Where bytes go.
        slots: How many slots it has.

    Attributes:
        files: Descriptors by number of the file.
    """

    def __init__(
        self, jobs: int, own: socket | None, done: int, memory: memoryview, slots: int
    ) -> None:
        self.files: dict[int, int] = {}
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
                self._receive()  # until all pages are there: nobody is to map them while they become huge ones
                map_pages(address_of(self._memory), len(self._memory))
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
        os.write(self._done, DONE.pack(answer))


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
        Reader(jobs, mine, done, memory, slots).serve()
        status = 0
    finally:
        os._exit(status)


def command(*numbers: int) -> list[str]:
    """What begins the processes: a Python that looks for no packages but this one, and that last.

    Args:
        numbers: The arguments of :func:`main`.
    """
    top = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    python = [sys.executable, "-I", "-S", *(["-B"] if sys.dont_write_bytecode else [])]
    return [*python, "-c", _PROGRAM, top, LAYOUT, *map(str, numbers)]


_PROGRAM = """
import sys
sys.path.append(sys.argv[1])
from weightlift.loading.worker import LAYOUT, main
if sys.argv[2] != LAYOUT:
    raise SystemExit("another version of weightlift was installed meanwhile")
main(*map(int, sys.argv[3:]))
"""


def main(shared: int, slots: int, done: int, jobs: int, *own: int) -> None:
    """Have a process for each socket, and end when all of them have.

    Args:
        shared: The descriptor of the memory.
        slots: How many slots it has.
        done: The writing end of the pipe for answers.
        jobs: The reading end of the one for jobs.
        own: A socket of each reader.
    """
    memory = map_shared(shared, os.fstat(shared).st_size)
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
