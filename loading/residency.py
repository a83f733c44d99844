"""Where the bytes of a file are: in the page cache, or on a disk that can be read past it."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from pathlib import Path

from weightlift.loading.pages import PAGE

SAMPLES = 4
"""Pages of a stretch that are looked at. One that is not cached makes the stretch cold."""

STRETCH = 32 << 20
"""Bytes that are judged together, once: to ask for each window cost a sixth of a load's Python."""

DIRECT_FILESYSTEMS = frozenset({"ext3", "ext4", "xfs", "f2fs"})
"""Local ones that read past the page cache at the disk's own rate. Network filesystems do better
with it: pages that one rank brought in serve the others."""

# Calls of a microsecond, which keep the interpreter lock: to get it back from busy readers takes more.
_LIBC = ctypes.PyDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LOWEST_BIT = bytes(number & 1 for number in range(256))
_FAILED = ctypes.c_void_p(-1).value


class PageCache:
    """Says which pages of an open file are cached, by ``mincore`` on a mapping that is never read.

    Linux tells that to who owns the file or may write to it; to others every page seems cached.

    Args:
        descriptor: The file, open for reading.
        size: Its bytes, not 0.

    Raises:
        OSError: It cannot be mapped.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._size = size
        arguments = (None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED)
        address = _LIBC.mmap(*arguments, descriptor, ctypes.c_long(0))
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), "mmap")
        self._address: int = address
        self._verdicts: dict[int, bool] = {}

    def is_cold(self, start: int, stop: int) -> bool:
        """Whether bytes from ``start`` to ``stop`` seem not to be cached, going by their stretches."""
        first, last = start // STRETCH, (stop - 1) // STRETCH
        return any(self._is_cold(stretch) for stretch in range(first, last + 1))

    def _is_cold(self, stretch: int) -> bool:
        verdict = self._verdicts.get(stretch)
        if verdict is None:
            first = stretch * STRETCH // PAGE
            last = min((stretch + 1) * STRETCH - 1, self._size - 1) // PAGE
            step = max(1, (last - first) // SAMPLES)
            pages = range(first, last + 1, step)
            verdict = any(not self._pages(page, 1)[0] & 1 for page in pages)
            self._verdicts[stretch] = verdict
        return verdict

    def cached_bytes(self) -> int:
        """Bytes of the file that are cached."""
        pages = self._pages(0, -(-self._size // PAGE))
        return min(pages.translate(_LOWEST_BIT).count(1) * PAGE, self._size)

    def close(self) -> None:
        """Unmap the file."""
        _LIBC.munmap(ctypes.c_void_p(self._address), ctypes.c_size_t(self._size))

    def _pages(self, first: int, count: int) -> bytes:
        found = ctypes.create_string_buffer(count)
        address = ctypes.c_void_p(self._address + first * PAGE)
        if _LIBC.mincore(address, ctypes.c_size_t(count * PAGE), found):
            raise OSError(ctypes.get_errno(), "mincore")
        return found.raw


def can_bypass_cache(device: int) -> bool:
    """Whether files on this device (``st_dev``) are best read directly when they are cold."""
    return _filesystems().get(device) in DIRECT_FILESYSTEMS


def is_in_memory(device: int) -> bool:
    """Whether files on this device (``st_dev``) are in memory and nowhere else."""
    return _filesystems().get(device) == "tmpfs"


@functools.lru_cache(maxsize=1)
def _filesystems() -> dict[int, str]:
    """Filesystem type by device, as mounted when a first file was asked about."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:  # no /proc: nothing is known, and everything is read through the cache
        return {}
    found = {}
    for line in lines:
        mount, _, kind = line.partition(" - ")
        major, minor = mount.split()[2].split(":")
        found[os.makedev(int(major), int(minor))] = kind.split()[0]
    return found
