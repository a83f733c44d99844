"""The pinned ring: page-locked host memory, allocated once a process and kept across loads.

Pinning is dear: ``cudaHostAlloc`` takes 0.37 to 0.54 s/GiB on an H200 host. Registering memory takes
0.06 s/GiB once it was touched, which is quickest in huge pages, so that is what the ring does.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import queue
import threading
from typing import Any

import torch

logger = logging.getLogger("weightlift")


class PinnedRing:
    """Page-locked slots of equal size, pinned when first needed and handed around from then on.

    Who will take slots reserves them first, so that nobody waits for a slot that is not coming.
    """

    def __init__(self) -> None:
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self._counting = threading.Lock()
        self._reserved = 0
        self._pinned = 0

    def reserve(self, slots: int) -> None:
        """Allow this many more slots to be out at once; fewer, if negative."""
        with self._counting:
            self._reserved += slots

    def take(self, nbytes: int) -> torch.Tensor:
        """A slot of ``nbytes``, the same for all: a flat uint8 CPU tensor.

        Raises:
            OSError: The host has no such memory.
        """
        while True:
            with self._counting:
                with contextlib.suppress(queue.Empty):
                    return self._free.get_nowait()
                must_pin = self._pinned < self._reserved
                self._pinned += must_pin
            if must_pin:
                return self._pin(nbytes)
            with contextlib.suppress(queue.Empty):  # who was pinning it may have failed
                return self._free.get(timeout=_LOOK_AGAIN_SECONDS)

    def fill(self, slots: int, nbytes: int) -> None:
        """Pin slots of ``nbytes`` until there are this many, so that takers need not."""
        while True:
            with self._counting:
                if self._pinned >= slots:
                    return
                self._pinned += 1
            self._free.put(self._pin(nbytes))

    def give(self, slot: torch.Tensor) -> None:
        """Give a slot back, once the device is done with it."""
        self._free.put(slot)

    def release(self) -> int:
        """Free the slots that are not out; returns their bytes. They are pinned anew when needed."""
        freed = 0
        with contextlib.suppress(queue.Empty):
            while True:
                slot = self._free.get_nowait()
                freed += slot.numel()
                unregister(slot)
                with self._counting:
                    self._pinned -= 1
        return freed

    def _pin(self, nbytes: int) -> torch.Tensor:
        """A new slot, already counted. No lock is held: threads touch their pages at once."""
        try:
            slot = pinned(nbytes)
        except BaseException:
            with self._counting:
                self._pinned -= 1
            raise
        return slot


def _cudart() -> Any:
    return torch.cuda.cudart()


_LOOK_AGAIN_SECONDS = 1.0
_FOR_ALL_DEVICES = 1  # cudaHostRegisterPortable


def pinned(nbytes: int) -> torch.Tensor:
    """Page-locked memory that starts on a page; pageable with a warning if it cannot be locked."""
    tensor = page_aligned(nbytes)
    tensor.zero_()
    register(tensor)
    return tensor


def page_aligned(nbytes: int) -> torch.Tensor:
    """Memory that starts on a page, in huge pages where there are any: flat uint8."""
    memory = mmap.mmap(-1, nbytes)
    with contextlib.suppress(OSError):  # a kernel without huge pages: only slower
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def register(memory: torch.Tensor) -> bool:
    """Page-lock memory that was touched; False, with a warning, if it cannot be."""
    nbytes = memory.numel()
    error = _cudart().cudaHostRegister(memory.data_ptr(), nbytes, _FOR_ALL_DEVICES)
    if int(error):
        logger.warning(
            "weightlift: cannot pin %d bytes (CUDA error %s); loading will be slower. "
            "Check the locked-memory limit (ulimit -l) and free host memory.",
            *(nbytes, error),
        )
        _forget_error()
    return not int(error)


def unregister(memory: torch.Tensor) -> None:
    """Undo :func:`register`, by the first byte; nothing happens to what is not page-locked."""
    if int(_cudart().cudaHostUnregister(memory.data_ptr())):
        _forget_error()


def _forget_error() -> None:
    """Or the next kernel would be blamed for it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


_ring: PinnedRing | None = None
_making = threading.Lock()


def pinned_ring() -> PinnedRing:
    """The ring of this process."""
    global _ring
    with _making:
        _ring = _ring or PinnedRing()
        return _ring


def _forget() -> None:
    """A forked child has neither the parent's CUDA context nor its locks."""
    global _ring, _making
    _ring, _making = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
