"""Memory of this process as buffers that reads can fill."""

from __future__ import annotations

import ctypes

import torch

Buffer = memoryview


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
