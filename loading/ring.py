"""Shared memory that readers fill and the device fetches from, page-locked once the pages are there."""

from __future__ import annotations

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

from weightlift.loading.pages import HUGE_PAGE, collapse, map_shared, touch
from weightlift.loading.staging import register, unregister

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_CLOSE_ON_EXEC = 1  # MFD_CLOEXEC


class SharedRing:
    """A range of memory that processes can map by its descriptor.

    Args:
        nbytes: How long it is.

    Attributes:
        descriptor: For other processes to map; -1 where the kernel has none.
        memory: All of it: flat uint8, on the CPU.
        view: The same for reads.
        is_pinned: Whether it is page-locked.

    Raises:
        OSError: The host has no such memory.
    """

    def __init__(self, nbytes: int) -> None:
        self.descriptor = _memory_file()
        try:
            if self.descriptor >= 0:
                os.ftruncate(self.descriptor, nbytes)
                self.view = map_shared(self.descriptor, nbytes)
            else:
                self.view = memoryview(mmap.mmap(-1, nbytes))
        except BaseException:
            self._close()
            raise
        with torch.inference_mode(mode=False):
            self.memory = torch.frombuffer(self.view, dtype=torch.uint8)
        self.is_pinned = self._is_touched = False

    def get_ready(self, threads: int, *, pinned: bool) -> None:
        """Have the kernel find all pages, by so many threads, and page-lock them if that can be.

        Raises:
            OSError: The host has no such memory.
        """
        if not self._is_touched:
            share = -(-self.memory.numel() // (threads * HUGE_PAGE)) * HUGE_PAGE
            parts = [(part.data_ptr(), part.numel()) for part in self.memory.split(share)]
            try:
                with ThreadPoolExecutor(threads, "weightlift-touch") as pool:
                    list(pool.map(_find, *zip(*parts, strict=True)))
            except RuntimeError:  # there are too many threads: one after the other, then
                for part in parts:
                    _find(*part)
            self._is_touched = True
        if pinned and not self.is_pinned:
            self.is_pinned = register(self.memory)

    def release(self) -> int:
        """Free it; returns its bytes."""
        nbytes = self.memory.numel()
        if self.is_pinned:
            unregister(self.memory)
        self.is_pinned = False
        self.memory, self.view = torch.empty(0, dtype=torch.uint8), memoryview(b"")
        self._close()
        return nbytes

    def forget(self) -> None:
        """In a forked child: let go of the parent's file."""
        self._close()

    def _close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def _memory_file() -> int:
    """A file without a name, in memory; -1 if there is no such thing here.

    By the C library: Python has it only if it was built against one of 2018 or later.
    """
    try:
        return int(_LIBC.memfd_create(b"weightlift-ring", _CLOSE_ON_EXEC))
    except AttributeError:
        return -1


def _find(address: int, nbytes: int) -> None:
    """Have all pages of some memory there, in huge ones where that can be."""
    collapse(address, nbytes)
    touch(address, nbytes)
