"""Copies from the bytes of a round into parameters, as few as can be.

Experts whose numbers follow each other lie in the file at even distances, and so do their places in
the parameter: their slices are one copy with one dimension more. (Files are sorted by name, so 100
to 109 follow each other, and 1, 10 and 100 do not.) Python and the device both feel it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from weightlift.loading.files import ShardFile
from weightlift.loading.transfer import Run, Transfer

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

Storages = dict[int, torch.Tensor]
"""A tensor of each storage, by the storage's address."""


class Layout(NamedTuple):
    """How elements lie; strides in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Step(NamedTuple):
    """A copy of elements of a round. It holds no tensor, so that it keeps none alive.

    Attributes:
        offset: Byte of the round where element 0 is.
        source: How the elements lie in the round.
        storage: Address of the storage that they go to.
        place: Byte of it where element 0 goes.
        target: How they lie there.
    """

    offset: int
    source: Layout
    storage: int
    place: int
    target: Layout

    def elements(self, data: torch.Tensor) -> torch.Tensor:
        """The source: the elements in the bytes of the round, flat uint8."""
        dtype, shape, stride = self.source
        words = data.view(dtype)
        first = int(words.storage_offset()) + self.offset // dtype.itemsize
        return words.as_strided(shape, stride, first)

    def parameter(self, storages: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """The target."""
        dtype, shape, stride = self.target
        owner = storages[self.storage]
        return torch.empty(0, dtype=dtype, device=owner.device).set_(
            owner.untyped_storage(), self.place // dtype.itemsize, shape, stride
        )

    def piece(self, file: ShardFile, storages: Mapping[int, torch.Tensor]) -> Run | Transfer:
        """The work that this was, where ``offset`` counts from the start of the file."""
        dtype, shape, stride = self.source
        if self.source == self.target and len(shape) == 1 and stride == (1,):
            owner = storages[self.storage].untyped_storage()
            memory = torch.empty(0, dtype=torch.uint8, device=owner.device)
            memory = memory.set_(owner, 0, (owner.nbytes(),), (1,))
            return Run(self.offset, self.offset + shape[0] * dtype.itemsize, memory, self.place)
        return Transfer(file, self.offset, dtype, shape, stride, self.parameter(storages))


def steps(pieces: Iterable[Run | Transfer], start: int, storages: Storages) -> list[Step]:
    """The copies that put these pieces in place.

    Args:
        pieces: Work within one round, each at a multiple of its element size from the start.
        start: The byte of the file where the round starts.
        storages: Gets a tensor of each storage that is written to.
    """
    alike: dict[tuple[object, ...], list[Step]] = {}
    for piece in pieces:
        step = step_of(piece, piece.offset - start, storages)
        alike.setdefault((step.source, step.target, step.storage), []).append(step)
    return [merged for found in alike.values() for merged in _merged(found)]


def step_of(piece: Run | Transfer, offset: int, storages: Storages) -> Step:
    """One piece, at this offset. Elements that keep their dtype are copied as integers."""
    owner = piece.memory if isinstance(piece, Run) else piece.target
    storage = owner.untyped_storage().data_ptr()
    storages.setdefault(storage, owner)
    if isinstance(piece, Run):
        place, nbytes = piece.address - storage, piece.nbytes
        together = offset | nbytes | place | storage
        word = _WORDS[min(8, together & -together)]
        flat = Layout(word, (nbytes // word.itemsize,), (1,))
        return Step(offset, flat, storage, place, flat)
    dtype, target_dtype = piece.dtype, piece.target.dtype
    if dtype == target_dtype and dtype.itemsize in _WORDS:
        dtype = target_dtype = _WORDS[dtype.itemsize]
    source = Layout(dtype, piece.shape, piece.stride)
    target = Layout(target_dtype, piece.shape, tuple(piece.target.stride()))
    return Step(offset, source, storage, piece.target.data_ptr() - storage, target)


def _merged(alike: list[Step]) -> Iterator[Step]:
    """Copies of one form, those at even distances as one."""
    alike.sort(key=lambda step: step.offset)
    first = 0
    while first < len(alike):
        last, distance = first, None
        while last + 1 < len(alike):
            further = _distance(alike[last], alike[last + 1])
            if further is None or (distance is not None and further != distance):
                break
            last, distance = last + 1, further
        yield _stacked(alike[first], last - first + 1, distance) if distance else alike[first]
        first = last + 1


def _distance(step: Step, other: Step) -> tuple[int, int] | None:
    """How far another copy of the form is, in elements of source and target; None if askew."""
    source, odd = divmod(other.offset - step.offset, step.source.dtype.itemsize)
    target, askew = divmod(other.place - step.place, step.target.dtype.itemsize)
    return None if odd or askew or source <= 0 or target <= 0 else (source, target)


def _stacked(step: Step, count: int, distance: tuple[int, int]) -> Step:
    def stack(layout: Layout, step: int) -> Layout:
        return Layout(layout.dtype, (count, *layout.shape), (step, *layout.stride))

    source, target = stack(step.source, distance[0]), stack(step.target, distance[1])
    return step._replace(source=source, target=target)
