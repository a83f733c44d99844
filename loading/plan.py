"""Transfers (these bytes of a file into that tensor) and the plan that gathers them into windows.

Bytes move in *windows of a file*, not tensors: neighbours join one window, a large tensor is cut
into several. A window is handed on as soon as it is full, so reading overlaps planning.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from weightlift.loading.files import ShardFile

MAX_GAP = 64 << 10
"""Unwanted bytes between two tensors that are read along rather than start another window."""

MAX_PIECES = 512


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
        order = sorted(range(len(self.shape)), key=lambda dimension: -self.stride[dimension])
        return replace(
            self,
            shape=tuple(self.shape[dimension] for dimension in order),
            stride=tuple(self.stride[dimension] for dimension in order),
            target=self.target.permute(order),
        )

    def split(self, most: int) -> Iterator[Transfer]:
        """The same work in pieces that span at most ``most`` bytes, or one element."""
        if self.is_direct:
            yield from self._split_bytes(most)
        elif self.span <= most or not self.shape:
            yield self
        else:
            yield from self._split_rows(most)

    def _split_bytes(self, most: int) -> Iterator[Transfer]:
        flat = self.target.as_strided((self.target.numel(),), (1,)).view(torch.uint8)
        for start in range(0, flat.numel(), most):
            part = flat[start : start + most]
            yield Transfer(
                self.file, self.offset + start, torch.uint8, tuple(part.shape), (1,), part
            )

    def _split_rows(self, most: int) -> Iterator[Transfer]:
        step = self.stride[0] * self.dtype.itemsize
        row = extent(self.shape[1:], self.stride[1:]) * self.dtype.itemsize
        count = max(1, (most - row) // step + 1) if step else self.shape[0]
        for start in range(0, self.shape[0], count):
            part = self.target[start : start + count]
            rows = Transfer(
                self.file,
                self.offset + start * step,
                self.dtype,
                tuple(part.shape),
                self.stride,
                part,
            )
            if count > 1 or row <= most:
                yield rows
            else:
                yield from rows._first_row().split(most)

    def _first_row(self) -> Transfer:
        shape, stride = self.shape[1:], self.stride[1:]
        return Transfer(self.file, self.offset, self.dtype, shape, stride, self.target[0])


@dataclass(slots=True)
class Window:
    """A range of a file that is read in one go, and what its bytes fill, by ascending offset."""

    file: ShardFile
    start: int
    stop: int
    pieces: list[Transfer] = field(default_factory=list)
    ready: torch.Event | None = None
    """Work on the recording thread's stream that must come before these bytes land."""

    @property
    def span(self) -> int:
        """Bytes that the window covers."""
        return self.stop - self.start

    def takes(self, piece: Transfer, most: int) -> bool:
        """Whether this piece may join without reading backwards, far ahead or too much."""
        return (
            piece.file is self.file
            and 0 <= piece.offset - self.stop <= MAX_GAP
            and piece.stop - self.start <= most
            and len(self.pieces) < MAX_PIECES
        )


class Intervals:
    """Disjoint half-open address ranges, sorted."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def overlaps(self, start: int, stop: int) -> bool:
        """Whether any range here shares an address with this one."""
        position = bisect.bisect_left(self._starts, stop)
        return position > 0 and self._stops[position - 1] > start

    def add(self, start: int, stop: int) -> None:
        """Add a range that overlaps none."""
        position = bisect.bisect_left(self._starts, start)
        self._starts.insert(position, start)
        self._stops.insert(position, stop)


class Plan:
    """Gathers transfers into windows, from any number of threads.

    Transfers whose targets overlap keep their order: the later one waits in a *wave* of its own
    until every window before it is placed.

    Args:
        window_bytes: The most that a window spans.
        submit: Takes each finished window; may block to hold the planner back.
    """

    def __init__(self, window_bytes: int, submit: Callable[[Window], None]) -> None:
        self._window_bytes = window_bytes
        self._submit = submit
        self._lock = threading.RLock()
        self._open: Window | None = None
        self._written = [Intervals()]
        self._waves: list[list[Transfer]] = []
        self._storages: set[int] = set()

    def add(self, transfer: Transfer) -> None:
        """Record a transfer; full windows are handed on at once."""
        if transfer.nbytes == 0:
            return
        start, stop = _addresses(transfer.target)
        with self._lock:
            self._storages.add(transfer.target.untyped_storage().data_ptr())
            wave = self._wave_after(start, stop)
            self._written[wave].add(start, stop)
            if wave:
                self._waves[wave - 1].append(transfer)
            else:
                self._gather(transfer)

    def touches(self, tensor: torch.Tensor) -> bool:
        """Whether a transfer into this tensor's storage is not known to be done."""
        return tensor.untyped_storage().data_ptr() in self._storages

    @property
    def is_empty(self) -> bool:
        """Whether nothing was recorded since the last flush."""
        return not self._storages

    def flush(self, wait: Callable[[], None]) -> None:
        """Hand on every window, wave by wave; ``wait`` returns when those handed on are placed."""
        with self._lock:
            self._close_window()
            wait()
            for wave in self._waves:
                for transfer in wave:
                    self._gather(transfer)
                self._close_window()
                wait()
            self._written, self._waves = [Intervals()], []
            self._storages.clear()

    def _wave_after(self, start: int, stop: int) -> int:
        """The first wave that comes after every one that writes to these addresses."""
        for wave in range(len(self._written) - 1, -1, -1):
            if self._written[wave].overlaps(start, stop):
                if wave + 1 == len(self._written):
                    self._written.append(Intervals())
                    self._waves.append([])
                return wave + 1
        return 0

    def _gather(self, transfer: Transfer) -> None:
        for piece in transfer.split(self._window_bytes):
            window = self._open
            if window is None or not window.takes(piece, self._window_bytes):
                self._close_window()
                window = self._open = Window(piece.file, piece.offset, piece.offset)
            window.pieces.append(piece)
            window.stop = piece.stop

    def _close_window(self) -> None:
        window, self._open = self._open, None
        if window is not None:
            self._submit(window)


def extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided block that is not empty."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _addresses(tensor: torch.Tensor) -> tuple[int, int]:
    """The address range from the first to the last byte of a tensor."""
    start = tensor.data_ptr()
    return start, start + extent(tuple(tensor.shape), tensor.stride()) * tensor.element_size()
