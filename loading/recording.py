"""What a load did with each tensor of its checkpoint, in a form that can be done again.

A load that was planned by the engine's own code leaves a *recipe* for every tensor of which it
only copied parts into parameters. Tensors that it did anything else with have none: the engine must
see them again.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.files import ShardFile
from weightlift.loading.header import TensorEntry
from weightlift.loading.parameters import Geometry, Parameters
from weightlift.loading.shared_plan import SharedPlan
from weightlift.loading.transfer import Transfer, extent


class MoveLayout(NamedTuple):
    """How a move's elements lie where they are not copied byte by byte; strides in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    target_dtype: torch.dtype
    target_stride: tuple[int, ...]


class Move(NamedTuple):
    """A part of a stored tensor that fills a part of a parameter.

    Attributes:
        start: Byte of the stored tensor.
        nbytes: Bytes that are wanted of it.
        target: Name of the parameter.
        place: Byte of the parameter, from its first element.
        layout: None if the bytes go over as they are.
    """

    start: int
    nbytes: int
    target: str
    place: int
    layout: MoveLayout | None

    @property
    def filled(self) -> int:
        """Bytes of the parameter that it fills."""
        if self.layout is None:
            return self.nbytes
        return self.nbytes // self.layout.dtype.itemsize * self.layout.target_dtype.itemsize

    def transfer(self, file: ShardFile, offset: int, memory: torch.Tensor) -> Transfer:
        """This move, which has a layout, of a tensor of a checkpoint.

        Args:
            file: The shard.
            offset: Where the tensor starts in it.
            memory: The parameter's, flat uint8.
        """
        assert self.layout is not None
        dtype, shape, stride, target_dtype, target_stride = self.layout
        skipped = memory.storage_offset() + self.place
        target = torch.empty(0, dtype=target_dtype, device=memory.device).set_(
            memory.untyped_storage(), skipped // target_dtype.itemsize, shape, target_stride
        )
        return Transfer(file, offset + self.start, dtype, shape, stride, target)


class Recipe(NamedTuple):
    """What becomes of a stored tensor of this shape and dtype; without moves, nothing."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class Recording:
    """A load that can be done again while everything that it depends on is as it was.

    Attributes:
        recipes: By tensor name.
        for_engine: Shape and dtype of the tensors that the engine must see each time.
        geometry: Where the parameters were.
        configuration: What else the engine's loader depends on: ranks, where experts are.
        headers: The tensors of each shard. The same objects are the same headers.
        returned: What the engine's loader returned.
        shared: How the ranks of the host shared its reading, if they did.
    """

    recipes: Mapping[str, Recipe]
    for_engine: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    geometry: Geometry
    configuration: str
    headers: tuple[Mapping[str, TensorEntry], ...]
    returned: Any = None
    shared: SharedPlan | None = None

    @functools.cached_property
    def moves(self) -> int:
        """How many moves there are."""
        return sum(len(recipe.moves) for recipe in self.recipes.values())

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes that they take from the files."""
        return sum(move.nbytes for recipe in self.recipes.values() for move in recipe.moves)

    def misfit(self, checkpoint: Checkpoint, geometry: Geometry, configuration: str) -> str:
        """Why this recording does not hold for such a checkpoint and model, or ''."""
        if configuration != self.configuration:
            return "the ranks or experts are arranged differently"
        if geometry != self.geometry:
            return "the parameters are not where they were"
        if _are_same(self.headers, checkpoint):
            return ""
        missing = self.recipes.keys() | self.for_engine.keys()
        for entry in checkpoint.entries():
            recipe = self.recipes.get(entry.name)
            stored = recipe[:2] if recipe else self.for_engine.get(entry.name)
            if stored != (entry.shape, entry.dtype) or entry.name not in missing:
                return f"{entry.name} is not what it was, or stands there twice"
            missing.discard(entry.name)
        return f"{len(missing)} tensors are missing" if missing else ""


def _are_same(headers: Sequence[object], checkpoint: Checkpoint) -> bool:
    now = [shard.tensors for shard in checkpoint.shards]
    return len(headers) == len(now) and all(map(operator.is_, headers, now))


