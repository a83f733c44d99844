"""Tensors that are read to memory of their own before a loader makes any for them.

An engine that builds a model on the meta device makes the memory of a parameter when it loads it. What
the files hold is known before: it is read while the engine builds, to memory like that which the loader
is going to make, and that is what the loader then gets.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from weightlift.loading.budget import free_memory
from weightlift.loading.checkpoint import Checkpoint, Shard
from weightlift.loading.delivery import Delivery
from weightlift.loading.files import ShardFile
from weightlift.loading.header import TensorEntry
from weightlift.loading.later import LATER_BYTES
from weightlift.loading.lazy import LazyTensor, geometry, view_of
from weightlift.loading.settings import MIB
from weightlift.loading.source import Source
from weightlift.loading.transfer import Transfer, row_major

SPARE_BYTES = 2048 * MIB
"""Of a device's free memory that is left to the engine."""

SEGMENT_BYTES = 256 * MIB
"""What is asked of CUDA at once. For each tensor alone it took 0.14 s of a model of 33 GB; but a segment
is given back whole, and some engines move most of a model to the host and leave the rest where it is."""

_LARGE_BYTES = 1 * MIB
"""Torch cuts blocks for larger tensors from a segment, and has small ones elsewhere."""

_BLOCK_BYTES = 512
"""What blocks are multiples of."""

DType = torch.dtype | None
"""What tensors are wanted as; None for what they are."""

Sized = tuple[TensorEntry, int]
"""A tensor, and what it takes."""


