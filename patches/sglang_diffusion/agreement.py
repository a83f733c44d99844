"""``update_weights_from_disk`` of a diffusion pipeline happens on all ranks or on none."""

from __future__ import annotations

import gc
import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.transaction import Transaction, Vote, within
from weightlift.patches.planned import rank
from weightlift.patches.sglang_diffusion.updates import NEW, OLD


def _update_weights_from_disk(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, str]:
    """Update on all ranks or on none, also where one does not come as far as to write."""
    if not context_of("sglang").settings().parallel_module_load:
        done: tuple[bool, str] = wrapped(*args, **kwargs)
        return done
    transaction = Transaction(voter())
    is_done, message = False, "it ended without a word"
    with within(transaction):
        try:
            with _in_place_of_gc(wrapped.__globals__, _Garbage(transaction)):
                is_done, message = wrapped(*args, **kwargs)
        except Exception as error:
            message = repr(error)
            raise
        finally:
            transaction.end("" if is_done else message)  # the others wait, if it has not been told
    return is_done, message


class _Garbage:
    """Stands for the module ``gc`` in that of the engine's updater while an update is on.

    After each update the engine looks through all objects of the server: of 824,000 that took most of the
    update's Python. After one that went by plan, those that came up since will do, but now and then.
    """

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction

    def collect(self, generation: int = 2) -> int:
        """Collect garbage; returns how much there was."""
        is_young = self._transaction.is_planned and next(_planned) % ALL_EVERY
        return gc.collect(min(generation, 1) if is_young else generation)

    def __getattr__(self, name: str) -> Any:
        return getattr(gc, name)


ALL_EVERY = 10
"""So often all objects are looked through nevertheless: others may have left garbage, too."""

_planned = itertools.count(1)


@contextmanager
def _in_place_of_gc(engine: dict[str, Any], garbage: _Garbage) -> Iterator[None]:
    """Within this, the engine's module has another one of that name, if it has any."""
    if engine.get("gc") is not gc:
        yield
        return
    engine["gc"] = garbage
    try:
        yield
    finally:
        engine["gc"] = gc


def voter() -> Vote:
    """How ranks tell each other their problems, along the groups in which requests travel.

    The groups are those of now: while an encoder takes weights, its ranks are the tensor-parallel group.
    """
    state = importlib.import_module("sglang.multimodal_gen.runtime.distributed.parallel_state")
    groups = [state.get_sp_group(), state.get_cfg_group(), state.get_tp_group()]

    def vote(problem: str) -> list[str]:
        problems = {rank(): problem}
        for group in groups:
            if group.world_size > 1:
                told: list[Any] = [None] * group.world_size
                torch.distributed.all_gather_object(told, problems, group=group.cpu_group)
                problems = {number: text for each in told for number, text in each.items()}
        return [problems.get(number, "") for number in range(max(problems) + 1)]

    return vote


def _record(module: str, versions: str) -> Patch:
    return Patch(
        target=f"{module}:WeightsUpdater.update_weights_from_disk",
        versions=versions,
        wrapper=_update_weights_from_disk,
        parameters=("model_path",),
        why="Each rank updates by itself, and only the first one's result is told: one that fails alone "
        "leaves a server of two checkpoints, in silence.",
        how="With `--enable-parallel-module-load` the ranks agree to write once all have planned, and on "
        "the end; if one failed, all have the weights before. After one that went by plan the engine "
        "looks for garbage among what came up since, and each tenth time among all.",
        upstream="Nothing is proposed.",
        drop_when="The engine's ranks agree on updates.",
    )


PATCHES: tuple[Patch, ...] = (
    _record(OLD, ">=0.5.9,<0.5.14"),
    _record(NEW, ">=0.5.14,<0.5.24"),
)
