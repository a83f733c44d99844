"""A stand-in for an engine's model: final parameters, fused and sliced as tensor parallelism does.

Names of tensors are those of Qwen3 checkpoints (``scripts/gpu/make_checkpoint.py``). A loader offers
tensors by name, whole or lazy, and :meth:`Sharded.load` copies what this rank has of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from weightlift.loading.checkpoint import Checkpoint

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_COLUMN = re.compile(r".*(embed_tokens|lm_head|q_proj|k_proj|v_proj|gate_proj|up_proj)\.weight")
_ROW = re.compile(r".*(o_proj|down_proj)\.weight")


class Sharded:
    """The parameters of one rank.

    Attributes:
        parameters: By name: experts fused as ``w13_weight`` and ``w2_weight``, the rest as stored.
    """

    def __init__(self, path: Path, device: torch.device, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self.parameters: dict[str, torch.Tensor] = {}
        self._targets: dict[str, torch.Tensor] = {}
        with Checkpoint.from_path(path) as checkpoint:
            shapes = {entry.name: (entry.shape, entry.dtype) for entry in checkpoint.entries()}
        experts = 1 + max(
            (int(found[2]) for name in shapes if (found := _EXPERT.fullmatch(name))), default=-1
        )
        for name, (shape, dtype) in shapes.items():
            mine = list(shape)
            dimension = self.dimension(name)
            if dimension is not None:
                mine[dimension] //= size
            self._targets[name] = self._target(name, mine, dtype, device, experts)

    def _target(
        self, name: str, shape: list[int], dtype: torch.dtype, device: torch.device, experts: int
    ) -> torch.Tensor:
        found = _EXPERT.fullmatch(name)
        if not found:
            made = self.parameters[name] = torch.zeros(shape, dtype=dtype, device=device)
            return made
        prefix, number, kind = found[1], int(found[2]), found[3]
        if kind == "down":
            fused, whole, part = f"{prefix}.w2_weight", shape, 0
        else:
            fused, whole, part = f"{prefix}.w13_weight", [2 * shape[0], *shape[1:]], kind == "up"
        if fused not in self.parameters:
            self.parameters[fused] = torch.zeros(experts, *whole, dtype=dtype, device=device)
        return self.parameters[fused][number].narrow(0, part * shape[0], shape[0])

    def dimension(self, name: str) -> int | None:
        """The dimension that ranks share; None if each has all of it."""
        return 0 if _COLUMN.fullmatch(name) else 1 if _ROW.fullmatch(name) else None

    def bounds(self, name: str, length: int) -> tuple[int, int]:
        """From where to where this rank's part of that dimension goes."""
        return self._rank * length // self._size, (self._rank + 1) * length // self._size

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy this rank's part of each tensor, as an engine's loaders do."""
        for name, weight in weights:
            dimension = self.dimension(name)
            if dimension is not None:
                start, stop = self.bounds(name, weight.shape[dimension])
                weight = weight.narrow(dimension, start, stop - start)
            self._targets[name].copy_(weight)

    def place(self, name: str, part: torch.Tensor) -> None:
        """Copy what is this rank's part already."""
        self._targets[name].copy_(part)

    def clear(self) -> None:
        """Zero everything, so that a load that does nothing is found out."""
        for parameter in self.parameters.values():
            parameter.zero_()

    def digest(self) -> int:
        """A number that differs if any byte does, or two are swapped."""
        total = 0
        for name in sorted(self.parameters):
            words = self.parameters[name].view(torch.uint8).reshape(-1)
            for start in range(0, len(words), 64 << 20):
                part = words[start : start + (64 << 20)]
                weights = torch.arange(1, len(part) + 1, device=part.device) % 8191
                total = (total * 31 + int((part * weights).sum())) % (1 << 61)
        return total
