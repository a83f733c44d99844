"""From a window of a file to the tensors it fills, on the CPU and on CUDA. One placer a thread."""

from __future__ import annotations

from typing import Protocol

import torch

from weightlift.loading.batch import batch_copy
from weightlift.loading.files import Buffer, memory_at, memory_of
from weightlift.loading.plan import Window
from weightlift.loading.residency import PAGE
from weightlift.loading.settings import MIB
from weightlift.loading.stage import active_stage
from weightlift.loading.staging import PinnedRing, page_aligned, pinned_ring
from weightlift.loading.transfer import Run, Transfer

HOST_WINDOW_BYTES = 16 * MIB
CUDA_WINDOW_BYTES = 8 * MIB
"""On an H200 (PCIe 5 x16, ceiling 55.5 GB/s) a bare loop of 12 threads reaches 52.6 GB/s with 4 MiB,
53.8 with 8 and 54.2 with 8 threads of 16; with the plan's Python beside it, 4 MiB fall to 27 to 30."""

_ALIGNMENT = 16


class Placer(Protocol):
    """Places windows on one device, for one thread."""

    def place(self, window: Window) -> None:
        """Read the window and put its pieces in place, perhaps still under way on return."""

    def event(self) -> torch.Event | None:
        """What tells that all windows so far are in place; None if they are."""

    def close(self) -> None:
        """Give the staging memory back."""


class HostPlacer:
    """Reads straight into the target's memory where the layouts agree, else by scratch."""

    def __init__(self) -> None:
        self._scratch: torch.Tensor | None = None

    def place(self, window: Window) -> None:
        """Read the window and fill its pieces; done on return."""
        staged = window.file.staged_view(window.start, window.stop)
        if staged is not None:
            for piece in window.pieces:
                piece.target.copy_(source_view(staged, window, piece))
            return
        runs = [piece for piece in window.pieces if isinstance(piece, Run)]
        is_direct = window.file.is_direct(window.start, window.stop)
        if len(runs) == len(window.pieces) and not is_direct:
            window.file.read_into(window.start, _scatter(window.start, runs))
            return
        if self._scratch is None:
            self._scratch = page_aligned(HOST_WINDOW_BYTES + 2 * PAGE)
        before = window.file.fetch(window.start, window.stop, memory_of(self._scratch))
        for piece in window.pieces:
            piece.target.copy_(source_view(self._scratch[before:], window, piece))

    def event(self) -> None:
        """They are, on return from :meth:`place`."""

    def close(self) -> None:
        """Let the scratch go."""
        self._scratch = None


def _scatter(position: int, runs: list[Run]) -> list[Buffer]:
    """The targets' memory, with scratch for the gaps between."""
    buffers: list[Buffer] = []
    for run in runs:
        if run.offset > position:
            buffers.append(memoryview(bytearray(run.offset - position)))
        buffers.append(memory_at(run.address, run.nbytes))
        position = run.stop
    return buffers


def source_view(data: torch.Tensor, window: Window, piece: Run | Transfer) -> torch.Tensor:
    """A piece's elements as they lie in the window's bytes.

    Args:
        data: The window's bytes, uint8, from its start.
        window: The window.
        piece: One of its pieces.
    """
    start = piece.offset - window.start
    part = data[start : start + piece.stop - piece.offset]
    if isinstance(piece, Run):
        return part
    if part.data_ptr() % piece.dtype.itemsize:
        part = part.clone()  # an unaligned address cannot be viewed as a wider type
    return part.view(piece.dtype).as_strided(piece.shape, piece.stride)


