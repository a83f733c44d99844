"""Memory of this process as buffers that reads can fill, or that hold what was read before."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import torch

Buffer = memoryview


class Staged(Protocol):
    """Bytes of a file that are in memory already."""

    def view(self, start: int, stop: int) -> torch.Tensor | None:
        """The bytes from ``start`` to ``stop``, if all of them are."""

    def read_into(self, start: int, buffers: Sequence[Buffer]) -> bool:
        """Fill these buffers from byte ``start`` on; False if not all of it is there."""
        ...


class Locked(Protocol):
    """A file in memory whose pages a device may copy from, and the host must not touch."""

    def view(self, start: int, stop: int) -> torch.Tensor | None:
        """The bytes from ``start`` to ``stop``, if they are page-locked in one piece."""

    def check(self) -> None:
        """See that the pages are still the file's; raises ``CheckpointError`` if they are not."""


def after(buffers: list[Buffer], got: int) -> list[Buffer]:
    """What is left of these buffers once the first ``got`` bytes are filled."""
    for position, buffer in enumerate(buffers):
        if got < len(buffer):
            return [buffer[got:], *buffers[position + 1 :]]
        got -= len(buffer)
    return []


def memory_of(tensor: torch.Tensor) -> Buffer:
    """The bytes of a contiguous CPU tensor, writable. It must outlive the result."""
    return memory_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def memory_at(address: int, length: int) -> Buffer:
    """Bytes of this process, writable. They must outlive the result."""
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")
