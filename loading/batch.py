"""Many copies in one call: ``cudaMemcpyBatchAsync`` of the CUDA runtime, which torch does not offer.

On an H200, windows of 8 MiB that hold tensors of 64 KiB go to the device at 54.2 GB/s this way and
at 14.8 GB/s by a ``copy_`` each, which costs 5 us of Python a tensor. Where the runtime is older than
CUDA 12.8, the driver makes the copies one by one.

https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__MEMORY.html
"""

from __future__ import annotations

import array
import ctypes
import functools
import logging
from collections.abc import Callable, Sequence

import torch

logger = logging.getLogger("weightlift")

FEW = 64
"""So many copies are asked for with the interpreter lock held: to get it back from an engine that
plans takes longer than they do."""

_IN_STREAM_ORDER = 1  # cudaMemcpySrcAccessOrderStream
_FAILURE_INDEX_UNTIL = 13  # CUDA 12.8 and 12.9 take one argument more, for the copy that failed


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    )


class BatchCopy:
    """Copies lists of ranges from pinned to device memory.

    Attributes:
        is_available: Whether runtime and driver can copy a list in one call; the first one may show
            that they cannot.
    """

    def __init__(self) -> None:
        self.is_available = False
        driver = "libcuda.so.1"
        self._copy_one: Callable[..., int] = ctypes.CDLL(driver).cuMemcpyHtoDAsync_v2
        self._copy_one_of_few: Callable[..., int] = ctypes.PyDLL(driver).cuMemcpyHtoDAsync_v2
        self._major = int((torch.version.cuda or "0").split(".")[0])
        library = f"libcudart.so.{self._major}"
        try:
            self._runtime = ctypes.CDLL(library)
            self._copy: Callable[..., int] = self._runtime.cudaMemcpyBatchAsync
            self._copy_few: Callable[..., int] = ctypes.PyDLL(library).cudaMemcpyBatchAsync
        except (OSError, AttributeError):  # older than CUDA 12.8, or linked in statically
            return
        self.is_available = True
        self._attributes = _Attributes(source_access_order=_IN_STREAM_ORDER)
        self._first = ctypes.c_size_t(0)

    def __call__(
        self,
        targets: Sequence[int],
        sources: Sequence[int],
        sizes: Sequence[int],
        stream: torch.cuda.Stream,
    ) -> None:
        """Copy ``sizes`` bytes from these addresses to those, in the order of ``stream``.

        Raises:
            RuntimeError: The driver cannot.
        """
        handle = ctypes.c_void_p(stream.cuda_stream)
        if self.is_available:
            error = self._batch(targets, sources, sizes, handle)
            if not error:
                return
            self._give_up(error)
        copy = self._copy_one_of_few if len(sizes) <= FEW else self._copy_one
        for target, source, size in zip(targets, sources, sizes, strict=True):
            addresses = ctypes.c_uint64(target), ctypes.c_void_p(source), ctypes.c_size_t(size)
            if error := copy(*addresses, handle):
                raise RuntimeError(
                    f"a copy of {size} bytes to the device failed: CUDA error {error}"
                )

    def _batch(
        self,
        targets: Sequence[int],
        sources: Sequence[int],
        sizes: Sequence[int],
        handle: ctypes.c_void_p,
    ) -> int:
        lists = [array.array("Q", values) for values in (targets, sources, sizes)]
        failed = ctypes.c_size_t(0)
        copy = self._copy_few if len(sizes) <= FEW else self._copy
        return copy(
            *(ctypes.c_void_p(values.buffer_info()[0]) for values in lists),
            ctypes.c_size_t(len(sizes)),
            ctypes.byref(self._attributes),
            ctypes.byref(self._first),
            ctypes.c_size_t(1),
            *((ctypes.byref(failed),) if self._major < _FAILURE_INDEX_UNTIL else ()),
            handle,
        )

    def _give_up(self, error: int) -> None:
        self.is_available = False
        self._runtime.cudaGetLastError()  # or the next kernel would be blamed for it
        logger.info(
            "weightlift: lists of copies fail in this CUDA runtime (error %d); from now on the "
            "driver makes them one by one",
            error,
        )


@functools.cache
def batch_copy() -> BatchCopy:
    """The one of this process."""
    return BatchCopy()
