"""Doing again what is known: recipes become transfers without a line of the engine's code."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.parameters import Parameters
from weightlift.loading.recording import Recipe
from weightlift.loading.session import LoadSession
from weightlift.loading.transfer import Run


def deliver(
    session: LoadSession,
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    parameters: Parameters,
) -> int:
    """Hand the moves of these recipes to the readers, file by file.

    Args:
        session: The load.
        checkpoint: Its open shards; tensors without a recipe are left out.
        recipes: By tensor name. No two of them write to one place.
        parameters: What they write to.

    Returns:
        How many moves there were.
    """
    with torch._C.DisableTorchFunction():  # no guard: this is no work of the loader's
        return _deliver(session, checkpoint, recipes, parameters)


def _deliver(
    session: LoadSession,
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    parameters: Parameters,
) -> int:
    count = 0
    memories: dict[str, tuple[torch.Tensor, list[Run]]] = {}
    runs_by_device: dict[torch.device, list[Run]] = {}
    for shard in checkpoint.shards:
        for entry in shard.tensors.values():
            recipe = recipes.get(entry.name)
            if recipe is None:
                continue
            start = entry.offset
            for move in recipe.moves:
                known = memories.get(move.target)
                if known is None:
                    memory = parameters.memory(move.target)
                    known = memory, runs_by_device.setdefault(memory.device, [])
                    memories[move.target] = known
                memory, runs = known
                if move.layout is None:
                    first = start + move.start
                    runs.append(Run(first, first + move.nbytes, memory, move.place))
                else:
                    session.delivery.add(move.transfer(shard.file, start, memory))
                session.report.bytes_needed += move.nbytes
            count += len(recipe.moves)
        for device, runs in runs_by_device.items():
            if runs:
                session.delivery.add_runs(device, shard.file, runs)
                runs.clear()
    return count
