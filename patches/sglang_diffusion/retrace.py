"""Updates of the same modules from files of the same headers: what the one before moved is moved again."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

import torch

from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.errors import WeightliftError
from weightlift.loading.parameters import Parameters
from weightlift.loading.read_ahead import shards_in
from weightlift.loading.session import LoadSession
from weightlift.loading.trace import Trace, Tracer
from weightlift.patches.sglang_diffusion.modules import is_apart
from weightlift.patches.sglang_diffusion.sleep import ENGINES_OWN


class _Known(NamedTuple):
    """The update before: its modules, what their folders held, what it moved, what the engine said of it."""

    names: tuple[str, ...]
    listing: tuple[tuple[object, ...], ...]
    trace: Trace
    message: str


_known: Final[weakref.WeakKeyDictionary[torch.nn.Module, _Known]] = weakref.WeakKeyDictionary()
"""By the first of the modules."""


class Retrace:
    """One update, which follows the one before if it can, and is noted for the next.

    Args:
        modules: What is updated, by name.
        folders: Where the files of each are.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module], folders: Mapping[str, str]) -> None:
        places = [Path(os.path.abspath(folders[name])) for name in modules]
        self._files = [[str(file) for file in shards_in(place)] for place in places]
        self._names = tuple(modules)
        self._listing = tuple(_listing(place) for place in places)
        self._first = next(iter(modules.values()))
        items = modules.values()
        self._is_in_place = not any(is_apart(item) or ENGINES_OWN in vars(item) for item in items)
        listed = torch.nn.ModuleList(items if self._is_in_place else [])
        self._tracer = Tracer(Parameters.of(listed))
        self._followed: _Known | None = None

    @property
    def tracer(self) -> Tracer | None:
        """Takes down an update that does not follow."""
        return self._tracer if self._is_in_place else None

    def follow(self, session: LoadSession) -> str | None:
        """Have all moved as in the update before; returns what the engine said then, None if it cannot be.

        Nothing is written before the session's first flush."""
        known = _known.get(self._first) if self._is_in_place else None
        if known is None or known[:2] != (self._names, self._listing):
            return None
        with ExitStack() as opened:
            try:
                checkpoints = [opened.enter_context(Checkpoint.open(each)) for each in self._files]
            except WeightliftError:  # the engine's own update will tell
                return None
            if not known.trace.holds_for(checkpoints, self._tracer.parameters):
                return None
            opened.pop_all()
        for checkpoint in checkpoints:
            session.hold(checkpoint)
        self._followed = _known.pop(self._first)  # not to be followed again if this fails
        known.trace.follow(session, checkpoints, self._tracer.parameters)
        return known.message

    def note(self, session: LoadSession, message: str) -> None:
        """Remember an update that succeeded."""
        checkpoints = [checkpoint for checkpoint, _ in session.checkpoints]
        opened = [[shard.file.path for shard in each.shards] for each in checkpoints]
        trace = self._followed.trace if self._followed is not None else None
        if trace is None and self._is_in_place and opened == self._files:
            trace, session.report.plan_note = self._tracer.trace(checkpoints)
        if trace is not None:
            _known[self._first] = _Known(self._names, self._listing, trace, message)
        else:
            _known.pop(self._first, None)

    def clear(self) -> None:
        """Hold nothing of the modules any more."""
        self._tracer.clear()


def _listing(folder: Path) -> tuple[object, ...]:
    """Names of shards, and what indices say: from 0.5.20 on they tell the engine which to take."""
    indices = [file.read_bytes() for file in sorted(folder.glob("*.safetensors.index.json"))]
    return (*(file.name for file in shards_in(folder)), *indices)
