"""What a checkpoint must bring, so that an update leaves no parameter with its old value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.errors import CheckpointError
from weightlift.loading.recording import Recipe


@dataclass(frozen=True)
class Expectation:
    """What an earlier load of the same model was made from.

    Attributes:
        shapes: Of the stored tensors that it used, by name. Their dtypes may change.
        coverage: Bytes that their plain copies filled, by parameter.
    """

    shapes: Mapping[str, tuple[int, ...]]
    coverage: Mapping[str, int]

    def check(self, checkpoint: Checkpoint) -> None:
        """See that a checkpoint has what the model is made from.

        Raises:
            CheckpointError: A tensor is missing, or has another shape.
        """
        found = checkpoint.locate()
        first = checkpoint.shards[0].file.path if checkpoint.shards else "the checkpoint"
        for name, shape in self.shapes.items():
            if name not in found:
                problem = "it is in none of the files, though the weights before were made from it"
                raise CheckpointError(first, problem, tensor=name, remedy=_REMEDY)
            file, entry = found[name]
            if entry.shape != shape:
                problem = f"its shape is {entry.shape}, the model was made from {shape}"
                raise CheckpointError(file.path, problem, tensor=name, remedy=_REMEDY)

    def check_coverage(self, coverage: Mapping[str, int], path: str) -> None:
        """See that a plan fills what the plan before filled.

        Raises:
            CheckpointError: It does not.
        """
        for name, nbytes in self.coverage.items():
            if coverage.get(name, 0) != nbytes:
                problem = f"{coverage.get(name, 0)} bytes would be filled of {nbytes} before"
                raise CheckpointError(path, problem, tensor=name, remedy=_REMEDY)


_REMEDY = "Save the whole model, or launch a server for this one."


def coverage(recipes: Iterable[Recipe]) -> dict[str, int]:
    """Bytes that plain copies fill, by parameter."""
    found: dict[str, int] = {}
    for recipe in recipes:
        for move in recipe.moves:
            found[move.target] = found.get(move.target, 0) + move.filled
    return found
