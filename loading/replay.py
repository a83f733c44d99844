"""Doing again what is known: recipes become transfers without a line of the engine's code."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.parameters import Parameters
from weightlift.loading.recording import Recipe
from weightlift.loading.session import LoadSession
from weightlift.loading.transfer import Run, Transfer


def deliver(
    session: LoadSession,
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    parameters: Parameters,
) -> tuple[int, int]:
    """Hand the moves of these recipes to the readers, file by file.

    Args:
        session: The load.
        checkpoint: Its open shards; tensors without a recipe are left out.
        recipes: By tensor name. No two of them write to one place.
        parameters: What they write to.

    Returns:
        How many moves there were, and bytes that they take.
    """
    with torch._C.DisableTorchFunction():  # no guard: this is no work of the loader's
        return _deliver(session, checkpoint, recipes, parameters)


def _deliver(
    session: LoadSession,
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    parameters: Parameters,
) -> tuple[int, int]:
    count = nbytes = 0
    memories: dict[str, torch.Tensor] = {}
    for shard in checkpoint.shards:
        pieces: dict[torch.device, list[Run | Transfer]] = {}
        used: dict[torch.device, dict[str, torch.Tensor]] = {}
        for entry in shard.tensors.values():
            recipe = recipes.get(entry.name)
            for move in recipe.moves if recipe else ():
                target, start = move.target, entry.offset + move.start
                memory = memories.get(target)
                if memory is None:
                    memory = memories[target] = parameters.memory(target)
                device = parameters.tensors[target].device
                used.setdefault(device, {})[target] = memory
                pieces.setdefault(device, []).append(
                    Run(start, start + move.nbytes, memory, move.place)
                    if move.layout is None
                    else move.transfer(shard.file, entry.offset, memory)
                )
                nbytes += move.nbytes
                count += 1
        for device, work in pieces.items():
            session.delivery.add_disjoint(shard.file, work, used[device].values())
    return count, nbytes
