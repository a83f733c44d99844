"""A reader outside of the interpreter: takes jobs from a socket, reads files into shared memory.

The program of the reader processes, and of the threads that stand in for them where there are none.
It imports built-in modules alone, so that a process is ready in 10 ms, and speaks of numbers alone:
which file (the descriptor comes along with its first job), from which byte, how many, to where.

    worker.py MEMORY DONE SOCKET...    descriptors: shared memory, a pipe, one socket for each reader
"""

from __future__ import annotations

import array
import mmap
import os
import struct
import sys
from _socket import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Jobs(Protocol):
        """The socket that jobs come from."""

        def recvmsg(self, bufsize: int, ancbufsize: int, /) -> tuple[bytes, list[Any], int, Any]:
            """A message, and what came along."""
            ...


JOB = struct.Struct("=QQQIII")
"""First byte of the file, how many, where in the memory they go, the most that one read takes, the
number of the file, and the number of the job. No bytes at all: close every file."""

DONE = struct.Struct("=IIQ")
"""Number of the reader, number of the job, bytes read. Fewer than were asked for: the file ended, or
a read failed; whoever asked finds out by reading on."""

READY, CLOSED = 0xFFFFFFFF, 0xFFFFFFFE
"""Number of the job in the first answer of a reader, and in that to a request to close."""

_ONE_DESCRIPTOR = 32  # CMSG_SPACE of one, with room to spare


def serve(
    reader: int, jobs: Jobs, done: int, memory: memoryview, files: dict[int, int] | None = None
) -> None:
    """Do jobs until the other side closes the socket.

    Args:
        reader: Number of this one, given in its answers.
        jobs: A socket of whole messages; see :data:`JOB`.
        done: The writing end of the pipe for answers; see :data:`DONE`.
        memory: Where bytes go.
        files: Descriptors by number of the file, of who asks; if left out, those that come along.
    """
    own: dict[int, int] = {}
    known = own if files is None else files
    try:
        os.write(done, DONE.pack(reader, READY, 0))
        while True:
            message, along, _, _ = jobs.recvmsg(JOB.size, _ONE_DESCRIPTOR)
            if not message:
                return
            offset, length, place, most, file, number = JOB.unpack(message)
            for _, _, data in along:
                own[file] = array.array("i", data[:4])[0]
            if length:
                room = memory[place : place + length]
                got = read(known[file], offset, room, most) if file in known else 0
                os.write(done, DONE.pack(reader, number, got))
            else:
                _close(own)
                os.write(done, DONE.pack(reader, CLOSED, 0))
    except (BrokenPipeError, ConnectionError):
        return  # nobody waits for an answer any more
    finally:
        _close(own)


def read(file: int, offset: int, room: memoryview, most: int) -> int:
    """Fill ``room`` from byte ``offset`` on, ``most`` bytes a read; returns how many came."""
    got = 0
    while got < len(room):
        try:
            count = os.preadv(file, [room[got : got + most]], offset + got)
        except OSError:
            break
        if count == 0:
            break
        got += count
    return got


def _close(files: dict[int, int]) -> None:
    for descriptor in files.values():
        os.close(descriptor)
    files.clear()


def touch(memory: memoryview) -> None:
    """Have the kernel find the pages of some memory, which is quicker by many at once."""
    for position in range(0, len(memory), mmap.PAGESIZE):
        memory[position] = 0


def _fork(reader: int, sockets: list[int], done: int, memory: memoryview) -> None:
    if os.fork():
        return
    share = -(-len(memory) // len(sockets))
    touch(memory[reader * share : (reader + 1) * share])
    for number, descriptor in enumerate(sockets):
        if number != reader:
            os.close(descriptor)  # or its reader would not see the other side go
    try:
        serve(reader, socket(fileno=sockets[reader]), done, memory)
    finally:
        os._exit(0)


def main(shared: int, done: int, *sockets: int) -> None:
    """Have a process for each socket, and end when all of them have."""
    memory = memoryview(mmap.mmap(shared, os.fstat(shared).st_size))
    for reader in range(len(sockets)):
        _fork(reader, list(sockets), done, memory)
    for descriptor in (done, *sockets):
        os.close(descriptor)
    for _ in sockets:
        os.wait()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
