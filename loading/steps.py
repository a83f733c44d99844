"""Copies from the bytes of a round into parameters, as few as can be.

The experts of a layer lie in the file at even distances, and so do their places in the parameter. So
seven slices of as many experts are one copy with one dimension more. That takes a round of a
mixture of experts from 20 copies to 3, which Python and the device both feel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from weightlift.loading.transfer import Run, Transfer

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@dataclass(frozen=True, slots=True)
class Step:
    """A copy of elements of a round.

    Attributes:
        offset: Byte of the round where element 0 is.
        dtype: Of the elements as they are stored.
        shape: Of the source, equal to the target's.
        stride: Of the source, in elements.
        target: Where they go.
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    target: torch.Tensor

    def source(self, data: torch.Tensor) -> torch.Tensor:
        """The elements in the bytes of the round: flat uint8, on the target's device."""
        words = data.view(self.dtype)
        first = int(words.storage_offset()) + self.offset // self.dtype.itemsize
        return words.as_strided(self.shape, self.stride, first)


def steps(pieces: Iterable[Run | Transfer], start: int) -> list[Step]:
    """The copies that put these pieces in place.

    Args:
        pieces: Work within one round, each at a multiple of its element size from the start.
        start: The byte of the file where the round starts.
    """
    alike: dict[tuple[object, ...], list[Step]] = {}
    for piece in pieces:
        step = _step(piece, piece.offset - start)
        target = step.target
        form = (step.dtype, step.shape, step.stride, target.dtype, target.stride())
        alike.setdefault((*form, target.untyped_storage().data_ptr()), []).append(step)
    return [merged for found in alike.values() for merged in _merged(found)]


def _step(piece: Run | Transfer, offset: int) -> Step:
    if isinstance(piece, Transfer):
        return Step(offset, piece.dtype, piece.shape, piece.stride, piece.target)
    target, nbytes = piece.target, piece.nbytes
    together = offset | nbytes | int(target.storage_offset()) | target.data_ptr()
    word = next(word for word in _WORDS if together % word.itemsize == 0)
    return Step(offset, word, (nbytes // word.itemsize,), (1,), target.view(word))


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
    source, odd = divmod(other.offset - step.offset, step.dtype.itemsize)
    target = int(other.target.storage_offset()) - int(step.target.storage_offset())
    return None if odd or source <= 0 or target <= 0 else (source, target)


def _stacked(step: Step, count: int, distance: tuple[int, int]) -> Step:
    shape = (count, *step.shape)
    stride = (distance[1], *step.target.stride())
    target = step.target.as_strided(shape, stride, step.target.storage_offset())
    return Step(step.offset, step.dtype, shape, (distance[0], *step.stride), target)
