"""The crew: reader processes and the pinned memory that they read into, kept from load to load.

Readers in processes of their own do not compete for the interpreter lock, neither with each other nor
with an engine that plans. So their reads can be so small that the bytes stay in the processor's cache
until the device has fetched them: on an H100 host of 16 cores, warm files get to the device at 45 GB/s
that way, at 47 by native threads, and at 32 by threads of this interpreter, which need larger reads.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from weightlift.loading import worker
from weightlift.loading.errors import PlanAborted
from weightlift.loading.files import Way
from weightlift.loading.residency import PAGE
from weightlift.loading.staging import register, unregister
from weightlift.loading.worker import CLOSED, DONE, JOB, READY

logger = logging.getLogger("weightlift")

SLOTS_A_READER = 2
"""One that is read, and one on its way to the device. Three brought nothing, and cost 20 ms more to pin."""

START_SECONDS = 20.0
"""Processes that are not ready by then are given up."""

_END_SECONDS = 5.0
_ANSWERS = 256
# A call that keeps the interpreter lock: to get it back from an engine that plans takes 5 ms.
_LIBC: Final = ctypes.PyDLL(None, use_errno=True)
_QUIETLY = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT


@dataclass(frozen=True)
class CrewSpec:
    """What a crew is to be like.

    Attributes:
        readers: How many.
        chunk_bytes: The most that one job reads.
        pinned: Whether their memory is page-locked, for CUDA.
        in_processes: Whether they are processes, where these can be started; threads otherwise.
    """

    readers: int
    chunk_bytes: int
    pinned: bool = False
    in_processes: bool = True

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: a chunk, from the page on that it begins in."""
        return self.chunk_bytes + 2 * PAGE

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.readers * SLOTS_A_READER * self.slot_bytes


