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
from collections.abc import Callable
from pathlib import Path
from typing import Final

from weightlift.loading import worker
from weightlift.loading.crew_spec import CrewSpec
from weightlift.loading.errors import PlanAborted
from weightlift.loading.files import Way
from weightlift.loading.ring import SharedRing
from weightlift.loading.worker import CLOSED, DONE, JOB, READY

logger = logging.getLogger("weightlift")

START_SECONDS = 20.0
"""Processes that are not ready by then are given up."""

ANSWER_SECONDS = 5.0
"""Readers without work that have not answered by then are given up."""

_ANSWERS = 256
# A call that keeps the interpreter lock: to get it back from an engine that plans takes 5 ms.
_LIBC: Final = ctypes.PyDLL(None, use_errno=True)
_QUIETLY = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT


class Crew:
    """Readers and their slots of shared memory.

    Args:
        spec: What they are to be like.

    Attributes:
        spec: What they were to be like.
        in_processes: Whether they are processes.
        ring: The memory of all slots.
        addresses: Where each slot begins.

    Raises:
        OSError: The host has no such memory.
    """

    def __init__(self, spec: CrewSpec) -> None:
        self.spec = spec
        nbytes = spec.slots * spec.slot_bytes
        self.ring = SharedRing(nbytes)
        self.in_processes = spec.in_processes
        first = self.ring.memory.data_ptr()
        self.addresses = range(first, first + nbytes, spec.slot_bytes)
        self._ours: list[socket.socket] = []
        self._theirs: list[socket.socket] = []
        self._known: list[set[int]] = []
        self._files: dict[int, int] = {}
        self._threads: list[threading.Thread] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = self._done = -1
        self._poller = select.poll()
        self._buffer = ctypes.create_string_buffer(_ANSWERS * DONE.size)

    @property
    def is_started(self) -> bool:
        """Whether it has readers."""
        return bool(self._ours)

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

    def ask(self, slot: int, way: Way, start: int, length: int) -> None:
        """Have bytes of a file read into a slot; :meth:`answers` tells when they are.

        Args:
            slot: Where to, and by that who reads. Nothing of it is under way.
            way: The file.
            start: First byte.
            length: How many: some, and at most what a slot holds.

        Raises:
            PlanAborted: The reader is gone.
        """
        reader, place = slot % self.spec.readers, slot * self.spec.slot_bytes
        job = JOB.pack(start, length, place, way.most, way.number, slot)
        known = self._known[reader]
        if way.number in known or not self.in_processes:
            self._files[way.number] = way.descriptor
            self._send(reader, job)
            return
        along = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [way.descriptor]))]
        try:
            self._ours[reader].sendmsg([job], along, _QUIETLY)
        except OSError as error:
            raise _gone(str(error)) from error
        known.add(way.number)

    def answers(self) -> list[tuple[int, int]]:
        """Slots whose jobs are done, and how many bytes each got; waits until there are some.

        Raises:
            PlanAborted: A reader is gone.
        """
        return [(number, got) for _, number, got in self._receive()]

    def close_files(self) -> None:
        """Return once no reader has a file open. Nothing is under way.

        Raises:
            PlanAborted: A reader is gone, or does not answer.
        """
        for reader in range(self.spec.readers):
            self._send(reader, JOB.pack(0, 0, 0, 1, 0, CLOSED))
        self._await(CLOSED, ANSWER_SECONDS)
        self._files.clear()
        for known in self._known:
            known.clear()

    def stop(self) -> None:
        """End the readers. The memory stays."""
        for end in self._ours:
            end.close()
        for thread in self._threads:
            thread.join()
        for end in self._theirs:
            end.close()
        if self._process is not None:
            _end(self._process)
        _close(self._answers, self._done)
        self._ours, self._theirs, self._known, self._threads = [], [], [], []
        self._process = None
        self._answers = self._done = -1

    def release(self) -> int:
        """End the readers and free the memory; returns its bytes."""
        self.stop()
        return self.ring.release()

    def forget(self) -> None:
        """In a forked child: let go of what is the parent's."""
        for end in (*self._ours, *self._theirs):
            end.close()
        _close(self._answers, self._done)
        self._ours, self._theirs, self._answers, self._done = [], [], -1, -1
        self.ring.forget()

    def _start(self, have_readers: Callable[[], None]) -> None:
        self._answers, self._done = os.pipe()
        os.set_blocking(self._answers, False)
        self._poller = select.poll()
        self._poller.register(self._answers, select.POLLIN)
        for _ in range(self.spec.readers):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._ours.append(ours)
            self._theirs.append(theirs)
            self._known.append(set())
            self._poller.register(ours, 0)  # tells of its end alone
        have_readers()
        self._await(READY, START_SECONDS)

    def _start_processes(self) -> None:
        if not sys.executable or self.ring.descriptor < 0:
            raise OSError("there is no Python to run them, or no memory to share")
        sockets = [end.fileno() for end in self._theirs]
        descriptors = [self.ring.descriptor, self._done, *sockets]
        libraries = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(worker.__file__)), *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=descriptors,
            env=libraries,  # what an engine preloads for CUDA is not for them
            start_new_session=True,  # Ctrl-C is for the engine, whose end ends them
        )
        for end in self._theirs:  # or nobody hears when a reader's own is closed
            end.close()
        _close(self._done)
        self._theirs, self._done = [], -1

    def _start_threads(self) -> None:
        """Threads share the descriptors of this process; a copy for each could be too many."""
        worker.touch(self.ring.view)
        for number, jobs in enumerate(self._theirs):
            thread = threading.Thread(
                target=worker.serve,
                args=(number, jobs, self._done, self.ring.view, self._files),
                name=f"weightlift-reader-{number}",
                daemon=True,
            )
            thread.start()
            self._threads.append(thread)

    def _send(self, reader: int, message: bytes) -> None:
        if _LIBC.send(self._ours[reader].fileno(), message, JOB.size, _QUIETLY) < 0:
            raise _gone(os.strerror(ctypes.get_errno()))

    def _await(self, number: int, seconds: float) -> None:
        """Return once each reader has given this answer."""
        until, waiting = time.monotonic() + seconds, self.spec.readers
        while waiting:
            answers = self._receive(max(0.0, until - time.monotonic()))
            waiting -= sum(answer == number for _, answer, _ in answers)

    def _receive(self, seconds: float | None = None) -> list[tuple[int, int, int]]:
        """Answers, at least one; they are written and read whole."""
        while (got := _LIBC.read(self._answers, self._buffer, len(self._buffer))) <= 0:
            found = dict(self._poller.poll(None if seconds is None else seconds * 1000))
            if not found:
                raise PlanAborted("readers do not answer")
            if not found.get(self._answers, 0) & select.POLLIN:
                raise _gone("its socket is closed")
        return list(DONE.iter_unpack(self._buffer.raw[:got]))


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
