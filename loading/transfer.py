"""A transfer: these bytes of a file into that tensor, and how to cut it into pieces.

What goes to its target byte by byte is cut into *runs*, which cost a fraction of a transfer: a
model of many experts has tens of thousands.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from weightlift.loading.files import ShardFile


@dataclass(slots=True)
class Run:
    """Bytes ``offset`` to ``stop`` of a file that go to ``memory`` from byte ``place`` on.

    ``memory`` is contiguous, on any device.
    """

    offset: int
    stop: int
    memory: torch.Tensor
    place: int

    @property
    def nbytes(self) -> int:
        """Bytes of the file that are wanted."""
        return self.stop - self.offset

    @property
    def target(self) -> torch.Tensor:
        """The memory to fill: flat uint8."""
        memory = self.memory.view(-1).view(torch.uint8)
        return memory[self.place : self.place + self.stop - self.offset]

    @property
    def address(self) -> int:
        """Where the memory to fill is."""
        return self.memory.data_ptr() + self.place

    def cut(self, position: int) -> tuple[Run, Run]:
        """The work before this byte of the file, and that from it on; both are some."""
        first = position - self.offset
        return (
            Run(self.offset, position, self.memory, self.place),
            Run(position, self.stop, self.memory, self.place + first),
        )

    def split(self, most: int) -> Iterable[Run]:
        """The same work in parts of at most ``most`` bytes."""
        if self.stop - self.offset <= most:
            return (self,)
        return [
            Run(start, min(start + most, self.stop), self.memory, self.place + start - self.offset)
            for start in range(self.offset, self.stop, most)
        ]


@dataclass(frozen=True, slots=True)
class Transfer:
    """Elements of a file that fill ``target``.

    Attributes:
        file: The shard.
        offset: Byte of the file where element 0 of the source lies.
        dtype: Element type in the file.
        shape: Of the source, equal to the target's.
        stride: Of the source, in elements.
        target: The memory to fill, on any device, of any strides and dtype.
    """

    file: ShardFile
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    target: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the file that are wanted."""
        return self.target.numel() * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Bytes of the file from the first wanted to the last, those between included."""
        return extent(self.shape, self.stride) * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """The byte of the file after the last one."""
        return self.offset + self.span

    @property
    def is_packed(self) -> bool:
        """Whether the wanted elements lie in the file as a row-major block."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def is_direct(self) -> bool:
        """Whether the bytes can go to the target as they are."""
        return self.is_packed and self.target.dtype == self.dtype and self.target.is_contiguous()

    def in_file_order(self) -> Transfer:
        """The same copy with the dimension first that strides furthest through the file."""
        stride = self.stride
        if all(before >= after for before, after in itertools.pairwise(stride)):
            return self
        order = sorted(range(len(self.shape)), key=lambda dimension: -stride[dimension])
        return replace(
            self,
            shape=tuple(self.shape[dimension] for dimension in order),
            stride=tuple(stride[dimension] for dimension in order),
            target=self.target.permute(order),
        )

    def cut(self, position: int) -> tuple[Transfer, Transfer] | None:
        """The work before this byte of the file, and that from it on; None if a row crosses it."""
        if not self.shape or self.stride[0] <= 0:
            return None
        step = self.stride[0] * self.dtype.itemsize
        row = extent(self.shape[1:], self.stride[1:]) * self.dtype.itemsize
        count = (position - self.offset - row) // step + 1
        if not 0 < count < self.shape[0] or self.offset + count * step < position:
            return None
        return self._rows(0, count), self._rows(count, self.shape[0])

    def _rows(self, start: int, stop: int) -> Transfer:
        part = self.target[start:stop]
        offset = self.offset + start * self.stride[0] * self.dtype.itemsize
        return Transfer(self.file, offset, self.dtype, tuple(part.shape), self.stride, part)

    def split(self, most: int) -> Iterator[Run | Transfer]:
        """The same work in pieces that span at most ``most`` bytes, or one element."""
        if self.is_direct:
            yield from Run(self.offset, self.stop, self.target, 0).split(most)
        elif self.span <= most or not self.shape:
            yield self
        else:
            yield from self._split_rows(most)

    def _split_rows(self, most: int) -> Iterator[Run | Transfer]:
        step = self.stride[0] * self.dtype.itemsize
        row = extent(self.shape[1:], self.stride[1:]) * self.dtype.itemsize
        count = max(1, (most - row) // step + 1) if step else self.shape[0]
        for start in range(0, self.shape[0], count):
            rows = self._rows(start, start + count)
            if count > 1 or row <= most:
                yield rows
            else:
                yield from rows._first_row().split(most)

    def _first_row(self) -> Transfer:
        shape, stride = self.shape[1:], self.stride[1:]
        return Transfer(self.file, self.offset, self.dtype, shape, stride, self.target[0])


def extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided block that is not empty."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a block without holes, its last dimension first in memory."""
    strides = [1] * len(shape)
    for dimension in range(len(shape) - 1, 0, -1):
        strides[dimension - 1] = strides[dimension] * max(shape[dimension], 1)
    return tuple(strides)
