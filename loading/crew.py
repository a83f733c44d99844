"""A crew: reader processes and the pinned memory that they read into.

Readers in processes of their own do not compete for the interpreter lock, neither with each other nor
with an engine that plans. So their reads can be so small that the bytes stay in the processor's cache
until the device has fetched them: on an H100 host of 16 cores, warm files get to the device at 45 GB/s
that way, at 47 by native threads, and at 32 by threads of this interpreter, which need larger reads.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from weightlift.loading import worker
from weightlift.loading.crew_spec import CrewSpec
from weightlift.loading.errors import PlanAborted
from weightlift.loading.files import Way
from weightlift.loading.ring import SharedRing
from weightlift.loading.worker import (
    CLOSE,
    CLOSED,
    DONE,
    FILE,
    JOB,
    JOB_BYTES,
    JOBS,
    LINE,
    NUMBER,
    READY,
    Reader,
    Words,
)

logger = logging.getLogger("weightlift")

START_SECONDS = 20.0
"""Processes that are not ready by then are given up."""

ANSWER_SECONDS = 5.0
"""Readers without work that have not answered by then are given up."""

_NUMBERS: Final = array.array("I", [*range(JOBS), *range(LINE)]).tobytes()
"""Those of jobs, one after the other; after the last comes the first."""

MOST_FILES: Final = 100
"""Descriptors that may wait for a reader that has needed none of them."""

_ANSWERS = 256
# A call that keeps the interpreter lock: to get it back from an engine that plans takes 5 ms.
_LIBC: Final = ctypes.PyDLL(None, use_errno=True)
_QUIETLY = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT


class Crew:
    """Readers, and the memory that windows of files are read into, slot by slot.

    Args:
        spec: What they are to be like.

    Attributes:
        spec: What they were to be like.
        in_processes: Whether they are processes.
        ring: The memory of all slots.
        words: What is read, and what is free; see :class:`~weightlift.loading.worker.Words`.

    Raises:
        OSError: The host has no such memory.
    """

    def __init__(self, spec: CrewSpec) -> None:
        self.spec = spec
        self.ring = SharedRing(spec.memory_bytes)
        self.words = Words(self.ring.view, spec.slots)
        self._slot_bytes, self._part_bytes = spec.slot_bytes, spec.part_bytes
        self.in_processes = spec.in_processes
        self._next = spec.slots
        self._job = 0
        self._jobs = -1
        self._own: list[socket.socket] = []
        self._theirs: list[socket.socket] = []
        self._known: set[int] = set()
        self._files: dict[int, int] = {}
        self._threads: list[threading.Thread] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = self._done = self._listened = -1
        self._poller = select.poll()

    @property
    def is_started(self) -> bool:
        """Whether it has readers."""
        return self._jobs >= 0

    def start(self) -> None:
        """Have all readers ready, and the memory page-locked.

        Raises:
            OSError: Not even threads can be started.
        """
        if self.in_processes:
            try:
                self._start(self._start_processes)
            except (OSError, ValueError, PlanAborted) as error:
                self.stop()
                self.in_processes = False
                logger.warning(
                    "weightlift: reader processes cannot be started (%s); threads read instead, "
                    "which is slower. WEIGHTLIFT_READERS=threads asks for them without this line.",
                    error,
                )
        if not self.is_started:
            self._start(self._start_threads)
        if self.spec.pinned:  # the readers have touched its pages
            self.ring.pin()

    def ask(self, way: Way, plain: Way, start: int, stop: int) -> tuple[int, int, int]:
        """Have a window read as soon as its slot is free; the words tell when it is.

        Of those asked for and not freed again there are at most :attr:`CrewSpec.most_windows`.

        Args:
            way: How to read the file.
            plain: How to read it where that fails.
            start: The first byte of the window.
            stop: The byte after its last.

        Returns:
            The window's number, in how many parts it is read, and where its bytes will be: a place
            in the memory.

        Raises:
            PlanAborted: The readers are gone.
        """
        if not (way.number in self._known and plain.number in self._known):
            self._introduce({way.number: way, plain.number: plain})
        window, self._next = self._next, self._next + 1
        place, first = window % self.spec.slots * self._slot_bytes, start - start % way.alignment
        job, table, last = self._job, self.words.jobs, (way.most, way.number, plain.number, window)
        parts = parts_of(start, stop, way.alignment, self._part_bytes)
        for part, (position, length, needed) in enumerate(parts):
            record = (job + part) % JOBS * JOB_BYTES
            JOB.pack_into(
                table, record, position, length, place + position - first, needed, *last, part
            )
        self._send(_NUMBERS[job * NUMBER.size : (job + len(parts)) * NUMBER.size])
        self._job = (job + len(parts)) % JOBS
        return window, len(parts), place + start - first

    def check(self) -> None:
        """See that no reader is gone.

        Raises:
            PlanAborted: One is.
        """
        if any(happened & ~select.POLLIN for _, happened in self._poller.poll(0)):
            raise _gone("its socket is closed")

    def close_files(self, seconds: float | None = ANSWER_SECONDS) -> None:
        """Return once no reader has a file open.

        Args:
            seconds: To wait for; None while reads may be under way.

        Raises:
            PlanAborted: A reader is gone, or does not answer.
        """
        self._known.clear()
        self._files.clear()
        if self._own:
            self._send(NUMBER.pack(CLOSE) * len(self._own))
            self._await(CLOSED, seconds)
        self._tell_each(FILE.pack(0))

    def stop(self) -> None:
        """End the readers. The memory stays."""
        self._close_own()
        for thread in self._threads:
            thread.join()
        self._close_all()
        if self._process is not None:
            _end(self._process)
        self._known.clear()
        self._threads, self._process = [], None

    def release(self) -> int:
        """End the readers and free the memory; returns its bytes."""
        self.stop()
        self.words = Words(memoryview(b""), 0)
        return self.ring.release()

    def forget(self) -> None:
        """In a forked child: let go of what is the parent's."""
        self._close_all()
        self.ring.forget()

    def _close_own(self) -> None:
        """What the readers see the end of."""
        for end in self._own:
            end.close()
        _close(self._jobs)
        self._own, self._jobs = [], -1

    def _close_all(self) -> None:
        self._close_own()
        for end in self._theirs:
            end.close()
        _close(self._answers, self._done, self._listened)
        self._theirs, self._answers, self._done, self._listened = [], -1, -1, -1

    def _start(self, have_readers: Callable[[], None]) -> None:
        self._answers, self._done = os.pipe()
        self._listened, self._jobs = os.pipe()
        self._poller = select.poll()
        self._poller.register(self._answers, select.POLLIN)
        self._poller.register(self._jobs, 0)  # tells of its end alone
        have_readers()
        self._await(READY, START_SECONDS)
        self.words.reset()  # the readers have touched the memory
        self._next = self.spec.slots

    def _open_socket(self) -> socket.socket:
        """Our end of a new socket, watched; the other is theirs."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs.append(theirs)
        self._poller.register(ours, 0)
        return ours

    def _start_processes(self) -> None:
        if not sys.executable or self.ring.descriptor < 0:
            raise OSError("there is no Python to run them, or no memory to share")
        self._own = [self._open_socket() for _ in range(self.spec.readers)]
        theirs = [end.fileno() for end in self._theirs]
        descriptors = [self.ring.descriptor, self._done, self._listened, *theirs]
        numbers = [descriptors[0], self.spec.slots, *descriptors[1:]]
        libraries = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(worker.__file__)), *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=descriptors,
            env=libraries,  # what an engine preloads for CUDA is not for them
            start_new_session=True,  # Ctrl-C is for the engine, whose end ends them
        )
        for end in self._theirs:  # or nobody hears when a reader's own is closed
            end.close()
        _close(self._done, self._listened)
        self._theirs, self._done, self._listened = [], -1, -1

    def _start_threads(self) -> None:
        """Threads share the descriptors of this process; a copy for each could be too many."""
        worker.touch(self.ring.view)
        for number in range(self.spec.readers):
            reader = Reader(
                number, self._listened, None, self._done, self.ring.view, self.spec.slots
            )
            reader.files = self._files
            thread = threading.Thread(
                target=reader.serve, name=f"weightlift-reader-{number}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def _introduce(self, ways: dict[int, Way]) -> None:
        """Have the readers know these files."""
        if ways.keys() <= self._known:
            return
        if self._own and len(self._known) > MOST_FILES:
            self.close_files(None)
        for number in ways.keys() - self._known:
            self._files[number] = descriptor = ways[number].descriptor
            along = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
            self._tell_each(FILE.pack(number), along)
            self._known.add(number)

    def _tell_each(
        self, message: bytes, along: Sequence[tuple[int, int, array.array[int]]] = ()
    ) -> None:
        try:
            for own in self._own:
                own.sendmsg([message], along, _QUIETLY)
        except OSError as error:
            raise _gone(str(error)) from error

    def _send(self, numbers: bytes) -> None:
        if _LIBC.write(self._jobs, numbers, len(numbers)) < len(numbers):
            raise _gone(os.strerror(ctypes.get_errno()))

    def _await(self, answer: int, seconds: float | None) -> None:
        """Return once each reader has given this answer."""
        until, waiting = time.monotonic() + (seconds or 0), self.spec.readers
        while waiting:
            left = None if seconds is None else max(0.0, until - time.monotonic()) * 1000
            found = dict(self._poller.poll(left))
            if not found:
                raise PlanAborted("readers do not answer")
            if not found.get(self._answers, 0) & select.POLLIN:
                raise _gone("its socket is closed")
            answers = os.read(self._answers, DONE.size * _ANSWERS)
            waiting -= sum(told == answer for _, told in DONE.iter_unpack(answers))


def parts_of(start: int, stop: int, alignment: int, most: int) -> list[tuple[int, int, int]]:
    """What is read to have these bytes of a file: first byte, length, and how many of them must come.

    Args:
        start: The first byte that is wanted.
        stop: The byte after the last.
        alignment: What first bytes and lengths are multiples of.
        most: The longest read, a multiple of it.
    """
    first = start - start % alignment
    end = stop + -stop % alignment
    return [
        (position, min(most, end - position), min(most, stop - position))
        for position in range(first, end, most)
    ]


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the readers, who end when their sockets close; not for those that hang in a read."""
    try:
        process.wait(ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _gone(why: str) -> PlanAborted:
    return PlanAborted(f"a reader process died ({why}); is the host short of memory?")
