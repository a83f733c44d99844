"""Host memory of exact size for what leaves a device, page-locked block by block by several threads.

torch's own allocator rounds page-locked memory up to a power of two, and ``cudaHostAlloc`` takes some
0.4 s/GiB (see ``staging``).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from weightlift.loading.pages import are_untouched, touch
from weightlift.loading.residency import PAGE
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
        pool = ThreadPoolExecutor(self._threads, "weightlift-pin")
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

    def _make(self, nbytes: int) -> torch.Tensor:
        block = make_block(nbytes, self._device)
        self._blocks.append(block)
        return block


def make_block(nbytes: int, device: torch.device) -> torch.Tensor:
    """Memory that is there, and page-locked for a CUDA device: flat uint8, for any thread to call.

    Raises:
        OSError: The host has no such memory.
    """
    block = page_aligned(nbytes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        touch(block.data_ptr(), nbytes)
        register(block)
    return block


def move_parameters(model: torch.nn.Module, device: torch.device, threads: int) -> int:
    """Give a model's parameters on the host such memory, which they have as long as the model lives.

    Parameters whose memory others share or that has gaps stay where they are. What was never written to
    is not copied.

    Args:
        model: Its parameters stay the same objects.
        device: As of :class:`HostBlocks`.
        threads: As there.

    Returns:
        Bytes that were moved.

    Raises:
        OSError: The host has no such memory; the rest stays where it is.
    """
    moved = _movable(model)
    blocks = HostBlocks([parameter.nbytes for parameter in moved], device, threads)
    release = weakref.finalize(model, blocks.release)
    release.atexit = False
    with (
        torch._C.DisableTorchFunction()
    ):  # nothing can be under way to memory that is not known yet
        for parameter, piece in zip(moved, blocks.pieces(), strict=True):
            before = parameter.detach().view(-1).view(torch.uint8)
            written = _written(before)
            piece[:written].copy_(before[:written])
            parameter.data = piece.view(parameter.dtype).view(parameter.shape)
    return blocks.nbytes


def _written(memory: torch.Tensor) -> int:
    """How many bytes from the first may be written to. Allocators note something before the first."""
    first_page = -memory.data_ptr() % PAGE
    rest = memory[first_page:]
    is_new = len(rest) and are_untouched(rest.data_ptr(), len(rest))
    return first_page if is_new else len(memory)


def _movable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters that have their memory on the host to themselves."""
    found = [
        item
        for item in model.parameters()
        if item.device.type == "cpu" and item.numel() and item.is_contiguous()
    ]
    uses = Counter(item.untyped_storage().data_ptr() for item in found)
    return [
        item
        for item in found
        if uses[item.untyped_storage().data_ptr()] == 1
        and item.untyped_storage().nbytes() == item.nbytes
    ]


def _unregister(device: torch.device, blocks: list[torch.Tensor]) -> None:
    if device.type == "cuda":
        for block in blocks:
            unregister(block)
    blocks.clear()
