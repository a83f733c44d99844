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
from weightlift.loading.shared_file import SharedFile

logger = logging.getLogger("weightlift")


class SharedFiles:
    """Those of this process.

    Args:
        most_bytes: What may be page-locked.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._files: dict[tuple[int, ...], SharedFile] = {}
        self._refused: set[Identity] = set()
        self._change = threading.Condition(threading.RLock())
        self._adding = threading.Lock()
        self._lent = self._releases = 0

    @contextlib.contextmanager
    def lent_to(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Within this, what is page-locked of a checkpoint is copied from there.

        The rest of it is page-locked afterwards, for the next load.
        """
        files = [shard.file for shard in checkpoint.shards]
        with self._change:
            self._lent += 1
            for file in files:
                found = self._files.get(file.identity[:2])
                if found is not None and found.is_current():
                    file.locked = found
        try:
            yield
        finally:
            with self._change:
                self._lent -= 1
                self._change.notify_all()
            self._keep([file for file in files if file.locked is None])

    def release(self) -> int:
        """Free all, once no load copies from them; returns how many bytes were page-locked."""
        with self._change:
            self._releases += 1
            self._change.wait_for(lambda: not self._lent)
            freed = sum(file.close() for file in self._files.values())
            self._files.clear()
            return freed

    def _keep(self, files: Sequence[ShardFile]) -> None:
        """Begin to page-lock those of these files that are in memory, beside what comes next."""
        wanted = [
            (file.path, file.identity)
            for file in files
            if file.size and is_in_memory(file.identity[0]) and file.identity not in self._refused
        ]
        if not (wanted and torch.cuda.is_initialized()):
            return
        device, releases = torch.cuda.current_device(), self._releases

        def work() -> None:
            torch.cuda.set_device(device)
            with self._adding:
                self._drop_old()
                for path, identity in wanted:
                    self._add(path, identity, releases)

        threading.Thread(target=work, name="weightlift-lock", daemon=True).start()

    def _drop_old(self) -> None:
        """Free those that were cut off or deleted."""
        with self._change:
            self._wait()
            for file in list(self._files.values()):
                if file.is_deleted or not file.is_current():
                    del self._files[file.key]
                    file.close()

    def _add(self, path: str, identity: Identity, releases: int) -> None:
        """Page-lock a file and keep it, if nobody released all meanwhile."""
        room = self._most_bytes - sum(kept.size for kept in self._files.values())
        if identity[:2] in self._files:
            return
        if identity[2] > room:
            self._refuse(
                path,
                identity,
                f"of shared_gib {human(room)} are left, and it has {human(identity[2])}",
            )
            return
        try:
            file = SharedFile(path, identity)
        except OSError as error:
            self._refuse(path, identity, str(error))
            return
        is_locked = file.lock(self._wait)
        with self._change:
            if is_locked and releases == self._releases:
                self._files[file.key] = file
                logger.info("weightlift: %s of %s stay page-locked", human(file.size), path)
                return
        file.close()
        if not is_locked:
            self._refuse(path, identity, "it could not be locked, or was changed meanwhile")

    def _refuse(self, path: str, identity: Identity, why: str) -> None:
        self._refused.add(identity)  # as it is: written anew, it is tried again
        logger.warning("weightlift: %s is not kept page-locked: %s", path, why)

    def _wait(self) -> None:
        """Until no load is under way."""
        with self._change:
            self._change.wait_for(lambda: not self._lent)


_files: SharedFiles | None = None


def shared_files() -> SharedFiles | None:
    """Those of this process, if there may be any."""
    return _files


def locked_for(checkpoint: Checkpoint, most_bytes: int) -> contextlib.AbstractContextManager[None]:
    """:meth:`SharedFiles.lent_to`, where so many bytes may be page-locked; nothing for 0."""
    global _files
    if _files is None and most_bytes:
        _files = SharedFiles(most_bytes)
    return contextlib.nullcontext() if _files is None else _files.lent_to(checkpoint)


def _forget() -> None:
    """A forked child has neither the parent's locks nor its CUDA context."""
    global _files
    _files = None


os.register_at_fork(after_in_child=_forget)
