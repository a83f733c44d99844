"""The errors of the core."""

from __future__ import annotations


class WeightliftError(RuntimeError):
    """Base of every error that weightlift raises on purpose."""


class CheckpointError(WeightliftError):
    """A checkpoint cannot be read as its files promise.

    The message names the file, the tensor if there is one, what is wrong, and what to do.
    """

    def __init__(self, path: str, problem: str, *, tensor: str = "", remedy: str = "") -> None:
        where = f"{path}, tensor {tensor!r}" if tensor else path
        remedy = remedy or "Write or download this file again."
        super().__init__(f"{where}: {problem}. {remedy}")
        self.path = path
        self.tensor = tensor


class UnsupportedCheckpoint(WeightliftError):
    """A valid checkpoint that weightlift does not plan; the caller loads it some other way."""


class PlanAborted(WeightliftError):
    """A loader did something with a lazy tensor that cannot be planned; load again, natively."""


class UpdateRefused(WeightliftError):
    """A rank of the group cannot update, so none does; nothing was written."""
