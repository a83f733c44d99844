"""Progress of a long load: a bar on a terminal, a log line every ten seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

logger = logging.getLogger("weightlift")

BAR_AFTER_SECONDS = 1.0
LINE_EVERY_SECONDS = 10.0


class Progress:
    """Tells how far a load is. A short one says nothing; the report's line is enough for it.

    Args:
        total: Bytes of the checkpoint.
        done: Says how many are read.
        visible: Whether this rank is the one that speaks.
    """

    def __init__(self, total: int, done: Callable[[], int], *, visible: bool) -> None:
        self._total = total
        self._done = done
        self._visible = visible
        self._bar: Bar | None = None
        self._next = time.monotonic() + BAR_AFTER_SECONDS

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self) -> None:
        """Show where the load is, if it is time to."""
        if not self._visible or time.monotonic() < self._next:
            return
        if not sys.stderr.isatty():
            self._next = time.monotonic() + LINE_EVERY_SECONDS
            done, total = self._done() / 1e9, self._total / 1e9
            logger.info("weightlift: %.1f of %.1f GB read", done, total)
            return
        self._bar = self._bar or _bar(self._total)
        self._bar.update(self._bar.task_ids[0], completed=self._done())


def _bar(total: int) -> Bar:
    # Imported here: a load in a server process needs it only if somebody watches.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("Loading weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("load", total=total)
    bar.start()
    return bar
