"""Readers as processes or threads: how they are started, what they are told by, how they end."""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Final

from weightlift.loading.crew_spec import CrewSpec
from weightlift.loading.errors import PlanAborted
from weightlift.loading.ring import SharedRing
from weightlift.loading.threads import start_thread
from weightlift.loading.words import DONE, LEAST_PIPE_BYTES, READY
from weightlift.loading.worker import Reader, command

START_SECONDS = 20.0
"""Processes that are not ready by then are given up."""

ANSWER_SECONDS = 5.0
"""Readers without work that have not answered by then are given up."""

_ANSWERS = 256
# A call that keeps the interpreter lock: to get it back from an engine that plans takes 5 ms.
_LIBC: Final = ctypes.PyDLL(None, use_errno=True)
_QUIETLY = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT


class ReaderGroup:
    """The readers of a crew. One pipe brings them the numbers of jobs, another their answers back.

    Descriptors come to each process by a socket of its own; threads share those of this process, for a
    copy for each could be too many.

    Args:
        spec: How many, and with which memory.
        ring: The memory.

    Attributes:
        files: For threads: descriptors by number of the file.
        process: The process that began the reader processes, and ends with the last of them.
    """

    def __init__(self, spec: CrewSpec, ring: SharedRing) -> None:
        self.files: dict[int, int] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self._spec = spec
        self._ring = ring
        self._jobs = self._listened = self._answers = self._done = -1
        self._own: list[socket.socket] = []
        self._theirs: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._poller = select.poll()

    @property
    def is_started(self) -> bool:
        """Whether there are any."""
        return self._jobs >= 0

    @property
    def is_processes(self) -> bool:
        """Whether they are processes, which have descriptors of their own."""
        return bool(self._own)

    def start_processes(self) -> None:
        """Start processes; :meth:`await_ready` has to follow.

        Raises:
            OSError: There is no Python to run them, no memory to share, or no pipe.
        """
        self._open_pipes()
        self._fork()

    def start_threads(self) -> None:
        """Start threads; :meth:`await_ready` has to follow.

        Raises:
            OSError: There are too many threads, open files or pipes.
        """
        self._open_pipes()
        self._thread()

    def await_ready(self) -> None:
        """Return once all are there.

        Raises:
            PlanAborted: They died, or were not ready in time.
        """
        self.await_answers(READY, START_SECONDS)

    def send(self, numbers: bytes) -> None:
        """Give numbers of jobs, each to whichever reader is free.

        Raises:
            PlanAborted: Nobody listens.
        """
        if _LIBC.write(self._jobs, numbers, len(numbers)) < len(numbers):
            raise _gone(os.strerror(ctypes.get_errno()))

    def tell_each(
        self, message: bytes, along: Sequence[tuple[int, int, array.array[int]]] = ()
    ) -> None:
        """Tell each process the same, with descriptors.

        Raises:
            PlanAborted: One is gone, or does not listen.
            OSError: ``ETOOMANYREFS``: more descriptors are on their way than this user may have open.
        """
        try:
            for own in self._own:
                own.sendmsg([message], along, _QUIETLY)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise
            raise _gone(str(error)) from error

    def tell_all(self, number: bytes) -> None:
        """Put a number in the pipe for each of the processes."""
        self.send(number * len(self._own))

    def await_answers(self, answer: int, seconds: float | None) -> None:
        """Return once each reader has given this answer; None: however long that takes.

        Raises:
            PlanAborted: One is gone, or did not answer in time.
        """
        until, waiting = time.monotonic() + (seconds or 0), self._spec.readers
        while waiting:
            left = None if seconds is None else max(0.0, until - time.monotonic()) * 1000
            found = dict(self._poller.poll(left))
            if not found:
                raise PlanAborted("readers do not answer")
            if not found.get(self._answers, 0) & select.POLLIN:
                raise _gone("it closed its end")
            answers = os.read(self._answers, DONE.size * _ANSWERS)
            waiting -= sum(told == answer for (told,) in DONE.iter_unpack(answers))

    def check(self) -> None:
        """See that no reader is gone.

        Raises:
            PlanAborted: One is.
        """
        if any(happened & ~select.POLLIN for _, happened in self._poller.poll(0)):
            raise _gone("it closed its end")

    def stop(self) -> None:
        """End them; not waiting for a process that hangs in a read."""
        self._close_own()
        for thread in self._threads:
            thread.join()
        self.close()
        if self.process is not None:
            _end(self.process)
        self._threads, self.process = [], None

    def close(self) -> None:
        """Close all pipes and sockets, which ends them; a forked child closes its copies alone."""
        self._close_own()
        for end in self._theirs:
            end.close()
        _close(self._answers, self._done, self._listened)
        self._theirs, self._answers, self._done, self._listened = [], -1, -1, -1

    def _close_own(self) -> None:
        """What the readers see the end of."""
        for end in self._own:
            end.close()
        _close(self._jobs)
        self._own, self._jobs = [], -1

    def _open_pipes(self) -> None:
        self._answers, self._done = os.pipe()
        self._listened, self._jobs = os.pipe()
        self._poller = select.poll()
        self._poller.register(self._answers, select.POLLIN)
        if fcntl.fcntl(self._jobs, fcntl.F_GETPIPE_SZ) < LEAST_PIPE_BYTES:
            raise OSError(errno.EMFILE, "this user has too many pipes for one of two pages")

    def _open_socket(self) -> socket.socket:
        """Our end of a new socket, watched; the other is theirs."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs.append(theirs)
        self._poller.register(ours, 0)
        return ours

    def _fork(self) -> None:
        if not sys.executable or self._ring.descriptor < 0:
            raise OSError("there is no Python to run them, or no memory to share")
        self._own = [self._open_socket() for _ in range(self._spec.readers)]
        theirs = [end.fileno() for end in self._theirs]
        descriptors = [self._ring.descriptor, self._done, self._listened, *theirs]
        numbers = [descriptors[0], self._spec.slots, *descriptors[1:]]
        libraries = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
        self.process = subprocess.Popen(
            command(*numbers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=descriptors,
            env=libraries,  # what an engine preloads for CUDA is not for them
            start_new_session=True,  # Ctrl-C is for the engine, whose end ends them
        )
        for end in self._theirs:  # or nobody hears when a reader's own is closed
            end.close()
        _close(self._done)  # nobody at the other end of the jobs would be a SIGPIPE
        self._theirs, self._done = [], -1

    def _thread(self) -> None:
        for number in range(self._spec.readers):
            memory, slots = self._ring.view, self._spec.slots
            reader = Reader(self._listened, None, self._done, memory, slots)
            reader.files = self.files
            self._threads.append(start_thread(reader.serve, f"reader-{number}"))


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
    return PlanAborted(
        f"a reader process died ({why}); is the host short of memory, or was weightlift upgraded meanwhile?"
    )
