"""Reading one shard: positioned, counted, bounded by the size the file had when it was opened."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import threading
import time
from collections.abc import Sequence

import torch

from weightlift.loading.buffers import Buffer, Locked, Staged, after
from weightlift.loading.crew_spec import DIRECT_READ_BYTES, Way
from weightlift.loading.errors import CheckpointError
from weightlift.loading.pages import PAGE
from weightlift.loading.residency import PageCache, can_bypass_cache

IOV_MAX: int = os.sysconf("SC_IOV_MAX")
_numbers = itertools.count(1)

Identity = tuple[int, int, int, int]
"""Device, inode, bytes, and time of change in nanoseconds: a file rewritten is another one."""


class ShardFile:
    """An open file, safe to read from many threads.

    Attributes:
        path: As it was opened.
        size: Bytes, when it was opened.
        identity: Which file it is.
        staged: What of it is in memory already.
        locked: Its own pages, where they are page-locked.
        direct_io: Whether :meth:`fetch` reads past the page cache: ``auto`` for what is not in it,
            on a local filesystem; ``on`` or ``off``.
        bytes_read: Bytes that came from it.
        first_read_at, last_read_at: When some did first and last, by ``perf_counter``; 0 for never.
        bytes_direct: Those of them that were read past the page cache.
        bytes_staged: Bytes that were in memory already, staged or locked.
    """

    def __init__(self, path: str, descriptor: int, size: int, identity: Identity) -> None:
        self.path = path
        self.size = size
        self.identity = identity
        self.staged: Staged | None = None
        self.locked: Locked | None = None
        self.direct_io = "auto"
        self.bytes_read = 0
        self.first_read_at = self.last_read_at = 0.0
        self.bytes_direct = 0
        self.bytes_staged = 0
        self._descriptor = descriptor
        self._direct: int | None = None
        self._numbers = next(_numbers), next(_numbers)
        self._page_cache: PageCache | None = None
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
                size = min(offset, os.fstat(self._descriptor).st_size)
                raise CheckpointError(self.path, f"it ends at byte {size}: truncated while read")
            self.count(got)
            offset += got
            waiting = after(waiting, got)

    def count(self, nbytes: int, *, is_direct: bool = False) -> None:
        """Note that so many bytes came from the file, perhaps past the page cache."""
        with self._counting:
            self.last_read_at = time.perf_counter()
            self.first_read_at = self.first_read_at or self.last_read_at
            self.bytes_read += nbytes
            self.bytes_direct += nbytes if is_direct else 0

    @property
    def times(self) -> tuple[str, float, float, int]:
        """Its name, when it was first and last read, and how many bytes."""
        return os.path.basename(self.path), self.first_read_at, self.last_read_at, self.bytes_read

    def way(self, *, is_direct: bool) -> Way:
        """How others are to read it, perhaps past the page cache; see :meth:`is_direct`."""
        if is_direct:
            return Way(self._numbers[1], self._direct_descriptor(), PAGE)
        return Way(self._numbers[0], self._descriptor, 1)

    def staged_view(self, start: int, stop: int) -> torch.Tensor | None:
        """The bytes from ``start`` to ``stop`` where they are in memory already: flat uint8."""
        if self.staged is None:
            return None
        view = self.staged.view(start, stop)
        if view is not None:
            self._count_staged(stop - start)
        return view

    def locked_view(self, start: int, stop: int) -> torch.Tensor | None:
        """The file's own pages from byte ``start`` to ``stop``, if a device may copy from there: flat uint8."""
        view = self.locked.view(start, stop) if self.locked is not None else None
        if view is not None:
            self._count_staged(stop - start)
        return view

    def _count_staged(self, nbytes: int) -> None:
        with self._counting:
            self.bytes_staged += nbytes

    def fetch(self, start: int, stop: int, room: Buffer) -> int:
        """Read the bytes from ``start`` to ``stop``, past the page cache where that is quicker.

        Args:
            start: First byte.
            stop: The byte after the last.
            room: Where they go: memory that starts on a page and is two pages longer than they are.

        Returns:
            Where in ``room`` they begin.

        Raises:
            CheckpointError: The file ends before them, or the device fails.
        """
        if self.staged is None and self.is_direct(start, stop):
            before = start % PAGE
            if self._fetch_directly(start - before, stop, room):
                return before
        self.read_into(start, [room[: stop - start]])
        return 0

    def is_direct(self, start: int, stop: int) -> bool:
        """Whether :meth:`fetch` would read these bytes past the page cache."""
        if self.direct_io == "off" or self._direct_descriptor() < 0:
            return False
        if self.direct_io == "on":
            return True
        assert self._page_cache is not None
        with contextlib.suppress(OSError):  # the file was cut short; the read will say so
            return self._page_cache.is_cold(start, stop)
        return False

    def _direct_descriptor(self) -> int:
        """The file opened a second time, past the page cache; -1 if it does not allow that."""
        if self._direct is None:
            with self._counting:
                if self._direct is None:
                    self._direct = self._open_directly()
        return self._direct

    def _open_directly(self) -> int:
        is_local = self.size > 0 and can_bypass_cache(self.identity[0])
        if self.direct_io == "auto" and not is_local:
            return -1
        try:
            self._page_cache = PageCache(self._descriptor, self.size)
            # By descriptor: the path may be another file by now.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT
            return os.open(f"/proc/self/fd/{self._descriptor}", flags)
        except OSError:  # not this filesystem, or no /proc: through the cache, then
            return -1

    def _fetch_directly(self, start: int, stop: int, room: Buffer) -> bool:
        """Read whole pages; False if that fails, for reading through the cache says why."""
        descriptor, position = self._direct_descriptor(), start
        while position < stop:
            length = min(DIRECT_READ_BYTES, -(-(stop - position) // PAGE) * PAGE)
            place = position - start
            try:
                got = os.preadv(descriptor, [room[place : place + length]], position)
            except OSError:
                self.direct_io = "off"
                return False
            self.count(got, is_direct=True)
            position += got
            if position < stop and (got == 0 or got % PAGE):
                return False
        return True

    def cached_bytes(self) -> int:
        """How many bytes of the file are in the page cache."""
        if self.size == 0:
            return 0
        with contextlib.closing(PageCache(self._descriptor, self.size)) as cache:
            return cache.cached_bytes()

    def drop_cache(self) -> None:
        """Ask the kernel to forget the clean pages of this file."""
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file; once is enough, twice does no harm."""
        descriptors = self._descriptor, self._direct
        self._descriptor = self._direct = -1
        for descriptor in descriptors:
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        cache, self._page_cache = self._page_cache, None
        if cache is not None:
            cache.close()
