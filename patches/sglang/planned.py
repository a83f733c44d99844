"""One load by plan: the model's ``load_weights`` gets what it must see, lazily."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from weightlift.loading.exchange import Exchange
from weightlift.loading.lazy import LazyTensor
from weightlift.loading.leftovers import meta_names
from weightlift.loading.parameters import Parameters
from weightlift.loading.planner import Planner
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession, NamedWeights
from weightlift.loading.settings import Settings
from weightlift.loading.transaction import active_transaction
from weightlift.patches.sglang.architectures import configuration, families_of
from weightlift.patches.sglang.history import history_of
from weightlift.patches.shadow import shadowed


class PlannedLoad:
    """A launch or an update of one model.

    Args:
        model: The model.
        settings: Threads, memory, whether fast load is wanted.
        report: Counts what happens.
        exchange: How the ranks share the reading, if they may.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: Settings,
        report: LoadReport,
        exchange: Exchange | None = None,
    ) -> None:
        self._model = model
        self._report = report
        self._history = history_of(model)
        self._exchange = exchange
        self._transaction = active_transaction()
        self._is_checked = False
        is_update = report.phase == "update"
        self._planner = Planner(
            Parameters.of(model),
            configuration(model),
            recording=self._history.recordings.get(report.phase) if is_update else None,
            families=families_of(model),
            is_fast=settings.fast_load,
            expectation=self._history.expectation if self._is_whole() else None,
        )
        self.session = LoadSession(
            settings,
            report,
            self._planner.ledger,
            self._planner.weights,
            self._before_write if self._transaction else None,
            exchange,
        )

    def _is_whole(self) -> bool:
        """Whether this updates the whole model, so that nothing may be missing."""
        return self._transaction is not None and self._transaction.is_whole

    def replacing_load_weights(self) -> AbstractContextManager[None]:
        """Within this, ``model.load_weights`` gets lazy tensors and returns with all in place.

        It is the one point that every release calls between making the iterator and post-processing
        what was loaded.
        """
        return shadowed(self._model, "load_weights", self._load_weights)

    def _load_weights(self, original: Any, weights: NamedWeights, *args: Any, **kwargs: Any) -> Any:
        was_meta = meta_names(self._model)
        with self.session:
            with self.session.armed():
                guarded = self.session.guard(weights)
                first = list(itertools.islice(guarded, 1))
                if first and not isinstance(first[0][1], LazyTensor):
                    self.session.delivery.open_gate()  # none of our iterators: it writes at once
                if not first and self._planner.plan == "replay":
                    # All of it was done again; the loader has nothing to see and nothing to do.
                    assert self._planner.recording is not None
                    result = self._planner.recording.returned
                else:
                    result = original(_with(first, guarded), *args, **kwargs)
            self.session.finish(self._model, was_meta)
        if not self._is_checked:
            self._planner.check_coverage(self._report.model_path)
        self._remember(result)
        return result

    def _before_write(self) -> None:
        """All is planned, or something must be written to go on: may it be?"""
        assert self._transaction is not None
        if self.session.is_exhausted and self._planner.is_settled(self.session.held_names()):
            self._planner.check_coverage(self._report.model_path)
            self._is_checked = True
        self._transaction.begin()

    def _remember(self, returned: Any) -> None:
        recording, why = self._planner.recorded(returned)
        if recording is None:
            self._history.recordings.pop(self._report.phase, None)
        else:
            # A launch is not done again.
            is_update = self._report.phase == "update"
            shared = self._exchange.plan if self._exchange and is_update else None
            if shared is not recording.shared:
                recording = replace(recording, shared=shared)
            self._history.recordings[self._report.phase] = recording
        self._history.expectation = self._planner.expected()
        self._report.plan = self._planner.plan
        self._report.plan_note = self._planner.note or why


def _with(first: list[tuple[str, torch.Tensor]], others: NamedWeights) -> NamedWeights:
    """What was taken already, which must not be held on to, and then the others."""
    if first:
        yield first.pop()
    yield from others
