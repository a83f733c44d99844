"""Page-locked host memory.

``cudaHostAlloc`` takes 0.37 to 0.54 s/GiB on an H200 host. Registering memory takes 0.06 s/GiB once it
was touched, which is quickest in huge pages.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from typing import Any

import torch

from weightlift.loading.pages import HUGE_PAGE

logger = logging.getLogger("weightlift")


def _cudart() -> Any:
    return torch.cuda.cudart()


_FOR_ALL_DEVICES = 1  # cudaHostRegisterPortable


def page_aligned(nbytes: int) -> torch.Tensor:
    """Memory that starts on a page, in huge pages where there are any and it fills one: flat uint8.

    Children that are forked do not have it: to give it to them, the kernel would copy what is pinned.
    """
    unit = HUGE_PAGE if nbytes >= HUGE_PAGE else mmap.PAGESIZE
    memory = mmap.mmap(-1, nbytes + unit, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    if unit == HUGE_PAGE:
        with contextlib.suppress(OSError):  # a kernel without huge pages: only slower
            memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % unit
    return torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=nbytes)


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
