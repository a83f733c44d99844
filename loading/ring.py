"""Shared memory that readers fill and the device fetches from, page-locked once the pages are there."""

from __future__ import annotations

import logging
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from weightlift.loading.pages import HUGE_PAGE, collapse, map_shared, memory_file, touch
from weightlift.loading.staging import register, unregister

logger = logging.getLogger("weightlift")


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
        self.descriptor = memory_file()
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

    def find_pages(self, threads: int) -> None:
        """Have the kernel find all pages, by so many threads; once.

        Raises:
            OSError: The host has no such memory.
        """
        if self._is_touched:
            return
        share = -(-self.memory.numel() // (threads * HUGE_PAGE)) * HUGE_PAGE
        parts = [(part.data_ptr(), part.numel()) for part in self.memory.split(share)]
        try:
            with ThreadPoolExecutor(threads, "weightlift-touch") as pool:
                huge = sum(pool.map(_find, *zip(*parts, strict=True)))
        except RuntimeError:  # there are too many threads: one after the other, then
            huge = sum(_find(*part) for part in parts)
        self._is_touched = True
        what = huge, self.memory.numel() / HUGE_PAGE
        logger.debug("weightlift: readers' memory is in %d huge pages of %.1f", *what)

    def lock(self) -> None:
        """Page-lock it, once its pages were found, if that can be."""
        if not self.is_pinned:
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


def _find(address: int, nbytes: int) -> int:
    """Have all pages of some memory there; how many of them are huge."""
    made = collapse(address, nbytes)
    touch(address, nbytes)
    return made