class CudaPlacer:
    """Reads into one half of a pinned slot while the other is on its way to the device.

    Each placer has its own stream. Casts and strided writes happen on the device; rows of a
    strided source are gathered on the way into pinned memory.
    """

    def __init__(self, device: torch.device, ring: PinnedRing) -> None:
        self._device = device
        self._ring = ring
        self._stream = torch.cuda.Stream(device)
        torch.cuda.set_stream(self._stream)  # of the calling thread, which is this placer's own
        self._busy = [torch.cuda.Event(), torch.cuda.Event()]
        self._scratch: torch.Tensor | None = None
        self._slot = ring.take(staging_bytes(device))
        halves = self._slot.split(staging_bytes(device) // 2)
        self._halves = [(half, memory_of(half)) for half in halves]

    def place(self, window: Window) -> None:
        """Read the window and start its way to the device."""
        (half, memory), busy = self._halves.pop(0), self._busy.pop(0)
        if not busy.query():
            busy.synchronize()
        if window.ready is not None:
            self._stream.wait_event(window.ready)
        packed = all(isinstance(piece, Run) or piece.is_packed for piece in window.pieces)
        staged = _pinned_view(window) if packed else None
        if staged is not None:
            self._send_all(window, staged)
        elif packed:
            before = window.file.fetch(window.start, window.stop, memory)
            self._send_all(window, half[before:])
        else:
            self._gather(window, half)
        busy.record(self._stream)
        self._halves.append((half, memory))
        self._busy.append(busy)

    def event(self) -> torch.Event:
        """What tells that all windows so far are in place."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def close(self) -> None:
        """Wait for the device and give the pinned slot back."""
        try:
            self._stream.synchronize()
        finally:
            self._ring.give(self._slot)

    def _gather(self, window: Window, half: torch.Tensor) -> None:
        """Read into pageable scratch, then pack what is wanted into pinned memory."""
        if self._scratch is None:
            self._scratch = page_aligned(len(half))
        before = window.file.fetch(window.start, window.stop, memory_of(self._scratch))
        position = 0
        for piece in window.pieces:
            room = half[position : position + piece.nbytes]
            if len(room) < piece.nbytes:  # padding between many odd sizes can use the half up
                room = torch.empty(piece.nbytes, dtype=torch.uint8)
            packed = room if isinstance(piece, Run) else room.view(piece.dtype).view(piece.shape)
            packed.copy_(source_view(self._scratch[before:], window, piece))
            self._send(piece, packed)
            position += -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT

    def _send_all(self, window: Window, data: torch.Tensor) -> None:
        """Copy the window's pieces from pinned memory, those that go byte by byte in one call."""
        base = data.data_ptr() - window.start
        runs = [piece for piece in window.pieces if isinstance(piece, Run)]
        are_sent = bool(runs) and batch_copy()(
            [run.address for run in runs],
            [base + run.offset for run in runs],
            [run.stop - run.offset for run in runs],
            self._stream,
        )
        for piece in window.pieces:
            if not (are_sent and isinstance(piece, Run)):
                self._send(piece, source_view(data, window, piece))

    def _send(self, piece: Run | Transfer, packed: torch.Tensor) -> None:
        """Copy packed pinned elements to the target, casting and scattering on the device."""
        target = piece.target
        if target.dtype == packed.dtype and target.is_contiguous():
            target.copy_(packed, non_blocking=True)
        else:
            target.copy_(packed.to(self._device, non_blocking=True))


def _pinned_view(window: Window) -> torch.Tensor | None:
    """The window's bytes in page-locked memory, if they are staged there."""
    stage = active_stage()
    view = window.file.staged_view(window.start, window.stop) if stage else None
    return None if view is None or stage is None or stage.is_straddling(view) else view


def make_placer(device: torch.device) -> Placer:
    """A placer for the calling thread; on CUDA, one for which the ring has reserved a slot."""
    if device.type == "cpu":
        return HostPlacer()
    torch.cuda.set_device(device)
    return CudaPlacer(device, pinned_ring())


def window_bytes(device: torch.device) -> int:
    """The most that a window for this device spans."""
    return HOST_WINDOW_BYTES if device.type == "cpu" else CUDA_WINDOW_BYTES


def staging_bytes(device: torch.device) -> int:
    """Host memory that one placer for this device takes."""
    return HOST_WINDOW_BYTES if device.type == "cpu" else 2 * (CUDA_WINDOW_BYTES + 2 * PAGE)
