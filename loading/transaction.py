"""An update that happens on every rank of a group or on none.

The ranks agree twice. When each knows what it will write and found its checkpoint whole, they agree
to begin; when each has written, they agree that it is done. A rank that fails says so in their next
vote, and all of them act on it alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weightlift.loading.errors import UpdateRefused

Vote = Callable[[str], list[str]]
"""Tells the group this rank's problem ('' for none); returns those of all ranks, in their order."""

_thread = threading.local()


class Transaction:
    """One update on one rank.

    Attributes:
        failure: What went wrong, on whichever rank; '' while nothing did.
        may_have_written: Whether the ranks agreed to begin.
        is_planned: Whether all was written by plan, and nothing went wrong on this rank.
        is_whole: Whether the checkpoint must bring all that the model was made from. A draft model
            is updated from its target's, which need not have the draft's tensors.
    """

    def __init__(self, vote: Vote, *, is_whole: bool = True) -> None:
        self.is_whole = is_whole
        self.failure = ""
        self.may_have_written = False
        self.is_planned = False
        self._vote = vote
        self._has_voted = False
        self._has_ended = False
        self._lock = threading.RLock()

    def begin(self, problem: str = "") -> None:
        """Agree to begin writing; the first call counts, those after it return what it did.

        Args:
            problem: Why this rank cannot; '' if it can.

        Raises:
            UpdateRefused: A rank cannot. Nothing was written on any.
        """
        with self._lock:
            if not self._has_voted:
                self._has_voted = True
                self.failure = self._ask(problem)
                self.may_have_written = not self.failure
            if not self.may_have_written:
                raise UpdateRefused(self.failure)

    def end(self, problem: str = "") -> None:
        """Tell how it went and learn how it went elsewhere; ``failure`` has it. The first call counts."""
        try:
            self.begin(problem)
        except UpdateRefused:
            return
        if not self._has_ended:
            self._has_ended = True
            self.failure = self._ask(problem or self.failure)

    def fail(self, problem: str) -> None:
        """Note a failure of this rank."""
        self.failure = self.failure or problem or "it failed without a word"

    def _ask(self, problem: str) -> str:
        """The problems of all ranks in one text; a group that cannot vote is a problem too."""
        try:
            problems = self._vote(problem)
        except Exception as error:  # noqa: BLE001 - whatever keeps ranks from voting is a failure of all
            mine = f"{problem}; then " if problem else ""
            return f"{mine}the ranks could not agree, one may be gone: {error!r}"
        told: dict[str, list[str]] = {}
        for rank, text in enumerate(problems):
            if text:
                told.setdefault(text, []).append(str(rank))
        if len(problems) == 1:
            return problem
        return "; ".join(f"rank {', '.join(ranks)}: {text}" for text, ranks in told.items())


def active_transaction() -> Transaction | None:
    """The update that runs in this thread, if any."""
    return getattr(_thread, "transaction", None)


@contextmanager
def within(transaction: Transaction | None) -> Iterator[None]:
    """Make this the transaction of loads in this thread, or have none."""
    before = active_transaction()
    _thread.transaction = transaction
    try:
        yield
    finally:
        _thread.transaction = before
