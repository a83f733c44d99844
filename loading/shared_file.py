"""A file in shared memory that is mapped and page-locked, for a device to copy from.

What is locked are pages. A file that is cut off and written again, as ``open(..., "wb")`` does, has others.
The kernel unmaps what is cut off, and ``/proc/self/pagemap`` tells, as long as nobody touches it: the host
never does. The file's last page is among those that are cut off, whatever is.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

import torch

from weightlift.loading.errors import CheckpointError
from weightlift.loading.files import Identity
from weightlift.loading.pages import are_mapped, keep_mapped, map_for_reading
from weightlift.loading.staging import register, unregister

PIECE_BYTES = 1 << 30
"""Page-locked at a time: ``cudaHostRegister`` holds up other CUDA calls of the process meanwhile."""


class SharedFile:
    """A file that is mapped, and page-locked piece by piece.

    Args:
        path: The file, on a filesystem in memory.
        identity: Which file it was when it was loaded.

    Raises:
        OSError: It is another one now, cannot be mapped, or may not be written to, which locking asks for;
            or the kernel does not tell what is mapped.
    """

    def __init__(self, path: str, identity: Identity) -> None:
        self.path = path
        self.size = identity[2]
        self.key = identity[:2]
        self._locked = 0
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._descriptors = [os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)]
        try:
            self._descriptors.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            facts = os.fstat(self._descriptors[1])
            if (facts.st_dev, facts.st_ino, facts.st_size) != identity[:3]:
                raise OSError("another file has taken its place")
            mapped = mmap.mmap(self._descriptors[1], self.size)
            mapped.madvise(mmap.MADV_DONTFORK)
            self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
            keep_mapped(self._memory.data_ptr(), self.size)
        except ValueError as error:  # it was cut off since
            self.close()
            raise OSError(str(error)) from error
        except BaseException:
            self.close()
            raise

    def lock(self, may_go_on: Callable[[], bool]) -> bool:
        """Page-lock all of it; False if that may not go on, or the file was cut off meanwhile.

        Args:
            may_go_on: Asked before each piece; may wait.

        Raises:
            OSError: It cannot be mapped or locked.
        """
        address = self._memory.data_ptr()
        map_for_reading(address, self.size)  # locking maps pages as if to write: that is a change
        while self._locked < self.size:
            piece = self._memory[self._locked : self._locked + PIECE_BYTES]
            if not may_go_on():
                return False
            if not register(piece):
                raise OSError("its pages cannot be locked")
            self._locked += len(piece)
        return self.is_current() and are_mapped(self._descriptors[0], address, self.size)

    @property
    def is_deleted(self) -> bool:
        """Whether nobody can open the file any more, as when another was put in its place."""
        return not os.fstat(self._descriptors[1]).st_nlink

    def is_current(self) -> bool:
        """Whether the pages that are locked are still the file's."""
        if os.fstat(self._descriptors[1]).st_size != self.size:
            return False
        return are_mapped(self._descriptors[0], self._memory.data_ptr() + self.size - 1, 1)

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
        self.forget()
        return freed

    def forget(self) -> None:
        """In a forked child, which has no such mapping: close the parent's files."""
        while self._descriptors:
            os.close(self._descriptors.pop())
