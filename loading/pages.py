"""Pages of this process's memory: have the kernel find them, and ask whether they are mapped."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Iterator

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20
COLLAPSE = 25  # MADV_COLLAPSE, of Linux 6.1
POPULATE_READ, POPULATE_WRITE = 22, 23  # MADV_POPULATE_READ and the like, of Linux 5.14
PATIENCE = 0.02
"""Seconds after which a thread asks for no more huge pages: the kernel has to look for them. Four take 8 ms."""

_ONLY_WHEN_MAPPED = 1  # MLOCK_ONFAULT
_ENTRY_BYTES = 8
_IS_MAPPED = bytes(int(last >= 1 << 6) for last in range(256))
"""By the last byte of an entry: present, or about to be, as a page is which is being moved."""

_AT_ONCE = 1 << 17
_AT_THIS_ADDRESS = 0x10  # MAP_FIXED
_CLOSE_ON_EXEC = 1  # MFD_CLOEXEC

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p


def memory_file() -> int:
    """A file without a name, in memory; -1 if there is no such thing here.

    By the C library: Python has it only if it was built against one of 2018 or later.
    """
    try:
        return int(_LIBC.memfd_create(b"weightlift-ring", _CLOSE_ON_EXEC))
    except AttributeError:
        return -1


def map_shared(descriptor: int, nbytes: int) -> memoryview:
    """All of a file in memory, mapped from where a huge page may begin.

    Raises:
        OSError: The host has no such memory.
    """
    # Its addresses are kept, and given back, by a mapping that this one takes the place of
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    room = memoryview(mmap.mmap(-1, nbytes + HUGE_PAGE, flags=private))
    start = -address_of(room) % HUGE_PAGE
    found = room[start : start + nbytes]
    access, how = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _AT_THIS_ADDRESS
    where, size = ctypes.c_void_p(address_of(found)), ctypes.c_size_t(nbytes)
    if _LIBC.mmap(where, size, access, how, descriptor, ctypes.c_long(0)) != where.value:
        raise OSError(ctypes.get_errno(), "mmap")
    return found


def address_of(memory: memoryview) -> int:
    """Where writable memory begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def touch(address: int, nbytes: int) -> None:
    """Have all pages of some memory there, to be written to; other threads go on meanwhile.

    Raises:
        OSError: The host has no such memory.
    """
    if not _populate(address, nbytes, POPULATE_WRITE):
        ctypes.memset(address, 0, nbytes)  # a third slower


def collapse(address: int, nbytes: int) -> int:
    """Have the kernel put shared memory that holds nothing yet into huge pages, as far as it has any.

    To a disk each page is a segment, and a request takes so many of them: twelve threads that read past
    the page cache got 1.75 GB/s on an H100 host into huge pages, 1.33 into others.

    Args:
        address: The first byte.
        nbytes: How many. What does not fill a huge page stays as it is.

    Returns:
        How many huge pages there are.

    Raises:
        OSError: The host has no such memory.
    """
    first, stop, made = address + -address % HUGE_PAGE, address + nbytes, 0
    until = time.monotonic() + PATIENCE
    for page in range(first, stop - HUGE_PAGE + 1, HUGE_PAGE):
        # Where there is nothing the kernel collapses nothing
        is_there = _populate(page, PAGE, POPULATE_WRITE)
        refused = _LIBC.madvise(ctypes.c_void_p(page), ctypes.c_size_t(HUGE_PAGE), COLLAPSE)
        if not is_there or (refused and ctypes.get_errno() == errno.EINVAL):
            break  # it cannot
        made += not refused
        if time.monotonic() > until:
            break
    return made


def map_pages(address: int, nbytes: int) -> None:
    """Have the kernel map all pages of some memory that is there into this process, if it can.

    It would at the first read into each: 96 MiB were filled in 47 ms that way, in 12 ms when mapped, which
    took 22; in huge pages it takes none.
    """
    _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), POPULATE_WRITE)


def map_for_reading(address: int, nbytes: int) -> None:
    """Have all pages of a mapped file mapped, without changing when it was written to.

    Raises:
        OSError: The file is shorter.
    """
    if not _populate(address, nbytes, POPULATE_READ):
        raise OSError(errno.EINVAL, "needs Linux 5.14")


def keep_mapped(address: int, nbytes: int) -> None:
    """Have the kernel never unmap these pages to save memory.

    Raises:
        OSError: This user may not ask for that (``ulimit -l``).
    """
    if not hasattr(_LIBC, "mlock2"):
        raise OSError(errno.ENOSYS, "needs glibc 2.27")
    size = ctypes.c_size_t(nbytes)
    if _LIBC.mlock2(ctypes.c_void_p(address), size, _ONLY_WHEN_MAPPED):
        raise OSError(ctypes.get_errno(), "mlock2: raise the limit of locked memory (ulimit -l)")


def are_mapped(pagemap: int, address: int, nbytes: int) -> bool:
    """Whether all pages of some memory are mapped, without touching them.

    Args:
        pagemap: A descriptor of ``/proc/self/pagemap``.
        address: The first byte.
        nbytes: How many.

    Raises:
        OSError: The kernel does not tell.
    """
    return all(0 not in mapped for mapped in _mapped(pagemap, address, nbytes))


def are_untouched(address: int, nbytes: int) -> bool:
    """Whether this process never wrote to or read some memory; False where the kernel does not tell.

    Of private memory without a file, that is to say that it holds nothing.
    """
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not any(1 in mapped for mapped in _mapped(pagemap, address, nbytes))
    except OSError:
        return False
    finally:
        os.close(pagemap)


def _mapped(pagemap: int, address: int, nbytes: int) -> Iterator[bytearray]:
    """For each page, in stretches, whether it is mapped: 1 or 0."""
    first, last = address // PAGE, (address + nbytes - 1) // PAGE
    for page in range(first, last + 1, _AT_ONCE):
        count = min(_AT_ONCE, last + 1 - page)
        room = bytearray(count * _ENTRY_BYTES)
        if os.preadv(pagemap, [room], page * _ENTRY_BYTES) < len(room):
            raise OSError(errno.EIO, "/proc/self/pagemap is cut short")
        yield room[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(_IS_MAPPED)


def _populate(address: int, nbytes: int, how: int) -> bool:
    """False where the kernel cannot do that."""
    if not _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), how):
        return True
    if ctypes.get_errno() == errno.EINVAL:
        return False
    raise OSError(ctypes.get_errno(), "madvise")