class Crew:
    """Readers and their slots of shared memory.

    Args:
        spec: What they are to be like.

    Attributes:
        spec: What they were to be like.
        in_processes: Whether they are processes.
        slots: How many slots there are. Slot ``s`` is for reader ``s % readers``.
        memory: All slots: flat uint8, on the CPU.
        addresses: Where each slot begins.

    Raises:
        OSError: The host has no such memory.
    """

    def __init__(self, spec: CrewSpec) -> None:
        self.spec = spec
        self.in_processes = spec.in_processes
        self.slots = spec.readers * SLOTS_A_READER
        self._shared = os.memfd_create("weightlift-ring", os.MFD_CLOEXEC)
        os.ftruncate(self._shared, spec.nbytes)
        mapped = mmap.mmap(self._shared, spec.nbytes)
        self.memory = torch.frombuffer(mapped, dtype=torch.uint8)
        self._bytes = memoryview(mapped)
        first = self.memory.data_ptr()
        self.addresses = range(first, first + spec.nbytes, spec.slot_bytes)
        self._sockets: list[socket.socket] = []
        self._ends: list[int] = []
        self._known: list[set[int]] = []
        self._threads: list[threading.Thread] = []
        self._is_registered = False
        self._poller = select.poll()
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = self._done = -1
        self._buffer = ctypes.create_string_buffer(_ANSWERS * DONE.size)

    def start(self) -> None:
        """Have all readers ready; those of the load before, if they still are."""
        if self._sockets and self._are_there():
            return
        self.stop()
        self._start_either()
        if (
            self.spec.pinned and not self._is_registered
        ):  # by then the readers have touched its pages
            register(self.memory)
            self._is_registered = True

    def _start_either(self) -> None:
        if self.in_processes:
            try:
                self._start(self._start_processes)
                return
            except (OSError, PlanAborted) as error:
                self.stop()
                self.in_processes = False
                logger.warning(
                    "weightlift: reader processes cannot be started (%s); threads read instead, "
                    "which is slower. WEIGHTLIFT_READERS=threads asks for them without this line.",
                    error,
                )
        self._start(self._start_threads)

    def ask(self, slot: int, way: Way, start: int, length: int) -> None:
        """Have bytes of a file read into a slot; :meth:`answers` tells when they are.

        Args:
            slot: Where to, and by that who reads. Nothing of it is under way.
            way: The file.
            start: First byte.
            length: How many, at most what a slot holds.

        Raises:
            PlanAborted: The reader is gone.
        """
        reader = slot % self.spec.readers
        job = JOB.pack(start, length, slot * self.spec.slot_bytes, way.most, way.number, slot)
        if way.number in self._known[reader]:
            self._send(self._ends[reader], job)
            return
        try:
            socket.send_fds(self._sockets[reader], [job], [way.descriptor])
        except OSError as error:
            raise _gone() from error
        self._known[reader].add(way.number)

    def answers(self) -> list[tuple[int, int]]:
        """Slots whose jobs are done, and how many bytes each got; waits until there are some.

        Raises:
            PlanAborted: A reader is gone.
        """
        return [(number, got) for _, number, got in self._receive()]

    def close_files(self) -> None:
        """Return once no reader has a file open. Nothing is under way.

        Raises:
            PlanAborted: A reader is gone.
        """
        for end in self._ends:
            self._send(end, JOB.pack(0, 0, 0, 1, 0, CLOSED))
        self._await(CLOSED)
        for known in self._known:
            known.clear()

    def stop(self) -> None:
        """End the readers. The memory stays."""
        for end in self._sockets:
            end.close()
        for thread in self._threads:
            thread.join()
        if self._process is not None:
            _end(self._process)
        self._close(self._answers, self._done)
        self._sockets, self._ends, self._known, self._threads = [], [], [], []
        self._process = None
        self._answers = self._done = -1

    def release(self) -> int:
        """End the readers and free the memory; returns its bytes."""
        self.stop()
        nbytes = self.memory.numel()
        if self._is_registered:
            unregister(self.memory)
            self._is_registered = False
        self.memory, self._bytes = self.memory[:0], memoryview(b"")
        self._close(self._shared)
        self._shared = -1
        return nbytes

    def forget(self) -> None:
        """In a forked child: let go of what is the parent's."""
        for end in self._sockets:
            end.close()
        self._close(self._answers, self._done, self._shared)
        self._sockets, self._answers, self._done, self._shared = [], -1, -1, -1

    def _are_there(self) -> bool:
        """Whether all readers answer; processes end for want of work."""
        try:
            self.close_files()
        except PlanAborted:
            return False
        return True

    @staticmethod
    def _close(*descriptors: int) -> None:
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)

    def _start(self, how: Callable[[list[socket.socket]], None]) -> None:
        self._answers, self._done = os.pipe()
        os.set_blocking(self._answers, False)
        theirs: list[socket.socket] = []
        self._poller = select.poll()
        self._poller.register(self._answers, select.POLLIN)
        try:
            for _ in range(self.spec.readers):
                ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self._sockets.append(ours)
                self._ends.append(ours.fileno())
                self._known.append(set())
                self._poller.register(ours, 0)  # tells of its end alone
                theirs.append(other)
            how(theirs)
        finally:
            if self.in_processes:
                for end in theirs:
                    end.close()
        self._await(READY, START_SECONDS)

    def _start_processes(self, sockets: list[socket.socket]) -> None:
        descriptors = [self._shared, self._done, *(end.fileno() for end in sockets)]
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

    def _start_threads(self, sockets: list[socket.socket]) -> None:
        worker.touch(self._bytes)

        def work(number: int, jobs: socket.socket) -> None:
            with jobs:
                worker.serve(number, jobs, self._done, self._bytes)

        for number, jobs in enumerate(sockets):
            name = f"weightlift-reader-{number}"
            thread = threading.Thread(target=work, args=(number, jobs), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    @staticmethod
    def _send(end: int, message: bytes) -> None:
        if _LIBC.send(end, message, JOB.size, _QUIETLY) < 0:
            raise _gone()

    def _await(self, number: int, seconds: float = -1.0) -> None:
        """Return once each reader has given this answer."""
        waiting = self.spec.readers
        while waiting:
            waiting -= sum(answer == number for _, answer, _ in self._receive(seconds))

    def _receive(self, seconds: float = -1.0) -> list[tuple[int, int, int]]:
        """Answers, at least one; they are written and read whole."""
        while (got := _LIBC.read(self._answers, self._buffer, len(self._buffer))) <= 0:
            self._poll(seconds)
        return list(DONE.iter_unpack(self._buffer.raw[:got]))

    def _poll(self, seconds: float) -> None:
        """Wait until there is an answer."""
        found = dict(self._poller.poll(seconds * 1000 if seconds > 0 else None))
        if not found:
            raise PlanAborted(f"they were not ready within {seconds:.0f} s")
        if not found.get(self._answers, 0) & select.POLLIN:
            raise _gone()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the readers, who end when their sockets close; not for those that hang in a read."""
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _gone() -> PlanAborted:
    return PlanAborted("a reader process died; is the host short of memory?")
