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
from weightlift.loading.errors import PlanAborted, WeightliftError
from weightlift.loading.parameters import Parameters
from weightlift.loading.read_ahead import shards_in
from weightlift.loading.session import LoadSession
from weightlift.loading.trace import Trace, Tracer
from weightlift.patches.sglang_diffusion.modules import is_apart

_SNAPSHOT = "_offload_weight_snapshot"
"""Where the engine, from 0.5.20 on, keeps weights of a module that is not where it is used."""


class _Known(NamedTuple):
    """The update before: its modules, the shards of each, what it moved, what the engine said of it."""

    names: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]
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
        self._modules = modules
        self._folders = [Path(os.path.abspath(folders[name])) for name in modules]
        self._parameters = Parameters.of(torch.nn.ModuleList(modules.values()))
        self.tracer = Tracer(self._parameters)

    def follow(self, session: LoadSession) -> str:
        """Have all moved as in the update before; returns what the engine said then, or '' if it cannot be.

        Nothing is written before the session's first flush.

        Raises:
            PlanAborted: Files were replaced just now.
        """
        known = self._known()
        if known is None or not self._holds(known.trace):
            return ""
        checkpoints = [session.open(files) for files in self._files()]
        if not known.trace.holds_for(checkpoints, self._parameters):
            raise session.abort(PlanAborted("files were replaced while they were opened"))
        known.trace.follow(session, checkpoints, self._parameters)
        return known.message

    def _holds(self, trace: Trace) -> bool:
        """Whether it holds for the files that are there now; the session opens each once."""
        with ExitStack() as opened:
            try:
                checkpoints = [
                    opened.enter_context(Checkpoint.open(files)) for files in self._files()
                ]
            except WeightliftError:  # the engine's own update will tell
                return False
            return trace.holds_for(checkpoints, self._parameters)

    def _known(self) -> _Known | None:
        """The update before, if it was of the same modules and of files of the same names."""
        known = _known.get(next(iter(self._modules.values())))
        is_alike = known is not None and known[:2] == (tuple(self._modules), self._names())
        return known if is_alike and self._are_in_place() else None

    def _are_in_place(self) -> bool:
        modules = self._modules.values()
        return not any(is_apart(item) or _SNAPSHOT in vars(item) for item in modules)

    def _files(self) -> list[list[str]]:
        """The shards of each module."""
        return [[str(file) for file in shards_in(folder)] for folder in self._folders]

    def _names(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(map(os.path.basename, files)) for files in self._files())

    def note(self, session: LoadSession, message: str) -> None:
        """Remember an update that succeeded."""
        checkpoints = [checkpoint for checkpoint, _ in session.checkpoints]
        opened = [shard.file.path for each in checkpoints for shard in each.shards]
        if opened != [file for files in self._files() for file in files]:
            session.report.plan_note = "the engine read other files than these"
            return
        trace, session.report.plan_note = self.tracer.trace(checkpoints)
        first = next(iter(self._modules.values()))
        if trace is not None and self._are_in_place():
            _known[first] = _Known(tuple(self._modules), self._names(), trace, message)
        else:
            _known.pop(first, None)
