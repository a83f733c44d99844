"""Models that stay on the host: their parameters move to page-locked memory before they are filled."""

from __future__ import annotations

import weakref
from collections import Counter

import torch

from weightlift.loading.host_blocks import HostBlocks
from weightlift.loading.pages import PAGE, are_untouched


def move_parameters(model: torch.nn.Module, device: torch.device, threads: int) -> int:
    """Give a model's parameters on the host page-locked memory, for as long as the model lives.

    Parameters whose memory others share or that has gaps stay where they are, and what else looks into
    memory that moved stays behind. Pages that were never written to are not copied.

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
    # Nothing can be under way to memory that nobody knows yet: a guard has nothing to see.
    with torch._C.DisableTorchFunction():
        for parameter, piece in zip(moved, blocks.pieces(), strict=True):
            before = parameter.detach().view(-1).view(torch.uint8)
            for part in _written(before):
                piece[part].copy_(before[part])
            parameter.data = piece.view(parameter.dtype).view(parameter.shape)
    return blocks.nbytes


def _written(memory: torch.Tensor) -> list[slice]:
    """What of some memory of the heap was written to: all, or at most what shares pages with neighbours."""
    stop = len(memory)
    first, last = -memory.data_ptr() % PAGE, stop - (memory.data_ptr() + stop) % PAGE
    if first < last and are_untouched(memory.data_ptr() + first, last - first):
        return [slice(first), slice(last, stop)]
    return [slice(stop)]


def _movable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters on the host whose memory no other parameter or buffer has, and no other process."""
    found = [
        item
        for item in model.parameters()
        if item.device.type == "cpu" and item.numel() and item.is_contiguous()
    ]
    uses = Counter(
        item.untyped_storage().data_ptr()
        for item in (*found, *model.buffers())
        if item.device.type == "cpu"
    )
    return [item for item in found if _is_alone(item.untyped_storage(), item.nbytes, uses)]


def _is_alone(storage: torch.UntypedStorage, nbytes: int, uses: Counter[int]) -> bool:
    is_whole = storage.nbytes() == nbytes
    return is_whole and uses[storage.data_ptr()] == 1 and not storage.is_shared()
