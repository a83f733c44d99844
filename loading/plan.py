"""The plan: transfers gathered into windows of a file.

Bytes move in *windows of a file*, not tensors: neighbours join one window, a large tensor is cut
into several. A window is handed on as soon as it is full, so reading overlaps planning.
"""

from __future__ import annotations

import bisect
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from weightlift.loading.files import ShardFile
from weightlift.loading.transfer import Run, Transfer, extent

MAX_GAP = 64 << 10
"""Unwanted bytes between two tensors that are read along rather than start another window."""

MAX_PIECES = 512


@dataclass(slots=True)
class Window:
    """A range of a file that is read in one go, and what its bytes fill, by ascending offset."""

    file: ShardFile
    start: int
    stop: int
    pieces: list[Run | Transfer] = field(default_factory=list)
    ready: torch.Event | None = None
    """Work on the recording thread's stream that must come before these bytes land."""
    issued: Callable[[torch.Event | None], None] | None = None
    """Called by the reader with what tells that the bytes are in place, or that they never will."""
    load: object = None
    """Whose it is, where loads share readers."""

    @property
    def span(self) -> int:
        """Bytes that the window covers."""
        return self.stop - self.start

    def takes(self, file: ShardFile, piece: Run | Transfer, most: int) -> bool:
        """Whether this piece may join without reading backwards, far ahead or too much."""
        return (
            file is self.file
            and 0 <= piece.offset - self.stop <= MAX_GAP
            and piece.stop - self.start <= most
            and len(self.pieces) < MAX_PIECES
        )


def gathered(file: ShardFile, pieces: Iterable[Run | Transfer], most: int) -> Iterator[Window]:
    """Windows of at most ``most`` bytes with these pieces of a file, none of which is larger."""
    window: Window | None = None
    for piece in sorted(pieces, key=_offset):
        if window is None or not window.takes(file, piece, most):
            if window is not None:
                yield window
            window = Window(file, piece.offset, piece.offset)
        window.pieces.append(piece)
        window.stop = piece.stop
    if window is not None:
        yield window


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
        self._held: list[torch.Tensor] = []  # memory must not be reused before bytes land in it

    def add(self, transfer: Transfer) -> None:
        """Record a transfer; full windows are handed on at once."""
        if transfer.nbytes == 0:
            return
        start, stop = _addresses(transfer.target)
        with self._lock:
            self._held.append(transfer.target)
            self._storages.add(transfer.target.untyped_storage().data_ptr())
            wave = self._wave_after(start, stop)
            self._written[wave].add(start, stop)
            if wave:
                self._waves[wave - 1].append(transfer)
            else:
                self._gather(transfer)

    def add_disjoint(
        self, file: ShardFile, pieces: list[Run | Transfer], memories: Iterable[torch.Tensor]
    ) -> None:
        """Record work on one file whose targets are known not to overlap, in any order.

        Args:
            file: The shard.
            pieces: The work.
            memories: What it writes to; a tensor of each storage.
        """
        pieces.sort(key=_offset)
        with self._lock:
            for memory in memories:
                self._held.append(memory)
                self._storages.add(memory.untyped_storage().data_ptr())
            for piece in pieces:
                for part in piece.split(self._window_bytes):
                    self._join(file, part)

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
            self.close_window()
            wait()
            for wave in self._waves:
                for transfer in wave:
                    self._gather(transfer)
                self.close_window()
                wait()
            self._written, self._waves = [Intervals()], []
            self._storages.clear()
            self._held.clear()

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
            self._join(transfer.file, piece)

    def _join(self, file: ShardFile, piece: Run | Transfer) -> None:
        window = self._open
        if window is None or not window.takes(file, piece, self._window_bytes):
            self.close_window()
            window = self._open = Window(file, piece.offset, piece.offset)
        window.pieces.append(piece)
        window.stop = piece.stop

    def close_window(self) -> None:
        """Hand on the window that is still open to more pieces, if there is one."""
        window, self._open = self._open, None
        if window is not None:
            self._submit(window)


_offset = operator.attrgetter("offset")


def _addresses(tensor: torch.Tensor) -> tuple[int, int]:
    """The address range from the first to the last byte of a tensor."""
    start = tensor.data_ptr()
    return start, start + extent(tuple(tensor.shape), tensor.stride()) * tensor.element_size()