class Landing:
    """What of a load is read before it is asked for.

    Args:
        delivery: Reads it.
    """

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self._memory: dict[tuple[ShardFile, str], torch.Tensor] = {}
        self._moved: weakref.ref[Source] | None = None
        self._given: tuple[Source, torch.Tensor] | None = None
        self._wasted = 0

    def begin(
        self, checkpoint: Checkpoint, device: torch.device, dtype: DType, room: int = 0
    ) -> bool:
        """Have tensors read and cast, if the device has room for them and more; says whether it has.

        Args:
            checkpoint: Its open shards.
            device: Where the loader will want them.
            dtype: What it will want them as; a floating one. Of others only floating ones are read.
                None if it will copy them to memory that it makes.
            room: Bytes that it takes for each element then, besides.
        """
        wanted = sum(_nbytes(entry, dtype) for entry in checkpoint.entries())
        copied = sum(entry.nbytes // entry.dtype.itemsize for entry in checkpoint.entries()) * room
        if not wanted or wanted + copied + SPARE_BYTES > free_memory(device):
            return False
        with torch._C.DisableTorchFunction():  # no guard: this is no work of the loader's
            for shard in checkpoint.shards:
                self._begin(shard, device, dtype)
        self._delivery.hand_on()
        return True

    def _begin(self, shard: Shard, device: torch.device, dtype: DType) -> None:
        sized = [(entry, _nbytes(entry, dtype)) for entry in shard.tensors.values()]
        most = SEGMENT_BYTES if dtype is not None else shard.file.size  # all of that is given back
        for entries in together((item for item in sized if item[1]), most):
            make_room([nbytes for _, nbytes in entries], device)
            for entry, _ in entries:
                memory = torch.empty(entry.shape, dtype=dtype or entry.dtype, device=device)
                source = entry.dtype, entry.shape, row_major(entry.shape)
                self._delivery.add(Transfer(shard.file, entry.offset, *source, memory))
                self._memory[shard.file, entry.name] = memory

    def of(self, file: ShardFile, name: str) -> torch.Tensor | None:
        """The memory of a tensor of this file; whoever asks is its owner from now on."""
        return self._memory.pop((file, name), None)

    def clear(self) -> None:
        """Keep no memory."""
        self._memory.clear()
        self._moved = self._given = None

    def moved(self, source: Source) -> None:
        """Note that the loader moves a tensor: it may be about to copy it."""
        self._moved = weakref.ref(source)

    def like(
        self, tensor: torch.Tensor, device: Any, dtype: torch.dtype | None
    ) -> torch.Tensor | None:
        """Memory for a tensor like this, with what the loader moved last on its way there.

        If that is not what the loader copies to it next, it is as good as uninitialised memory.

        Args:
            tensor: What the memory is to be like.
            device: Where it is wanted.
            dtype: As what; None for the dtype of ``tensor``.
        """
        source = self._moved() if self._moved is not None else None
        memory = source.landed if source is not None and source.realised is None else None
        if source is None or memory is None or not _fits(memory, tensor, device, dtype):
            return None
        source.landed = self._moved = None
        self._given = source, memory
        return memory.detach()

    def take(self, lazy: LazyTensor) -> torch.Tensor | None:
        """The memory of a tensor as it says that it is, given away."""
        source = lazy.source
        memory = source.landed
        if memory is None or source.realised is not None or not _is_whole(lazy):
            return None
        dtype = lazy.cast_to or source.entry.dtype
        if (lazy.reported_device, dtype) != (memory.device, memory.dtype):
            return None
        source.landed = None
        return memory.detach()

    def is_in_place(self, target: torch.Tensor, lazy: LazyTensor) -> bool:
        """Whether a copy is the one for which ``target`` was given; it never is again."""
        given, self._given = self._given, None
        if given is None or given[0] is not lazy.source or not _is_whole(lazy):
            return False
        return (
            target.data_ptr() == given[1].data_ptr()
            and target.dtype == given[1].dtype == (lazy.cast_to or target.dtype)
            and target.shape == given[1].shape
            and target.is_contiguous()
        )

    def copy(self, target: torch.Tensor, lazy: LazyTensor) -> bool:
        """Have a copy to other memory made from here; False if what it takes is not here.

        Whatever else comes of the tensor is read again, for nobody may write to what waits here.
        """
        source = lazy.source
        memory, source.landed = source.landed, None
        if memory is None or source.realised is not None:
            return False
        stored = source.entry.dtype
        cast_to = None if memory.dtype == stored else memory.dtype
        if cast_to is not None and (target.dtype != cast_to or geometry(lazy)[3] != stored):
            self._waste(memory)
            return False
        self._delivery.copy_later(target, view_of(memory, lazy, cast_to))
        return True

    def _waste(self, memory: torch.Tensor) -> None:
        """Memory that is of no use is held until it is filled."""
        self._wasted += memory.nbytes
        if self._wasted > LATER_BYTES:
            self._wasted = 0
            self._delivery.flush()

    def observed(self, tensors: list[torch.Tensor]) -> None:
        """Note that the loader works with these: what was given may be written to."""
        if self._given is not None and any(_is_within(item, self._given[1]) for item in tensors):
            self._given = None


def _nbytes(entry: TensorEntry, dtype: DType) -> int:
    """What a tensor takes as this; 0 if it is not to be read."""
    if dtype is None:
        return entry.nbytes
    if entry.dtype != dtype and not (entry.dtype.is_floating_point and entry.dtype.itemsize > 1):
        return 0  # eight bits come with a scale, and whole numbers are no weights
    return entry.nbytes // entry.dtype.itemsize * dtype.itemsize


def together(sized: Iterable[Sized], most: int) -> Iterator[list[Sized]]:
    """Tensors in their order, as many at a time as take so many bytes, or one that takes more."""
    found: list[Sized] = []
    total = 0
    for item in sized:
        if found and total + item[1] > most:
            yield found
            found, total = [], 0
        found.append(item)
        total += item[1]
    if found:
        yield found


def make_room(sizes: Iterable[int], device: torch.device) -> None:
    """Have torch's allocator hold a segment that it can cut tensors of so many bytes from."""
    given = [os.environ.get(name, "") for name in _ALLOCATOR_SETTINGS]
    is_uncut = any("max_split_size" in text or "backend" in text for text in given)
    if device.type != "cuda" or is_uncut:  # a segment would be held in vain
        return
    blocks = [-(-size // _BLOCK_BYTES) * _BLOCK_BYTES for size in sizes if size > _LARGE_BYTES]
    torch.empty(sum(blocks), dtype=torch.uint8, device=device)


_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def _fits(
    memory: torch.Tensor, tensor: torch.Tensor, device: Any, dtype: torch.dtype | None
) -> bool:
    with torch._C.DisableTorchFunction():
        return (
            type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and memory.is_inference() == torch.is_inference_mode_enabled()
            and memory.device == _with_index(device)
            and memory.dtype == (dtype or tensor.dtype)
            and memory.shape == tensor.shape
            and tensor.is_contiguous()
        )


def _is_whole(lazy: LazyTensor) -> bool:
    entry = lazy.source.entry
    shape = tuple(entry.shape)
    return geometry(lazy) == (shape, row_major(shape), 0, entry.dtype)


def _is_within(tensor: torch.Tensor, memory: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return True
    return tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


def _with_index(device: Any) -> torch.device:
    """As tensors on it say it: ``cuda`` is the current one."""
    named: torch.device = torch.device(device)
    if named.type == "cuda" and named.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return named
