"""What a load did: one log line, and one JSON line for whoever keeps them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from weightlift.loading import timeline
from weightlift.loading.files import ShardFile
from weightlift.loading.settings import Settings

logger = logging.getLogger("weightlift")

WEIGHTLIFT = "weightlift"
STOCK = "stock"


@dataclass
class LoadReport:
    """One load of one rank.

    Attributes:
        engine: Name of the engine, such as ``sglang``.
        version: Its version.
        phase: ``launch`` or ``update``.
        model_path: Where the checkpoint is.
        rank: Rank of this process among those that load the model.
        architecture: Class of the model.
        mode: ``weightlift``, or ``stock`` if the engine's own loader did it.
        fallback_reason: Why it was ``stock``.
        plan: How the plan was come by: ``full``, ``fast`` or ``replay``.
        plan_note: Why it was not a cheaper one, or why it cannot be replayed.
        tensors: Tensors that the engine was offered.
        planned: Copies that the engine's code asked for and the readers made.
        landed: Those of them that had been made before they were asked for.
        extrapolated: Copies that fast load derived from those of other layers and experts.
        replayed: Copies that were made again as in the load before, without planning.
        materialised: Tensors read at once, for small copies and for operations that need data.
        threads: Reader threads that took part; 0 where a load was too small for any.
        bytes_needed: Bytes that this rank's parameters are made from.
        bytes_read: Bytes that came from the files, headers included.
        exchanged: Bytes that other ranks read and passed on.
        exchange_note: What the ranks share of the reading, or why they do not.
        bytes_direct: Those of them that were read past the page cache.
        bytes_staged: Bytes that were in page-locked memory already: staged before, or of files that are.
        plan_seconds: From open shards until the last copy was known; reading goes on meanwhile,
            except in an update, which writes nothing before that.
        seconds: From the start of the load to its last byte in place.
    """

    engine: str = ""
    version: str = ""
    phase: str = ""
    model_path: str = ""
    rank: int = 0
    architecture: str = ""
    mode: str = WEIGHTLIFT
    fallback_reason: str = ""
    plan: str = ""
    plan_note: str = ""
    tensors: int = 0
    planned: int = 0
    landed: int = 0
    extrapolated: int = 0
    replayed: int = 0
    materialised: int = 0
    threads: int = 0
    bytes_needed: int = 0
    bytes_read: int = 0
    exchanged: int = 0
    exchange_note: str = ""
    bytes_direct: int = 0
    bytes_staged: int = 0
    plan_seconds: float = 0.0
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter, repr=False)
    shards: list[tuple[str, float, float, int]] = field(default_factory=list, repr=False)
    """Of the timeline: name, first and last read by ``perf_counter``, bytes."""

    def fall_back(self, reason: str) -> None:
        """Note that the engine's own loader takes over, and why."""
        self.mode, self.fallback_reason = STOCK, reason
        self.plan = self.plan_note = self.exchange_note = ""
        self.tensors = self.planned = self.landed = self.extrapolated = self.replayed = 0
        self.materialised = self.threads = self.bytes_needed = self.bytes_read = 0
        self.bytes_direct = self.bytes_staged = self.exchanged = 0
        self.plan_seconds = self.seconds = 0.0
        self.shards = []

    def count(self, files: Sequence[ShardFile]) -> None:
        """Note how files were read that are read no more."""
        self.bytes_read = sum(file.bytes_read for file in files)
        self.bytes_direct = sum(file.bytes_direct for file in files)
        self.bytes_staged = sum(file.bytes_staged for file in files)
        self.shards = [file.times for file in files if file.first_read_at]

    def finish(self, settings: Settings) -> None:
        """Log the load, and write the report and the timeline that the settings ask for.

        One that cannot be written is worth a warning, never a failed load.
        """
        self.seconds = self.seconds or time.perf_counter() - self.started
        logger.info("weightlift: %s", self)
        if settings.report:
            self._append(settings.report)
        if settings.load_timeline:
            timeline.record(self, settings.load_timeline)

    def _append(self, path: str) -> None:
        """Add a line of JSON to a file."""
        facts = dataclasses.asdict(self)
        del facts["started"], facts["shards"]
        line = (json.dumps(facts) + "\n").encode()
        try:
            # One write in append mode: lines of several ranks never mix.
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            logger.warning("weightlift: cannot write the report to %s: %s", path, error)

    def __str__(self) -> str:
        subject = f"{self.phase or 'load'} of {self.architecture or 'weights'} rank {self.rank}"
        if self.mode == STOCK:
            return f"{subject} by the engine's own loader: {self.fallback_reason}"
        rate = self.bytes_needed / max(self.seconds, 1e-9)
        counts = {
            "copies planned": self.planned,
            "begun before": self.landed,
            "derived": self.extrapolated,
            "replayed": self.replayed,
            "read at once": self.materialised,
        }
        told = [f"{count} {what}" for what, count in counts.items() if count]
        told.append(f"{human(self.bytes_read)} read")
        if self.bytes_direct:
            told.append(f"{human(self.bytes_direct)} of it past the page cache")
        if self.bytes_staged:
            told.append(f"{human(self.bytes_staged)} in page-locked memory before")
        if self.exchanged:
            told.append(self.exchange_note)
        if self.plan_note:
            told.append(self.plan_note)
        return (
            f"{subject}: {human(self.bytes_needed)} in {self.seconds:.3f} s ({human(rate)}/s; "
            f"{self.tensors} tensors, {', '.join(told)})"
        )


def human(nbytes: float) -> str:
    """A number of bytes with the decimal unit that suits it."""
    for unit in ("B", "kB", "MB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"
