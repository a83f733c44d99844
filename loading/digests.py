"""Digests of memory, computed where it is, to see which parts of it are as they were.

A chunk's 32-bit words are multiplied by random 64-bit factors and summed, modulo 2**64: the multilinear
hash (Carter and Wegman 1979). Two different chunks have the same digest with a probability of at most
2**-33, over the choice of the factors; of 2**-64 if any of their words differ in the lowest bit.
"""

from __future__ import annotations

import os
from typing import Final

import torch

CHUNK_BYTES = 4 << 20
_CHUNKS_AT_ONCE = 8
"""Their products take 64 MiB, next to a model that may fill the device."""

_WORDS: Final = CHUNK_BYTES // 4


class Digests:
    """Digests by factors of this process's own; those of different objects do not compare."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "little"))
        least, most = -(1 << 63), (1 << 63) - 1
        self._factors = torch.randint(least, most, (_WORDS,), generator=generator)
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        """The digest of each chunk: int64, on the device of the memory, which is not waited for.

        Args:
            memory: Flat uint8, on any device; its last chunk may be shorter.
        """
        factors, products = self._ready(memory.device)
        nbytes = memory.numel()
        whole = nbytes // CHUNK_BYTES
        chunks = memory[: whole * CHUNK_BYTES].view(torch.int32).view(whole, _WORDS)
        found = [
            torch.mul(some, factors, out=products[: some.shape[0]]).sum(1)
            for some in chunks.split(_CHUNKS_AT_ONCE)
        ]
        rest = memory[whole * CHUNK_BYTES :]
        if rest.numel():
            words = torch.nn.functional.pad(rest, (0, -nbytes % 4)).view(torch.int32)
            found.append((words * factors[: words.numel()]).sum().view(1))
        return torch.cat(found) if found else factors[:0]

    def free(self) -> None:
        """Give back what is on devices; the factors stay."""
        self._on_device.clear()

    def _ready(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._on_device:
            products = torch.empty(_CHUNKS_AT_ONCE, _WORDS, dtype=torch.int64, device=device)
            self._on_device[device] = (self._factors.to(device), products)
        return self._on_device[device]


def changed(before: torch.Tensor, now: torch.Tensor) -> list[slice]:
    """Bytes that differ between two states of a memory, by their digests; runs of chunks as one.

    Args:
        before: Digests of one state, on the CPU.
        now: Those of the other.
    """
    different: list[int] = (before != now).nonzero().view(-1).tolist()
    runs: list[slice] = []
    for chunk in different:
        start = chunk * CHUNK_BYTES
        if runs and runs[-1].stop == start:
            runs[-1] = slice(runs[-1].start, start + CHUNK_BYTES)
        else:
            runs.append(slice(start, start + CHUNK_BYTES))
    return runs
