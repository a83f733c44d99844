"""The thread that stages the next checkpoint: when asked to, or when one appears."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from weightlift.loading.budget import reader_count
from weightlift.loading.checkpoint import INDEX_NAMES, Checkpoint
from weightlift.loading.control import Control, Staged
from weightlift.loading.errors import WeightliftError
from weightlift.loading.recording import Recording
from weightlift.loading.report import LoadReport, human
from weightlift.loading.settings import MIB, Settings
from weightlift.loading.stage import Stage, make_stage
from weightlift.loading.threads import start_thread
from weightlift.loading.wanted import wanted_ranges

logger = logging.getLogger("weightlift")

LOOK_SECONDS = 0.1
WATCH_EVERY = 10
"""Looks at the control folder between two at the watched directory."""


class Stager:
    """Stages for one rank, in the background.

    Args:
        rank: The rank, for reports.
        stage: Where to.
        settings: Threads, the directory to watch, the report's file.
        recordings: The loads of this rank's models so far; what they read is what is staged.
    """

    def __init__(
        self,
        rank: int,
        stage: Stage,
        settings: Settings,
        recordings: Callable[[], Iterable[Recording]],
    ) -> None:
        self._rank = rank
        self._stage = stage
        self._settings = settings
        self._recordings = recordings
        self._control = Control.inherited()
        self._request = 0
        self._seen: dict[str, float] = {}

    def start(self) -> None:
        """Begin to look for something to stage; what is there already does not count."""
        watched = self._settings.stage_watch
        if watched:
            self._seen = {path: changed for path, changed in _checkpoints(watched)}
        if self._control is not None:
            self._control.answer(Staged(self._rank))
        start_thread(self._work, "stager")

    def stage(self, path: str) -> Staged:
        """Read this rank's bytes of a checkpoint into memory."""
        started = time.perf_counter()
        report = LoadReport(phase="stage", model_path=path, rank=self._rank)
        nbytes, error = 0, ""
        try:
            recordings = list(self._recordings())
            if not recordings:
                raise WeightliftError(_NOTHING_KNOWN)
            with Checkpoint.from_path(path) as checkpoint:
                wanted = wanted_ranges(recordings, checkpoint)
                total = sum(stop - start for ranges in wanted.values() for start, stop in ranges)
                threads = report.threads = self._settings.num_load_threads or reader_count()
                nbytes = self._stage.fill(checkpoint, wanted, threads)
                report.bytes_needed, report.bytes_read = total, checkpoint.bytes_read
            if nbytes < total:
                logger.warning(
                    "weightlift: staged %s of %s of %s: an update came, or stage_gib is too small",
                    *(human(nbytes), human(total), path),
                )
        except Exception as reason:  # noqa: BLE001 - the thread stays for the next request; who asked is told
            error = str(reason) or repr(reason)
            logger.warning("weightlift: cannot stage %s: %s", path, error)
        report.bytes_staged = nbytes
        report.seconds = time.perf_counter() - started
        if not error:
            report.finish(self._settings)
        return Staged(self._rank, self._request, path, nbytes, report.seconds, error)

    def _work(self) -> None:
        for looks in itertools.count(1):
            time.sleep(LOOK_SECONDS)
            try:
                self._look(is_watching=looks % WATCH_EVERY == 0)
            except Exception as error:  # noqa: BLE001 - a full disk, a server that is gone: it is asked again
                logger.warning("weightlift: staging cannot answer: %s", error)

    def _look(self, *, is_watching: bool) -> None:
        request = self._control.request() if self._control is not None else None
        path = ""
        if request and request[0] > self._request:
            self._request, path = request
        elif self._settings.stage_watch and is_watching:
            path = self._appeared(self._settings.stage_watch)
        if path:
            self._answer(self.stage(path))

    def _answer(self, staged: Staged) -> None:
        if self._control is not None and self._control.folder.is_dir():
            self._control.answer(staged)

    def _appeared(self, watched: str) -> str:
        """The newest checkpoint that appeared and is whole, or ''."""
        for path, changed in _checkpoints(watched):
            if self._seen.get(path) == changed:
                continue
            try:
                Checkpoint.from_path(path).close()
            except WeightliftError:
                continue  # still being written: it is looked at again
            self._seen[path] = changed
            return path
        return ""


_NOTHING_KNOWN = (
    "which bytes this rank needs is not known: no load of its model was planned so far. Update once "
    "without staging, and see the log for why a load was left to the engine"
)


def _checkpoints(watched: str) -> list[tuple[str, float]]:
    """The folders of a directory that hold safetensors files, and when they changed; newest first."""
    found: list[tuple[str, float]] = []
    try:
        folders = [folder for folder in os.scandir(watched) if folder.is_dir()]
    except OSError:  # it may not be there yet
        return []
    for folder in folders:
        names = ("*.safetensors", *INDEX_NAMES)
        files = [file for name in names for file in Path(folder.path).glob(name)]
        try:
            changed = max((file.stat().st_mtime for file in files), default=0.0)
        except OSError:  # removed as we look
            continue
        if changed:
            found.append((folder.path, changed))
    return sorted(found, key=lambda item: -item[1])


_stager: Stager | None = None


def start_stager(
    rank: int, settings: Settings, recordings: Callable[[], Iterable[Recording]], *, pinned: bool
) -> None:
    """Have this process stage what it is asked to; once is enough, twice does no harm."""
    global _stager
    if _stager is None and settings.stage_gib:
        stage = make_stage(settings.stage_gib * 1024 * MIB, pinned=pinned)
        _stager = Stager(rank, stage, settings, recordings)
        _stager.start()
