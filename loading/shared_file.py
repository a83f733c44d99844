"""A file in shared memory that is mapped and page-locked, for a device to copy from.

What is locked are pages. A file that is cut off and written again, as ``open(..., "wb")`` does, has others.
The kernel unmaps what is cut off, and ``/proc/self/pagemap`` tells.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence

import torch

from weightlift.loading.errors import CheckpointError
from weightlift.loading.files import Identity
from weightlift.loading.residency import PAGE
from weightlift.loading.staging import register, unregister

PIECE_BYTES = 1 << 30
"""Page-locked at a time: ``cudaHostRegister`` holds up other CUDA calls of the process meanwhile."""

_ENTRY_BYTES = 8
_PRESENT = 0x80  # bit 63, in the last byte of an entry of the pagemap


class SharedFile:
    """A file that is mapped, and page-locked piece by piece. The host never touches the mapping: that
    would map a page again, and hide that it was cut off.

    Args:
        path: The file, on a filesystem in memory.
        identity: Which file it was when it was loaded.

    Raises:
        OSError: It is another one now, cannot be mapped, or may not be written to, which locking asks for.
    """

    def __init__(self, path: str, identity: Identity) -> None:
        self.path = path
        self.size = identity[2]
        self.key = identity[:2]
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            facts = os.fstat(self._descriptor)
            if (facts.st_dev, facts.st_ino, facts.st_size) != identity[:3]:
                raise OSError("another file has taken its place")
            mapped = mmap.mmap(self._descriptor, self.size)
            mapped.madvise(mmap.MADV_DONTFORK)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
        self._locked = 0

    def lock(self, wait: Callable[[], object]) -> bool:
        """Page-lock all of it; False, with a warning, if the host or the device does not have it.

        Args:
            wait: Called before each piece.
        """
        while self._locked < self.size:
            wait()
            piece = self._memory[self._locked : self._locked + PIECE_BYTES]
            if not register(piece):
                return False
            self._locked += len(piece)
        return self.is_current()

    @property
    def is_deleted(self) -> bool:
        """Whether nobody can open the file any more, as when another was put in its place."""
        return not os.fstat(self._descriptor).st_nlink

    def is_current(self) -> bool:
        """Whether the pages that are locked are still the file's."""
        if os.fstat(self._descriptor).st_size != self.size:
            return False
        first = self._memory.data_ptr()
        return _are_mapped(
            [first + at for at in (*range(0, self.size, PIECE_BYTES), self.size - 1)]
        )

    def view(self, start: int, stop: int) -> torch.Tensor | None:
        """The bytes from ``start`` to ``stop``, for the device alone; None if they are of two pieces."""
        if start // PIECE_BYTES != (stop - 1) // PIECE_BYTES:
            return None
        return self._memory[start:stop]

    def check(self) -> None:
        """See that what was copied from here was the file's.

        Raises:
            CheckpointError: The file was cut off meanwhile.
        """
        if not self.is_current():
            remedy = "Load again, once its writer is done."
            raise CheckpointError(self.path, "it was cut off while it was read", remedy=remedy)

    def close(self) -> int:
        """Free it; returns how many bytes were page-locked."""
        freed, self._locked = self._locked, 0
        for start in range(0, freed, PIECE_BYTES):
            unregister(self._memory[start:])
        self._memory = torch.empty(0, dtype=torch.uint8)
        os.close(self._descriptor)
        return freed


def _are_mapped(addresses: Sequence[int]) -> bool:
    """Whether these pages of this process are mapped, without touching them; False if nobody tells."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            entries = [
                os.pread(pagemap.fileno(), _ENTRY_BYTES, address // PAGE * _ENTRY_BYTES)
                for address in addresses
            ]
    except OSError:
        return False
    return all(len(entry) == _ENTRY_BYTES and entry[-1] & _PRESENT for entry in entries)
