"""Many copies in one call: ``cudaMemcpyBatchAsync`` of the CUDA runtime, which torch does not offer.

On an H200, windows of 8 MiB that hold tensors of 64 KiB go to the device at 54.2 GB/s this way and
at 14.8 GB/s by a ``copy_`` each, which costs 5 us of Python a tensor.

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

FEW = 16
"""So many copies are asked for in microseconds, with the interpreter lock held: with a dozen readers
about, to get it back takes longer than that."""

_IN_STREAM_ORDER = 1  # cudaMemcpySrcAccessOrderStream
_TO_DEVICE = 1  # cudaMemcpyHostToDevice
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
    """Copies lists of ranges from pinned to device memory, each list in one call.

    Attributes:
        is_available: Whether runtime and driver can; the first call may show that they cannot.
    """

    def __init__(self) -> None:
        self.is_available = False
        version = torch.version.cuda
        if not version:
            return
        self._major = int(version.split(".")[0])
        library = f"libcudart.so.{self._major}"
        try:
            self._runtime = ctypes.CDLL(library)
            self._copy: Callable[..., int] = self._runtime.cudaMemcpyBatchAsync
            with_lock = ctypes.PyDLL(library)
            self._copy_few: Callable[..., int] = with_lock.cudaMemcpyBatchAsync
            self._copy_one: Callable[..., int] = with_lock.cudaMemcpyAsync
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
    ) -> bool:
        """Copy ``sizes`` bytes from these addresses to those, in the order of ``stream``.

        Returns:
            Whether it could be asked for. If not, all must be copied otherwise, now and later.
        """
        if not self.is_available:
            return False
        if len(sizes) == 1:
            return self._one(targets[0], sources[0], sizes[0], stream)
        lists = [array.array("Q", values) for values in (targets, sources, sizes)]
        failed = ctypes.c_size_t(0)
        copy = self._copy_few if len(sizes) <= FEW else self._copy
        error = copy(
            *(ctypes.c_void_p(values.buffer_info()[0]) for values in lists),
            ctypes.c_size_t(len(sizes)),
            ctypes.byref(self._attributes),
            ctypes.byref(self._first),
            ctypes.c_size_t(1),
            *((ctypes.byref(failed),) if self._major < _FAILURE_INDEX_UNTIL else ()),
            ctypes.c_void_p(stream.cuda_stream),
        )
        return self._is_done(error)

    def _one(self, target: int, source: int, size: int, stream: torch.cuda.Stream) -> bool:
        addresses = ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size)
        return self._is_done(
            self._copy_one(*addresses, _TO_DEVICE, ctypes.c_void_p(stream.cuda_stream))
        )

    def _is_done(self, error: int) -> bool:
        if error:
            self.is_available = False
            self._runtime.cudaGetLastError()  # or the next kernel would be blamed for it
            logger.info(
                "weightlift: copies by the CUDA runtime fail here (error %d); from now on torch "
                "makes them, one by one",
                error,
            )
        return not error


@functools.cache
def batch_copy() -> BatchCopy:
    """The one of this process."""
    return BatchCopy()
