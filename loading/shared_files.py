"""Files in shared memory that stay page-locked from one load to the next.

A trainer that writes each checkpoint over the last one, into the same files of ``/dev/shm``, has them
copied by the device alone: nobody reads them. A file that was cut off or replaced in between is read as any
other, and its new pages are locked after that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence

import torch

from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.files import Identity, ShardFile
from weightlift.loading.report import human
from weightlift.loading.residency import is_in_memory
from weightlift.loading.settings import Settings
from weightlift.loading.shared_file import SharedFile
from weightlift.loading.threads import start_thread

logger = logging.getLogger("weightlift")


class SharedFiles:
    """Those of this process.

    Attributes:
        most_bytes: What may be page-locked.
    """

    def __init__(self) -> None:
        self.most_bytes = 0
        self._files: dict[tuple[int, ...], SharedFile] = {}
        self._refused: set[tuple[int, ...]] = set()
        self._told: set[str] = set()
        self._change = threading.Condition(threading.RLock())
        self._adding = threading.Lock()
        self._lent = self._releases = 0
        self._is_released = False

    @contextlib.contextmanager
    def lent_to(self, checkpoint: Checkpoint, *, keeps: bool) -> Iterator[None]:
        """Within this, what is page-locked of a checkpoint is copied from there.

        Args:
            checkpoint: Its open shards.
            keeps: Whether the rest of it is page-locked afterwards, for the next load.
        """
        files = [shard.file for shard in checkpoint.shards]
        with self._change:
            self._drop_old()
            self._lent += 1
        try:
            for file in files:
                found = self._files.get(file.identity[:2])
                file.locked = found if found is not None and found.is_current() else None
            yield
        finally:
            with self._change:
                self._lent -= 1
                self._change.notify_all()
                if self._is_released and not self._lent:
                    self._close_all()
            if keeps:
                self._keep([file for file in files if file.locked is None])

    def release(self) -> int:
        """Free all, but for what a load copies from, which is freed after it; returns the bytes freed now."""
        with self._change:
            self._releases += 1
            self._is_released = True
            return self._close_all() if not self._lent else 0

    def forget(self) -> None:
        """In a forked child: they are the parent's."""
        for file in self._files.values():
            file.forget()

    def _close_all(self) -> int:
        freed = sum(file.close() for file in self._files.values())
        self._files.clear()
        self._refused.clear()
        self._told.clear()
        self._is_released = False
        return freed

    def _drop_old(self) -> None:
        """Free those that were cut off or deleted, unless a load copies from some."""
        for file in list(self._files.values()) if not self._lent else ():
            if file.is_deleted or not file.is_current():
                del self._files[file.key]
                file.close()

    def _keep(self, files: Sequence[ShardFile]) -> None:
        """Begin to page-lock those of these files that are in memory, beside what comes next."""
        wanted = [
            (file.path, file.identity)
            for file in files
            if file.size and is_in_memory(file.identity[0])
        ]
        if not (wanted and torch.cuda.is_initialized()):
            return
        device, releases = torch.cuda.current_device(), self._releases

        def work() -> None:
            torch.cuda.set_device(device)
            with self._adding:
                for path, identity in wanted:
                    if self._wait(releases):
                        self._add(path, identity, releases)

        try:
            start_thread(work, "lock")
        except OSError as error:
            logger.warning("weightlift: nothing is kept page-locked: %s", error)

    def _add(self, path: str, identity: Identity, releases: int) -> None:
        """Page-lock a file and keep it, if nobody released all meanwhile."""
        with self._change:
            if identity[:2] in self._files or identity[:3] in self._refused:
                return
            room = self.most_bytes - sum(kept.size for kept in self._files.values())
        if identity[2] > room:
            self._tell(
                path, f"{human(room)} of shared_gib are left, and it has {human(identity[2])}"
            )
            return
        try:
            file = SharedFile(path, identity)
            try:
                if file.lock(lambda: self._wait(releases)) and self._publish(file, releases):
                    return
            except BaseException:
                file.close()
                raise
            file.close()
        except OSError as error:
            self._refused.add(identity[:3])
            self._tell(path, str(error))

    def _publish(self, file: SharedFile, releases: int) -> bool:
        """Have the next load copy from a file; False if all was released meanwhile."""
        with self._change:
            if releases != self._releases:
                return False
            self._files[file.key] = file
        logger.info("weightlift: %s of %s stay page-locked", human(file.size), file.path)
        return True

    def _tell(self, path: str, why: str) -> None:
        if path not in self._told:
            self._told.add(path)
            logger.warning("weightlift: %s is not kept page-locked: %s", path, why)

    def _wait(self, releases: int) -> bool:
        """Until no load is under way; whether nobody released all since."""
        with self._change:
            self._change.wait_for(lambda: not self._lent)
            return releases == self._releases


_files = SharedFiles()


def shared_files() -> SharedFiles:
    """Those of this process."""
    return _files


def locked_for(
    checkpoint: Checkpoint, settings: Settings, phase: str
) -> contextlib.AbstractContextManager[None]:
    """:meth:`SharedFiles.lent_to`, where the settings ask for it.

    Nothing is locked after a launch: engines capture CUDA graphs then, which other CUDA calls break.
    """
    if not settings.shared_gib:
        return contextlib.nullcontext()
    _files.most_bytes = settings.shared_gib << 30
    return _files.lent_to(checkpoint, keeps=phase != "launch")


def _forget() -> None:
    """A forked child has neither the parent's locks nor its CUDA context."""
    global _files
    _files.forget()
    _files = SharedFiles()


os.register_at_fork(after_in_child=_forget)
