"""Each byte once a host: the ranks read a part of every round and pass it on over NVLink.

The ranks agree before the first byte is read: all of them can, and they see the same files. One
that cannot says why, and then each reads for itself. From there on every rank goes through the same
rounds in the same order, also one whose reads fail: the others would wait for it. It says so at the
end, and the load fails on all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
from collections.abc import Callable
from pathlib import Path

import torch

from weightlift.loading import shared_plan
from weightlift.loading.checkpoint import Checkpoint, Shard
from weightlift.loading.files import ShardFile
from weightlift.loading.group import Group
from weightlift.loading.pipeline import Pipeline
from weightlift.loading.placement import window_bytes
from weightlift.loading.plan import Window, gathered
from weightlift.loading.reader import ReaderPool
from weightlift.loading.report import LoadReport, human
from weightlift.loading.rounds import ALIGNMENT
from weightlift.loading.shared_plan import SharedPlan, plan_together
from weightlift.loading.steps import Storages

_NO_ROOM = "its device has no room"
_NO_HOST = "it cannot tell this host from others"

logger = logging.getLogger("weightlift")

SLOTS = 3
"""Rounds under way at once: one is read, one is gathered and placed, and one is ahead."""


class Exchange:
    """The sharing of one load among the ranks of a group.

    Every rank of the group makes one for each load, and calls :meth:`share` or :meth:`decline`;
    after the first of these calls the others do nothing. A context manager: leaving it declines.

    Args:
        group: The ranks.
        device: What this rank loads to.
        report: Is told what was shared, or why nothing was.
        is_forced: Share also where it saves nothing.

    Attributes:
        plan: What was shared, if a load like this one can follow it; before :meth:`share`, what may
            be followed.
        storages: Where the steps of such a plan go; see :class:`Step`.
    """

    def __init__(
        self, group: Group, device: torch.device, report: LoadReport, *, is_forced: bool = False
    ) -> None:
        self.is_settled = False
        self.is_forced = is_forced
        self.device = device
        self.plan: SharedPlan | None = None
        self.storages: Storages = {}
        self._refusal = ""
        self._group = group
        self._report = report
        self._shards: list[Shard] = []

    def add(self, checkpoint: Checkpoint) -> None:
        """This checkpoint takes part in the load."""
        self._shards += checkpoint.shards

    def refuse(self, reason: str) -> None:
        """Take no part, and say so when the ranks ask each other: in :meth:`share`."""
        self._refusal = self._refusal or reason

    def decline(self, reason: str) -> None:
        """Take no part in this load; the other ranks hear of it and read for themselves."""
        if self.is_settled:
            return
        self.is_settled = True
        self.plan = None
        self._report.exchange_note = reason
        try:
            self._group.gather(f"no: {reason}")
        except RuntimeError as error:  # a rank is gone; this one is about to fail of its own
            logger.warning("weightlift: the other ranks could not be told: %s", error)

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self.decline("its load came to an end before")

    def share(self, pool: ReaderPool, work: Callable[[], list[Window]]) -> list[Window]:
        """Do this rank's work together with the other ranks, as far as that reads less.

        Args:
            pool: This rank's readers, with nothing under way.
            work: Gives all of it. It is not asked for where ``plan`` can be followed again.

        Returns:
            What each has to read for itself.

        Raises:
            CheckpointError: A rank could not read its part.
            PlanAborted: A rank had to stop for some other reason.
        """
        if self.is_settled:
            return work()
        self.is_settled = True
        with torch._C.DisableTorchFunction():  # no guard: this is no work of the loader's
            return self._share(pool, work)

    def _share(self, pool: ReaderPool, work: Callable[[], list[Window]]) -> list[Window]:
        before, self.plan = self.plan, None
        if before is not None and not before.fits([shard.tensors for shard in self._shards]):
            before = None
        ring = self._ring()
        offers = self._group.gather(self._offer(before, ring))
        self._report.exchange_note = _refusal(offers)
        if ring is None or self._report.exchange_note:
            return work()
        if before and len(set(offers)) == 1:
            plan = before
        else:
            plan = plan_together(
                self._group, self._shards, work(), self.storages, is_forced=self.is_forced
            )
        if plan.rounds:
            self._explain(plan)
            files = [shard.file for shard in self._shards]
            Pipeline(self._group, pool, ring, files).run(plan.rounds, plan.steps, self.storages)
        else:
            self._report.exchange_note = "each rank reads other bytes"
        self.plan = plan
        return self._rest(plan)

    def _rest(self, plan: SharedPlan) -> list[Window]:
        """The work that is not shared."""
        found: list[Window] = []
        for number, work in plan.alone.items():
            file = self._shards[number].file
            pieces = [step.piece(file, self.storages) for step in work]
            found += gathered(file, pieces, window_bytes(self.device))
        return found

    def _offer(self, before: SharedPlan | None, ring: torch.Tensor | None) -> str:
        files = _digest([shard.file for shard in self._shards])
        if self._refusal or ring is None or not files:
            return f"no: {self._refusal or (_NO_ROOM if ring is None else _NO_HOST)}"
        return f"yes: {files} {before.digest if before else 'anew'}"

    def _ring(self) -> torch.Tensor | None:
        """Scratch on the device for some rounds; None if there is no room."""
        size = self._group.size
        row = size * -(-shared_plan.ROUND_BYTES // (size * ALIGNMENT)) * ALIGNMENT
        try:
            return torch.empty(SLOTS, row, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            return None

    def _explain(self, plan: SharedPlan) -> None:
        rank, size = self._group.rank, self._group.size
        parts = [shared.part(rank, size) for shared in plan.rounds]
        span = sum(shared.span for shared in plan.rounds)
        self._report.exchanged = span - sum(stop - start for start, stop in parts)
        self._report.exchange_note = (
            f"{human(span)} read once by {size} ranks; alone they would read "
            f"{human(plan.read_alone)}"
        )


def _refusal(offers: list[str]) -> str:
    """Why these offers of the ranks do not come together, or ''."""
    refused = {
        rank: text.removeprefix("no: ")
        for rank, text in enumerate(offers)
        if not text.startswith("yes: ")
    }
    if refused:
        return "; ".join(f"rank {rank}: {why}" for rank, why in refused.items())
    files = {text.split()[1] for text in offers}
    return "" if len(files) == 1 else "the ranks do not see the same files"


def _digest(files: list[ShardFile]) -> str:
    """What tells files of this host apart from others, as they are now; '' if nothing does."""
    with contextlib.suppress(OSError):
        host = Path("/proc/sys/kernel/random/boot_id").read_text()
        facts = [host, socket.gethostname(), [file.identity for file in files]]
        return hashlib.sha256(repr(facts).encode()).hexdigest()
    return ""
