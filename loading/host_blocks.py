"""Host memory of exact size for what leaves a device, page-locked block by block by several threads.

torch's own allocator rounds page-locked memory up to a power of two, and ``cudaHostAlloc`` takes some
0.4 s/GiB (see ``staging``).
"""

from __future__ import annotations

import errno
import weakref
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from weightlift.loading.pages import touch
from weightlift.loading.staging import page_aligned, register, unregister
from weightlift.loading.threads import submit

BLOCK_BYTES = 256 << 20
_ALIGNMENT = 512
"""Of pieces in a block; devices allocate at multiples of it."""


class HostBlocks:
    """Memory for pieces of these sizes.

    Args:
        sizes: Bytes of each piece.
        device: What is copied to and from it: page-locked for a CUDA device.
        threads: How many make it ready.
        pageable: Whether memory that cannot be page-locked will do.
    """

    def __init__(
        self, sizes: Sequence[int], device: torch.device, threads: int, *, pageable: bool = False
    ) -> None:
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
        self._pageable = pageable
        self._blocks: list[torch.Tensor] = []
        # Memory that goes while it is registered leaves its addresses unusable for the device.
        self._free = weakref.finalize(self, unlock, device, self._blocks)
        self._free.atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(self._lengths)

    def pieces(self) -> Generator[torch.Tensor, None, None]:
        """The pieces in order, flat uint8; each as soon as its block can be used.

        Raises:
            OSError: The host has no such memory, or no thread can be started; blocks of which no piece was given are free.
        """
        made: dict[int, torch.Tensor] = {}

        def make(number: int) -> None:
            made[number] = make_block(self._lengths[number], self._device, pageable=self._pageable)

        pool = ThreadPoolExecutor(self._threads, "weightlift-pin")
        try:
            making = [submit(pool, make, number) for number in range(len(self._lengths))]
            for size, (number, offset) in zip(self._sizes, self._offsets, strict=True):
                if number == len(self._blocks):
                    making[number].result()
                    self._blocks.append(made.pop(number))
                yield self._blocks[number][offset : offset + size]
        finally:
            pool.shutdown(cancel_futures=True)
            unlock(self._device, list(made.values()))

    def release(self) -> int:
        """Free it, as far as nobody holds a piece; returns its bytes."""
        freed = sum(block.numel() for block in self._blocks)
        self._free()
        return freed


def make_block(nbytes: int, device: torch.device, *, pageable: bool = False) -> torch.Tensor:
    """Memory that is there, and page-locked for a CUDA device: flat uint8, for any thread to call.

    Args:
        nbytes: Of the block.
        device: What is copied to and from it.
        pageable: Whether it will do if it cannot be page-locked.

    Raises:
        OSError: The host has no such memory.
    """
    block = page_aligned(nbytes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        touch(block.data_ptr(), nbytes)
        lock(block, pageable=pageable)
    return block


def lock(block: torch.Tensor, *, pageable: bool = False) -> None:
    """Page-lock a block that was touched, for the current device.

    Raises:
        OSError: It cannot be, and pageable memory will not do.
    """
    if not register(block) and not pageable:
        raise OSError(errno.ENOMEM, "cannot be page-locked")


def unlock(device: torch.device, blocks: list[torch.Tensor]) -> None:
    """Page-lock these no longer, and drop them; who has a piece of one keeps its memory."""
    if device.type == "cuda":
        for block in blocks:
            unregister(block)
    blocks.clear()