@dataclass
class Ledger:
    """Takes down what a load does with each tensor, while the engine's loader runs.

    Attributes:
        parameters: Those of the model.
        seen: Parts of the names that the engine must see each time.
        blamed: Why the engine must see a tensor again, by its name.
        after_all: What the loader did to parameters once it had every tensor, or ''.
        strangers: Whether threads other than the loader's own made copies.
        joins: Whether it can do with copies of tensors that were joined.
    """

    joins: ClassVar[bool] = False

    parameters: Parameters
    seen: tuple[str, ...] = ()
    blamed: dict[str, str] = field(default_factory=dict)
    after_all: str = ""
    strangers: bool = False
    _entries: dict[str, TensorEntry] = field(default_factory=dict)
    _moves: dict[str, list[Move]] = field(default_factory=dict)
    _touched: set[str] = field(default_factory=set)
    _current: str = ""

    def offer(self, entry: TensorEntry) -> None:
        """The loader gets this tensor now."""
        if entry.name in self._entries:
            self.blamed[entry.name] = "two sources have a tensor of this name"
        if any(part in entry.name for part in self.seen):
            self.blamed[entry.name] = "the engine counts these"
        self._entries[entry.name] = entry
        self._current = entry.name

    def moved(self, entry: TensorEntry, transfer: Transfer) -> None:
        """The loader copied a part of this tensor."""
        found = self.parameters.locate(transfer.target)
        if found is None:
            self.blamed[entry.name] = "it was copied to what is no parameter"
            return
        layout = None
        if not transfer.is_direct:
            strides = transfer.stride, transfer.target.dtype, transfer.target.stride()
            layout = MoveLayout(transfer.dtype, transfer.shape, *strides)
        move = Move(transfer.offset - entry.offset, transfer.nbytes, *found, layout)
        self._moves.setdefault(entry.name, []).append(move)

    def touched(self, func: Callable[..., Any], tensors: Iterable[torch.Tensor]) -> bool:
        """The loader did something else; whether parameters took part in it."""
        found = {place[0] for tensor in tensors if (place := self.parameters.locate(tensor))}
        if not found:
            return False
        self._touched |= found
        what = getattr(func, "__name__", repr(func))
        if self._current:
            self.blamed[self._current] = what
        else:
            self.after_all = what
        return True

    def end(self) -> None:
        """The loader was told that there are no more."""
        self._current = ""

    def blame_overlaps(self) -> None:
        """Tensors that write to one place keep their order, which only the engine knows."""
        reach: dict[str, list[tuple[int, int, str]]] = {}
        for name, moves in self._moves.items():
            for move in moves:
                reach.setdefault(move.target, []).append((move.place, _end(move), name))
        for target, spans in reach.items():
            if target in self._touched:
                self.blamed.update(
                    (name, "the loader worked on its parameter") for *_, name in spans
                )
            spans.sort()
            last_end, last_name = 0, ""
            for start, end, name in spans:
                if start < last_end:
                    self.blamed[name] = self.blamed[last_name] = "two tensors write to one place"
                if end > last_end:
                    last_end, last_name = end, name

    def recipe(self, name: str) -> Recipe | None:
        """What became of a tensor, or None if the engine must see it again."""
        if name in self.blamed or name not in self._entries:
            return None
        entry = self._entries[name]
        return Recipe(entry.shape, entry.dtype, tuple(self._moves.get(name, ())))

    def is_settled(self, name: str) -> bool:
        """Whether it is known what becomes of a tensor: parts of it were copied, or it is blamed."""
        return name in self._moves or name in self.blamed

    def names(self) -> list[str]:
        """The tensors that the loader got."""
        return list(self._entries)

    def stored(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor in its file."""
        return self._entries[name].shape, self._entries[name].dtype


def _end(move: Move) -> int:
    """The byte of the parameter after the last that a move writes."""
    if move.layout is None:
        return move.place + move.nbytes
    layout = move.layout
    return move.place + extent(layout.shape, layout.target_stride) * layout.target_dtype.itemsize
