"""The ranks of one host that load the same checkpoint at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

WORD_BYTES = 1024
"""Room for what a rank says in an agreement; longer text is cut off."""


# Renamed in torch 2.13.
_gather_into: Any = getattr(torch.distributed, "all_gather_single", None) or getattr(
    torch.distributed, "all_gather_into_tensor", None
)


class Group(Protocol):
    """What ranks need to share the reading of a checkpoint. Every call is made by all of them."""

    @property
    def rank(self) -> int:
        """Number of this one."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def gather(self, text: str) -> list[str]:
        """What each rank says, in their order."""
        ...

    def add_up(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of int64 CPU tensors of equal shape."""
        ...

    def all_gather(self, whole: torch.Tensor) -> None:
        """Complete a buffer of which each rank has filled its part, on the current stream.

        Args:
            whole: As many equal parts as there are ranks, on the device that they load to.
        """


@dataclass(frozen=True)
class TorchGroup:
    """Ranks that ``torch.distributed`` knows.

    Attributes:
        rank: Number of this one in the group.
        size: How many there are.
        cpu_group: Their process group for CPU tensors (Gloo).
        device_group: Theirs for tensors of the device: NCCL for CUDA. NCCL's multicast (NVLS) is
            left as the engine has it.
    """

    rank: int
    size: int
    cpu_group: Any
    device_group: Any

    def gather(self, text: str) -> list[str]:
        """What each rank says, in their order."""
        word = text.encode()[:WORD_BYTES].ljust(WORD_BYTES, b"\0")
        mine = torch.frombuffer(bytearray(word), dtype=torch.uint8)
        words = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(words, mine, group=self.cpu_group)
        return [bytes(word.tolist()).rstrip(b"\0").decode(errors="replace") for word in words]

    def add_up(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of int64 CPU tensors of equal shape."""
        total = numbers.clone()
        torch.distributed.all_reduce(total, group=self.cpu_group)
        return total

    def all_gather(self, whole: torch.Tensor) -> None:
        """Complete a buffer of which each rank has filled its part, on the current stream."""
        parts = whole.chunk(self.size)
        mine = parts[self.rank]
        if whole.device.type == "cpu":  # Gloo has no gather into one tensor in older torch
            torch.distributed.all_gather(list(parts), mine.clone(), group=self.cpu_group)
        else:
            _gather_into(whole, mine, group=self.device_group)
