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
from collections.abc import Iterable
from pathlib import Path

import torch

from weightlift.loading.checkpoint import Checkpoint, Shard
from weightlift.loading.files import ShardFile
from weightlift.loading.group import Group
from weightlift.loading.pipeline import Pipeline
from weightlift.loading.placement import window_bytes
from weightlift.loading.plan import Window, gathered
from weightlift.loading.reader import ReaderPool
from weightlift.loading.report import LoadReport, human
from weightlift.loading.rounds import WORTH, Round, assign, cut
from weightlift.loading.settings import MIB
from weightlift.loading.transfer import Run, Transfer

logger = logging.getLogger("weightlift")

PART_BYTES = 16 * MIB
"""What a rank reads of a round: enough for NVLink, small enough to have many under way."""

SCRATCH_BYTES = 512 * MIB
MOST_SLOTS = 8


class Exchange:
    """The sharing of one load among the ranks of a group.

    Every rank of the group makes one for each load, and calls :meth:`share` or :meth:`decline`;
    after the first of these calls the others do nothing. A context manager: leaving it declines.

    Args:
        group: The ranks.
        device: What this rank loads to.
        report: Is told what was shared, or why nothing was.
        is_forced: Share whatever some rank reads, also where it costs more than it saves.
    """

    def __init__(
        self, group: Group, device: torch.device, report: LoadReport, *, is_forced: bool = False
    ) -> None:
        self.is_settled = False
        self.is_forced = is_forced
        self.device = device
        self._group = group
        self._report = report
        self._shards: list[Shard] = []
        self._part = PART_BYTES

    def add(self, checkpoint: Checkpoint) -> None:
        """This checkpoint takes part in the load."""
        self._shards += checkpoint.shards

    def decline(self, reason: str) -> None:
        """Take no part in this load; the other ranks hear of it and read for themselves."""
        if self.is_settled:
            return
        self.is_settled = True
        self._report.exchange_note = reason
        try:
            self._group.gather(f"no: {reason}")
        except RuntimeError as error:  # a rank is gone; this one is about to fail of its own
            logger.warning("weightlift: the other ranks could not be told: %s", error)

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self.decline("its load came to an end before")

    def share(self, pool: ReaderPool, windows: list[Window]) -> list[Window]:
        """Do this work together with the other ranks, as far as that reads less.

        Args:
            pool: This rank's readers, with nothing under way.
            windows: All of this rank's work on the device.

        Returns:
            What each has to read for itself.

        Raises:
            CheckpointError: A rank could not read its part.
            PlanAborted: A rank had to stop for some other reason.
        """
        if self.is_settled:
            return windows
        self.is_settled = True
        with torch._C.DisableTorchFunction():  # no guard: this is no work of the loader's
            return self._share(pool, windows)

    def _share(self, pool: ReaderPool, windows: list[Window]) -> list[Window]:
        ring = self._ring()
        self._report.exchange_note = self._disagreement(ring)
        if self._report.exchange_note:
            return windows
        rounds = cut(self._shards, self._group.size * self._part)
        outside = self._assigned(rounds, windows)
        alone = torch.tensor([shared.read_alone for shared in rounds], dtype=torch.int64)
        total = self._group.add_up(alone).tolist()
        chosen = []
        for shared, nbytes in zip(rounds, total, strict=True):
            if nbytes and (self.is_forced or shared.span <= WORTH * nbytes):
                chosen.append(shared)
            else:
                outside.setdefault(shared.file.path, (shared.file, []))[1].extend(shared.pieces)
        if chosen:
            assert ring is not None
            self._explain(chosen, int(sum(total)))
            Pipeline(self._group, pool, ring, self._part).run(chosen)
        else:
            self._report.exchange_note = "each rank reads other bytes"
        most = window_bytes(self.device)
        return [window for file, work in outside.values() for window in gathered(file, work, most)]

    def _assigned(
        self, rounds: list[Round], windows: list[Window]
    ) -> dict[str, tuple[ShardFile, list[Run | Transfer]]]:
        """Give the rounds their pieces; what lies in none, by file."""
        outside = {}
        by_file: dict[str, list[Window]] = {}
        for window in windows:
            by_file.setdefault(window.file.path, []).append(window)
        for path, mine in by_file.items():
            file = mine[0].file
            pieces = [piece for window in mine for piece in window.pieces]
            outside[path] = (file, assign(rounds, file, pieces))
        return outside

    def _ring(self) -> torch.Tensor | None:
        """Scratch on the device for some rounds; None if there is no room."""
        whole = self._group.size * self._part
        slots = max(2, min(MOST_SLOTS, SCRATCH_BYTES // whole))
        try:
            return torch.empty(slots, whole, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            return None

    def _disagreement(self, ring: torch.Tensor | None) -> str:
        """Ask the other ranks; why nothing can be shared, or ''."""
        offer = "no: its device has no room" if ring is None else f"yes: {_digest(self._shards)}"
        offers = self._group.gather(offer)
        refused = {
            rank: text.removeprefix("no: ")
            for rank, text in enumerate(offers)
            if not text.startswith("yes: ")
        }
        if refused:
            return "; ".join(f"rank {rank}: {why}" for rank, why in refused.items())
        return "" if len(set(offers)) == 1 else "the ranks do not see the same files"

    def _explain(self, chosen: list[Round], alone: int) -> None:
        rank, size = self._group.rank, self._group.size
        parts = [shared.part(rank, size) for shared in chosen]
        span = sum(shared.span for shared in chosen)
        self._report.exchanged = span - sum(stop - start for start, stop in parts)
        self._report.exchange_note = (
            f"{human(span)} read once by {size} ranks; alone they would read {human(alone)}"
        )


def _digest(shards: Iterable[Shard]) -> str:
    """What tells files of this host apart from others, as they are now."""
    with contextlib.suppress(OSError):
        host = Path("/proc/sys/kernel/random/boot_id").read_text()
        facts = [host, socket.gethostname(), [shard.file.identity for shard in shards]]
        return hashlib.sha256(repr(facts).encode()).hexdigest()
    return "unknown"
