"""From a file's bytes to the tensors they fill, on the CPU and on CUDA."""

from __future__ import annotations

import torch

from weightlift.loading.buffers import Buffer, memory_at, memory_of
from weightlift.loading.pages import PAGE
from weightlift.loading.plan import Window
from weightlift.loading.settings import MIB
from weightlift.loading.staging import page_aligned
from weightlift.loading.transfer import Run, Transfer

HOST_WINDOW_BYTES = 16 * MIB
CUDA_WINDOW_BYTES = 12 * MIB
"""What is planned as one; a crew reads it in parts. Of 8 MiB there are half as many again, and each
takes 60 us of the thread that plans; of 16 MiB the last ones end later."""


class HostPlacer:
    """Reads straight into the target's memory where the layouts agree, else by scratch."""

    def __init__(self) -> None:
        self._scratch: torch.Tensor | None = None

    def place(self, window: Window) -> None:
        """Read the window and fill its pieces; done on return."""
        staged = window.file.staged_view(window.start, window.stop)
        if staged is not None:
            place(window, staged)
            return
        runs = [piece for piece in window.pieces if isinstance(piece, Run)]
        is_direct = window.file.is_direct(window.start, window.stop)
        if len(runs) == len(window.pieces) and not is_direct:
            window.file.read_into(window.start, _scatter(window.start, runs))
            return
        if self._scratch is None:
            self._scratch = page_aligned(HOST_WINDOW_BYTES + 2 * PAGE)
        before = window.file.fetch(window.start, window.stop, memory_of(self._scratch))
        place(window, self._scratch[before:])


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


def place(window: Window, data: torch.Tensor) -> None:
    """Copy a window's pieces, cast and scattered, from its bytes: on the host, or on their device."""
    for piece in window.pieces:
        piece.target.copy_(source_view(data, window, piece), non_blocking=True)


def window_bytes(device: torch.device) -> int:
    """The most that a window for this device spans."""
    return HOST_WINDOW_BYTES if device.type == "cpu" else CUDA_WINDOW_BYTES
