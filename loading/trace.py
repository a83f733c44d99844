"""A load as its copies: the same bytes to the same places, from other files of the same headers.

Where a model's loader did nothing but copy, that is all that it did, and it can be done again without
the loader. A recording knows tensor by tensor, and lets the loader see what it must; a trace holds as a
whole or not at all, and of any number of models and checkpoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.header import TensorEntry
from weightlift.loading.operations import SET_ITEM, is_in_place
from weightlift.loading.parameters import Geometry, Parameters
from weightlift.loading.recording import Ledger
from weightlift.loading.session import LoadSession
from weightlift.loading.steps import Step, Storages, step_of
from weightlift.loading.transfer import Run, Transfer, extent


@dataclass(frozen=True)
class Trace:
    """What a load moved; it holds no tensor.

    Attributes:
        headers: The tensors of each shard. The same objects are the same headers.
        geometry: Where the parameters were.
        storages: Where the storages of these were, and how long.
        steps: By shard, what was taken from it; offsets count from the start of the file.
    """

    headers: tuple[Mapping[str, TensorEntry], ...]
    geometry: Geometry
    storages: Mapping[int, int]
    steps: tuple[tuple[Step, ...], ...]

    def holds_for(self, checkpoints: Sequence[Checkpoint], parameters: Parameters) -> bool:
        """Whether it can be followed from these checkpoints to these parameters."""
        now = [shard.tensors for checkpoint in checkpoints for shard in checkpoint.shards]
        has_headers = len(now) == len(self.headers) and all(
            before is after for before, after in zip(self.headers, now, strict=True)
        )
        are_there = self.storages == _lengths(parameters.storages())
        return has_headers and are_there and self.geometry == parameters.geometry()

    def follow(
        self, session: LoadSession, checkpoints: Sequence[Checkpoint], parameters: Parameters
    ) -> None:
        """Hand the same copies to the readers of another load.

        Args:
            session: The load.
            checkpoints: What it reads, for which the trace holds.
            parameters: What it fills.
        """
        storages = parameters.storages()
        shards = [shard for checkpoint in checkpoints for shard in checkpoint.shards]
        for shard, steps in zip(shards, self.steps, strict=True):
            devices: dict[torch.device, tuple[list[Run | Transfer], Storages]] = {}
            for step in steps:
                memory = storages[step.storage]
                pieces, used = devices.setdefault(memory.device, ([], {}))
                pieces.append(step.piece(shard.file, storages))
                used[step.storage] = memory
            for pieces, used in devices.values():
                session.report.bytes_needed += sum(piece.nbytes for piece in pieces)
                session.delivery.add_disjoint(shard.file, pieces, used.values())
            session.report.replayed += len(steps)


@dataclass
class Tracer(Ledger):
    """Takes down the copies of a load, and whether the loader did anything else to parameters.

    Attributes:
        transfers: The copies.
    """

    joins: ClassVar[bool] = True

    transfers: list[Transfer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._storages = self.parameters.storages()

    def offer(self, entry: TensorEntry) -> None:
        """Tensors may have the same names: they may be of several models."""

    def moved(self, entry: TensorEntry, transfer: Transfer) -> None:
        """The loader copied a part of this tensor."""
        if _storage(transfer.target) not in self._storages:
            self.blamed[entry.name] = "it was copied to what is no parameter"
        elif not self.blamed:
            self.transfers.append(transfer)

    def touched(self, func: Callable[..., Any], tensors: Iterable[torch.Tensor]) -> bool:
        """Note whether parameters took part in something else; there will be no trace then.

        Returns whether it may be that one is written to.
        """
        places = [_storage(tensor) for tensor in tensors]
        if not any(place is None or place in self._storages for place in places):
            return False
        self.after_all = getattr(func, "__name__", repr(func))
        return is_in_place(func) or func == SET_ITEM

    def clear(self) -> None:
        """Hold nothing of the model any more."""
        self.transfers.clear()
        self._storages = {}
        self.parameters = Parameters({})

    def trace(self, checkpoints: Sequence[Checkpoint]) -> tuple[Trace | None, str]:
        """What was moved from these, or why that is not all that was done."""
        if self.blamed:
            return None, "{}: {}".format(*min(self.blamed.items()))
        if self.after_all or self.strangers:
            threads = "the loader has threads of its own"
            return None, threads if self.strangers else f"{self.after_all} took part in it"
        shards = [shard for checkpoint in checkpoints for shard in checkpoint.shards]
        found: dict[int, list[Step]] = {id(shard.file): [] for shard in shards}
        for transfer in self.transfers:
            piece = Run(transfer.offset, transfer.stop, transfer.target, 0)
            step = step_of(piece if transfer.is_direct else transfer, transfer.offset, {})
            found[id(transfer.file)].append(step)
        steps = tuple(tuple(found[id(shard.file)]) for shard in shards)
        if not _are_apart(itertools.chain(*steps)):
            return None, "two tensors write to one place"
        headers = tuple(shard.tensors for shard in shards)
        lengths = _lengths(self._storages)
        return Trace(headers, self.parameters.geometry(), lengths, steps), ""


def _are_apart(steps: Iterable[Step]) -> bool:
    """Whether no two of them write to one place; their order would count."""
    spans = []
    for step in steps:
        dtype, shape, stride = step.target
        start = step.storage + step.place
        spans.append((start, start + extent(shape, stride) * dtype.itemsize))
    spans.sort()
    return all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def _lengths(storages: Storages) -> dict[int, int]:
    return {place: owner.untyped_storage().nbytes() for place, owner in storages.items()}


def _storage(tensor: torch.Tensor) -> int | None:
    """Where a tensor's storage is; None for what may have others within."""
    if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return None
    return tensor.untyped_storage().data_ptr()
