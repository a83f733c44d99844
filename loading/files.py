"""Reading one shard: positioned, counted, bounded by the size the file had when it was opened."""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from weightlift.loading.errors import CheckpointError

IOV_MAX: int = os.sysconf("SC_IOV_MAX")
Buffer = memoryview
Identity = tuple[int, int, int, int]
"""Device, inode, bytes, and time of change in nanoseconds: a file rewritten is another one."""


class Staged(Protocol):
    """Bytes of a file that are in memory already."""

    def view(self, start: int, stop: int) -> torch.Tensor | None:
        """The bytes from ``start`` to ``stop``, if all of them are."""

    def read_into(self, start: int, buffers: Sequence[Buffer]) -> bool:
        """Fill these buffers from byte ``start`` on; False if not all of it is there."""
        ...


class ShardFile:
    """An open file, safe to read from many threads.

    ``bytes_read`` counts what came from it, ``bytes_staged`` what was in memory already.
    """

    def __init__(self, path: str, descriptor: int, size: int, identity: Identity) -> None:
        self.path = path
        self.size = size
        self.identity = identity
        self.staged: Staged | None = None
        self.bytes_read = 0
        self.bytes_staged = 0
        self._descriptor = descriptor
        self._counting = threading.Lock()

    @classmethod
    def open(cls, path: str) -> ShardFile:
        """Open for reading.

        Raises:
            CheckpointError: There is no such file, it may not be read, or it is a pipe or device.
        """
        remedy = "Check the path and its permissions; was the directory deleted meanwhile?"
        try:
            # Without blocking: opening a pipe waits for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise CheckpointError(path, f"cannot open it ({error})", remedy=remedy) from error
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            os.close(descriptor)
            raise CheckpointError(path, "it is not a regular file", remedy=remedy)
        identity = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
        return cls(path, descriptor, facts.st_size, identity)

    def read(self, offset: int, length: int) -> bytearray:
        """``length`` bytes from byte ``offset``.

        Raises:
            CheckpointError: The file ends before them, or the device fails.
        """
        data = bytearray(length)
        self.read_into(offset, [memoryview(data)])
        return data

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill these buffers, one after the other, from byte ``offset`` on.

        The read is one ``preadv`` where the kernel gives all at once; it runs without the GIL.

        Raises:
            CheckpointError: The file ends before the last buffer is full, or the device fails.
        """
        if self.staged is not None and self.staged.read_into(offset, buffers):
            self._count_staged(sum(map(len, buffers)))
            return
        waiting = [buffer for buffer in buffers if len(buffer)]
        while waiting:
            try:
                got = os.preadv(self._descriptor, waiting[:IOV_MAX], offset)
            except OSError as error:
                raise CheckpointError(
                    self.path, f"reading byte {offset} failed: {error}"
                ) from error
            if got == 0:
                raise CheckpointError(self.path, f"it ends at byte {offset}: truncated while read")
            with self._counting:
                self.bytes_read += got
            offset += got
            waiting = _after(waiting, got)

    def staged_view(self, start: int, stop: int) -> torch.Tensor | None:
        """The bytes from ``start`` to ``stop`` where they are in memory already: flat uint8."""
        if self.staged is None:
            return None
        view = self.staged.view(start, stop)
        if view is not None:
            self._count_staged(stop - start)
        return view

    def _count_staged(self, nbytes: int) -> None:
        with self._counting:
            self.bytes_staged += nbytes

    def cached_bytes(self) -> int:
        """How many bytes of the file are in the page cache (``mincore``)."""
        if self.size == 0:
            return 0
        # Private and writable, for ctypes takes the address of writable memory alone.
        flags, access = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
        with mmap.mmap(self._descriptor, self.size, flags, access) as mapping:
            pages = bytearray(-(-self.size // mmap.PAGESIZE))
            first = ctypes.c_char.from_buffer(mapping)
            result = (ctypes.c_char * len(pages)).from_buffer(pages)
            failed = _LIBC.mincore(ctypes.byref(first), ctypes.c_size_t(self.size), result)
            del first, result
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", self.path)
        resident = sum(page & 1 for page in pages)
        return min(resident * mmap.PAGESIZE, self.size)

    def drop_cache(self) -> None:
        """Ask the kernel to forget the clean pages of this file."""
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file; once is enough, twice does no harm."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


_LIBC = ctypes.CDLL(None, use_errno=True)


def _after(buffers: list[Buffer], got: int) -> list[Buffer]:
    """What is left of these buffers once the first ``got`` bytes are filled."""
    for position, buffer in enumerate(buffers):
        if got < len(buffer):
            return [buffer[got:], *buffers[position + 1 :]]
        got -= len(buffer)
    return []


def memory_of(tensor: torch.Tensor) -> Buffer:
    """The bytes of a contiguous CPU tensor, writable. It must outlive the result."""
    length = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * length).from_address(tensor.data_ptr())).cast("B")
