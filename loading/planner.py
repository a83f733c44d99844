"""How a load comes by its plan: as the last time, from samples, or from every tensor."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.derive import derive
from weightlift.loading.expectation import Expectation, coverage
from weightlift.loading.families import HELD_SECONDS, Families, kinds, samples
from weightlift.loading.header import TensorEntry
from weightlift.loading.parameters import Geometry, Parameters
from weightlift.loading.recording import Ledger, Recipe, Recording
from weightlift.loading.replay import deliver
from weightlift.loading.session import LoadSession, NamedWeights

SECONDS_A_TENSOR = 200e-6
"""To plan one with readers beside it: 18,867 tensors took 3.6 s on a host with an H200."""

READ_RATE = 20e9
"""Bytes a second that ranks of a host read for themselves, at the least, from the page cache."""


@dataclass
class Planner:
    """Gives the engine's loader what it must see, and the readers what is known without it.

    Attributes:
        parameters: Those of the model.
        configuration: What the engine's loader depends on besides parameters and checkpoint.
        recording: A load before this one, to be done again if it holds.
        families: What repeats in the model, if that is declared.
        is_fast: Whether fast load is wanted, where families are declared.
        expectation: What a checkpoint must bring.
        ledger: What the engine did with each tensor that it saw.
        plan: ``replay``, ``fast`` or ``full``, once it is known.
        note: Why it was not the cheaper one.
    """

    parameters: Parameters
    configuration: str = ""
    recording: Recording | None = None
    families: Families | None = None
    is_fast: bool = False
    expectation: Expectation | None = None
    ledger: Ledger = field(init=False)
    plan: str = "full"
    note: str = ""
    _geometry: Geometry = field(init=False)
    _recipes: dict[str, Recipe] = field(default_factory=dict)
    _sources: int = 0
    _headers: tuple[Mapping[str, TensorEntry], ...] = ()

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.parameters, self.families.seen if self.families else ())
        self._geometry = self.parameters.geometry()

    def weights(self, session: LoadSession, checkpoint: Checkpoint) -> NamedWeights:
        """What the engine must see of a checkpoint, lazily; the rest is on its way."""
        self._sources += 1
        self._headers = tuple(shard.tensors for shard in checkpoint.shards)
        if self.recording is not None and self._sources == 1:
            misfit = self.recording.misfit(checkpoint, self._geometry, self.configuration)
            if not misfit:
                self.plan = "replay"
                yield from self._replayed(session, checkpoint, self.recording)
                return
            self.note = misfit
        if self.expectation is not None:
            self.expectation.check(checkpoint)
        if self.families is not None and self.is_fast:
            yield from self._fast(session, checkpoint, self.families)
        else:
            if self.is_fast:
                self.note = "fast load does not know this model, or its experts were moved"
            if _planning_outlasts_reading(checkpoint):
                session.delivery.read_while_planning()
            yield from session.lazies(checkpoint)

    def recorded(self, returned: Any) -> tuple[Recording | None, str]:
        """This load to be done again; or None, and why it cannot be.

        Where families are declared, what the loader does besides copying is known to depend on
        the tensors that it must see alone. Elsewhere it must have done nothing of the kind.

        Args:
            returned: What the engine's loader returned.
        """
        if self.plan == "replay":
            return self.recording, ""
        if self._sources != 1:
            return None, f"its weights come from {self._sources} sources"
        recipes = self.recipes()
        for_engine = {
            name: self.ledger.stored(name) for name in self.ledger.names() if name not in recipes
        }
        if self.ledger.after_all and not (self.families and self.families.seen):
            return None, f"the loader went on with parameters: {self.ledger.after_all}"
        if self.families is None:
            if self.ledger.strangers:
                return None, "the loader has threads of its own"
            if for_engine:
                name = next(iter(for_engine))
                return None, f"{name}: {self.ledger.blamed[name]}"
        depends_on = self._geometry, self.configuration, self._headers
        return Recording(recipes, for_engine, *depends_on, returned), ""

    def recipes(self) -> dict[str, Recipe]:
        """What became of the tensors that only were copied, by name."""
        if self.plan == "replay" and self.recording is not None:
            return dict(self.recording.recipes)
        self.ledger.blame_overlaps()
        names = self.ledger.names()
        seen = {name: found for name in names if (found := self.ledger.recipe(name))}
        return seen | self._recipes

    def expected(self) -> Expectation | None:
        """What a later checkpoint must bring, now that this one is loaded; None if unknown.

        An update brings the first source alone.
        """
        if self._sources != 1:
            return None
        if self.plan == "replay" and self.expectation is not None:
            return self.expectation
        recipes = self.recipes()
        shapes = {name: recipe.shape for name, recipe in recipes.items() if recipe.moves}
        shapes |= {name: self.ledger.stored(name)[0] for name in self.ledger.blamed}
        return Expectation(shapes, coverage(recipes.values()))

    def is_settled(self, held: set[str]) -> bool:
        """Whether nothing more can come of the tensors that somebody still holds."""
        return all(self.ledger.is_settled(name) for name in held)

    def check_coverage(self, path: str) -> None:
        """See that the plan fills what the load before filled.

        Raises:
            CheckpointError: It does not.
        """
        if self.expectation is not None and self.plan != "replay":
            self.expectation.check_coverage(coverage(self.recipes().values()), path)

    def _replayed(
        self, session: LoadSession, checkpoint: Checkpoint, recording: Recording
    ) -> NamedWeights:
        def again() -> object:
            return deliver(session, checkpoint, recording.recipes, self.parameters)

        # A plan of the ranks is followed if it was all of the load: nothing that the engine has a
        # part in, on another device, read at once, or in need of an order.
        shared = recording.shared
        if recording.for_engine or (shared is not None and shared.nbytes != recording.nbytes):
            shared = None
        session.delivery.defer(again, shared, self.parameters.storages())
        session.report.replayed = recording.moves
        session.report.bytes_needed += recording.nbytes
        session.report.tensors += len(recording.recipes)
        yield from session.lazies(checkpoint, recording.for_engine.keys())

    def _fast(
        self, session: LoadSession, checkpoint: Checkpoint, families: Families
    ) -> NamedWeights:
        names = [entry.name for entry in checkpoint.entries()]
        if len(set(names)) < len(names):  # the last one counts, and what is derived has no order
            self.note = "several of its files have a tensor of the same name"
            yield from session.lazies(checkpoint)
            return
        found = kinds(checkpoint.entries(), self.parameters, families)
        derivable = {
            entry.name
            for kind in found
            for layer in kind.layers.values()
            for entry in layer.values()
        }
        sampled = {name for kind in found for name in samples(kind, families)}
        first = [*sampled, *(e.name for e in checkpoint.entries() if e.name not in derivable)]
        if not sampled or len(first) == len(sampled):
            self.note = "nothing repeats in it" if not sampled else "all of it repeats"
            yield from session.lazies(checkpoint)
            return
        # Whoever iterates still holds the last tensor that it got: that must be no sample.
        last = first.pop()
        yield from session.lazies(checkpoint, frozenset(first))
        yield from session.lazies(checkpoint, frozenset((last,)))
        if self._are_done_with(session, sampled):
            self.ledger.blame_overlaps()
            for kind in found:
                self._recipes |= derive(kind, self.ledger.recipe, self.parameters, families)
        rest = derivable - sampled - self._recipes.keys()
        if self._recipes:
            self.plan = "fast"
            session.report.tensors += len(self._recipes)
            count, nbytes = deliver(session, checkpoint, self._recipes, self.parameters)
            session.report.extrapolated += count
            session.report.bytes_needed += nbytes
        if rest:
            self.note = f"{len(rest)} tensors do not follow from samples, such as {min(rest)}"
            yield from session.lazies(checkpoint, rest)

    def _are_done_with(self, session: LoadSession, names: set[str]) -> bool:
        """Whether the loader's own threads, too, have let go of these tensors, in time."""
        until = time.monotonic() + HELD_SECONDS
        while session.held_names() & (names - self.ledger.blamed.keys()):
            if time.monotonic() > until:
                self.note = "the loader keeps the tensors that it gets"
                return False
            time.sleep(0.001)
        return True


def _planning_outlasts_reading(checkpoint: Checkpoint) -> bool:
    tensors = sum(len(shard.tensors) for shard in checkpoint.shards)
    return tensors * SECONDS_A_TENSOR > checkpoint.nbytes / READ_RATE
