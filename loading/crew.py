"""A crew: reader processes and the pinned memory that they read into.

Readers in processes of their own do not compete for the interpreter lock, neither with each other nor
with an engine that plans. So their reads can be so small that the bytes stay in the processor's cache
until the device has fetched them: on an H100 host of 16 cores, warm files get to the device at 45 GB/s
that way, at 47 by native threads, and at 32 by threads of this interpreter, which need larger reads.
"""

from __future__ import annotations

import array
import logging
import socket
from typing import Final

from weightlift.loading import reader_group
from weightlift.loading.crew_spec import DIRECT_READ_BYTES, CrewSpec, Way
from weightlift.loading.errors import PlanAborted
from weightlift.loading.pages import PAGE
from weightlift.loading.reader_group import ReaderGroup
from weightlift.loading.ring import SharedRing
from weightlift.loading.words import (
    CLOSE,
    CLOSED,
    FILE,
    JOB,
    JOB_BYTES,
    LINE,
    MOST_WINDOWS,
    NUMBER,
    Words,
)

logger = logging.getLogger("weightlift")

_NUMBERS: Final = array.array("I", range(MOST_WINDOWS * LINE)).tobytes()
"""Those of parts, one after the other."""

MOST_FILES: Final = 100
"""Descriptors that may wait for a reader that has needed none of them."""


class Crew:
    """Readers, and the memory that windows of files are read into, slot by slot.

    Args:
        spec: What they are to be like.

    Attributes:
        spec: What they were to be like.
        in_processes: Whether they are processes.
        ring: The memory of all slots.
        words: What is read, and what is free; see :class:`~weightlift.loading.words.Words`.
        readers: The readers.

    Raises:
        OSError: The host has no such memory.
    """

    def __init__(self, spec: CrewSpec) -> None:
        self.spec = spec
        self.in_processes = spec.in_processes
        self.ring = SharedRing(spec.memory_bytes)
        self.words = Words(self.ring.view, spec.slots)
        self.readers = ReaderGroup(spec, self.ring)
        self._slot_bytes = spec.slot_bytes
        self._part_bytes = spec.part_bytes, max(spec.part_bytes, DIRECT_READ_BYTES)
        self._next = spec.slots
        self._known: set[int] = set()

    @property
    def is_started(self) -> bool:
        """Whether it has readers."""
        return self.readers.is_started

    def start(self) -> None:
        """Have all readers ready, and the memory page-locked.

        Raises:
            OSError: Not even threads can be started.
        """
        if self.in_processes:
            try:
                self.readers.start_processes()
                self._get_memory_ready()  # while they start
                self.readers.await_ready()
            except (OSError, ValueError, PlanAborted) as error:
                self.stop()
                self.in_processes = False
                logger.warning(
                    "weightlift: reader processes cannot be started (%s); threads read instead, "
                    "which is slower. WEIGHTLIFT_READERS=threads asks for them without this line.",
                    error,
                )
        if not self.is_started:
            self.readers.start_threads()
            self._get_memory_ready()
            self.readers.await_ready()
        self.words.reset()
        self._next = self.spec.slots

    def _get_memory_ready(self) -> None:
        self.ring.find_pages(self.spec.readers)
        self.readers.tell_each(FILE.pack(0))  # they map it meanwhile
        if self.spec.pinned:
            self.ring.lock()

    def ask(self, way: Way, plain: Way, start: int, stop: int) -> tuple[int, int, int]:
        """Have a window read as soon as its slot is free; the words tell when it is.

        Of those asked for and not freed again there are at most :data:`~weightlift.loading.words.MOST_WINDOWS`.

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
        job, place = window % MOST_WINDOWS, window % self.spec.slots * self._slot_bytes
        first, end, most = cut(start, stop, way.alignment, self._part_bytes[way.is_direct])
        numbers = most, way.number, plain.number, window
        JOB.pack_into(self.words.jobs, job * JOB_BYTES, first, stop, end, place, *numbers)
        parts = -(-(end - first) // most)
        self.readers.send(_NUMBERS[job * LINE * NUMBER.size : (job * LINE + parts) * NUMBER.size])
        return window, parts, place + start - first

    def close_files(self, seconds: float | None = reader_group.ANSWER_SECONDS) -> None:
        """Return once no reader has a file open.

        Args:
            seconds: To wait for; None while reads may be under way.

        Raises:
            PlanAborted: A reader is gone, or does not answer.
        """
        self._known.clear()
        self.readers.files.clear()
        if self.readers.is_processes:
            self.readers.tell_all(NUMBER.pack(CLOSE))
            self.readers.await_answers(CLOSED, seconds)
            self.readers.tell_each(FILE.pack(0))

    def stop(self) -> None:
        """End the readers. The memory stays."""
        self.readers.stop()
        self._known.clear()

    def release(self) -> int:
        """End the readers and free the memory; returns its bytes."""
        self.stop()
        self.words = Words(memoryview(b""), 0)
        return self.ring.release()

    def forget(self) -> None:
        """In a forked child: let go of what is the parent's."""
        self.readers.close()
        self.ring.forget()

    def _introduce(self, ways: dict[int, Way]) -> None:
        """Have the readers know these files."""
        if self.readers.is_processes and len(self._known) > MOST_FILES:
            self.close_files(None)
        try:
            self._send_files(ways)
        except OSError:  # let the readers take what is on its way
            self.close_files(None)
            self._send_files(ways)

    def _send_files(self, ways: dict[int, Way]) -> None:
        for number in ways.keys() - self._known:
            self.readers.files[number] = descriptor = ways[number].descriptor
            along = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
            self.readers.tell_each(FILE.pack(number), along)
            self._known.add(number)


def cut(start: int, stop: int, alignment: int, most: int) -> tuple[int, int, int]:
    """How a window is read: its first byte, the byte after its last, and how many bytes a part has.

    Args:
        start: The first byte that is wanted.
        stop: The byte after the last.
        alignment: What first bytes and lengths are multiples of.
        most: About as many bytes are a part: where whole pages are read, a page more is no part of its own.
    """
    first, end = start - start % alignment, stop + -stop % alignment
    parts = -(-(stop - start) // most)
    return first, end, -(-(end - first) // (parts * PAGE)) * PAGE
