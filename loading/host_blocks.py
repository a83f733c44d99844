"""Host memory of exact size for what leaves a device, page-locked block by block by several threads.

torch's own allocator rounds page-locked memory up to a power of two, and ``cudaHostAlloc`` takes some
0.4 s/GiB (see ``staging``).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from weightlift.loading.staging import page_aligned, register, unregister

BLOCK_BYTES = 256 << 20
_ALIGNMENT = 512
"""Of pieces in a block; devices allocate at multiples of it."""


class HostBlocks:
    """Memory for pieces of these sizes.

    Args:
        sizes: Bytes of each piece.
        device: What is copied to and from it: page-locked for a CUDA device.
        threads: How many make it ready.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, threads: int) -> None:
        self._offsets: list[tuple[int, int]] = []
        self._lengths: list[int] = []
        for size in sizes:
            room = -(-size // _ALIGNMENT) * _ALIGNMENT
            if not self._lengths or self._lengths[-1] + room > BLOCK_BYTES:
                self._lengths.append(0)
            self._offsets.append((len(self._lengths) - 1, self._lengths[-1]))
            self._lengths[-1] += room
        self._sizes = sizes
        self._device = device
        self._threads = threads
        self._blocks: list[torch.Tensor] = []
        # Memory that goes while it is registered leaves its addresses unusable for the device.
        self._free = weakref.finalize(self, _unregister, device, self._blocks)
        self._free.atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(self._lengths)

    def pieces(self) -> Generator[torch.Tensor, None, None]:
        """The pieces in order, flat uint8; each as soon as its block can be used.

        Raises:
            OSError: The host has no such memory.
        """
        pool = ThreadPoolExecutor(self._threads, "weightlift-pin", self._begin)
        try:
            blocks = [pool.submit(self._make, length) for length in self._lengths]
            for size, (block, offset) in zip(self._sizes, self._offsets, strict=True):
                yield blocks[block].result()[offset : offset + size]
        finally:
            pool.shutdown(cancel_futures=True)

    def release(self) -> int:
        """Free it, as far as nobody holds a piece; returns its bytes."""
        freed = sum(block.numel() for block in self._blocks)
        self._free()
        return freed

    def _begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _make(self, nbytes: int) -> torch.Tensor:
        block = page_aligned(nbytes)
        if self._device.type == "cuda":
            ctypes.memset(block.data_ptr(), 0, nbytes)  # touched beside the other threads
            register(block)
        self._blocks.append(block)
        return block


def _unregister(device: torch.device, blocks: list[torch.Tensor]) -> None:
    if device.type == "cuda":
        for block in blocks:
            unregister(block)
    blocks.clear()
