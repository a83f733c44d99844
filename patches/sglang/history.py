"""What is known of a model from the loads that it went through. Forgotten with the model."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch

from weightlift.loading.expectation import Expectation
from weightlift.loading.recording import Recording


@dataclass
class History:
    """The loads of one model.

    Attributes:
        recordings: By phase, the last load. Between launch and update, post-processing may have
            changed what the engine's loader goes by, so one is not replayed for the other.
        expectation: What the next checkpoint must bring.
        path: The checkpoint whose weights are in place, or '' if they are of no checkpoint.
        load_format: How it was loaded.
    """

    recordings: dict[str, Recording] = field(default_factory=dict)
    expectation: Expectation | None = None
    path: str = ""
    load_format: str = "auto"


_histories: weakref.WeakKeyDictionary[torch.nn.Module, History] = weakref.WeakKeyDictionary()


def known_recordings() -> list[Recording]:
    """The last load of every model of this process, updates rather than launches."""
    found = []
    for history in list(_histories.values()):
        last = history.recordings.get("update") or history.recordings.get("launch")
        found += [last] if last else []
    return found


def history_of(model: torch.nn.Module) -> History:
    """The history of a model, empty before its first load."""
    return _histories.setdefault(model, History())


def has_others(model: torch.nn.Module) -> bool:
    """Whether this process loaded another model: a draft model comes after its target."""
    return any(other is not model for other in list(_histories))
