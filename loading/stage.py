"""Host memory for the bytes of the next checkpoint, read while the old weights still serve.

What an update then has to do is copy from here. Staged bytes count only for the file they were read
from: same device and inode, same size, same time of change.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from weightlift.loading.buffers import Buffer, memory_of
from weightlift.loading.checkpoint import Checkpoint, Shard
from weightlift.loading.files import Identity
from weightlift.loading.staging import page_aligned, register, unregister

READ_BYTES = 256 << 20
"""A read. The engine's loop polls meanwhile, and each return to Python waits 5 ms for its lock."""

REGISTERED_BYTES = 1 << 30
"""Pinned at a time: ``cudaHostRegister`` holds up other CUDA calls of the process meanwhile."""

Range = tuple[int, int]


@dataclass(frozen=True)
class StagedShard:
    """The bytes of one file that are in memory.

    Attributes:
        starts: First bytes of the ranges that are, ascending.
        stops: The bytes after their last.
        memory: Where each range is: flat uint8 views of the stage.
    """

    starts: Sequence[int]
    stops: Sequence[int]
    memory: Sequence[torch.Tensor]

    def view(self, start: int, stop: int) -> torch.Tensor | None:
        """The bytes from ``start`` to ``stop``, or None if not all of them are here."""
        position = bisect.bisect_right(self.starts, start) - 1
        if position < 0 or stop > self.stops[position]:
            return None
        first = start - self.starts[position]
        return self.memory[position][first : first + stop - start]

    def read_into(self, start: int, buffers: Sequence[Buffer]) -> bool:
        """Fill buffers from byte ``start`` on, if all of it is here."""
        data = self.view(start, start + sum(map(len, buffers)))
        if data is None:
            return False
        position = 0
        for buffer in buffers:
            if len(buffer):
                part = torch.frombuffer(buffer, dtype=torch.uint8)
                part.copy_(data[position : position + len(buffer)])
            position += len(buffer)
        return True


class Stage:
    """The staged bytes of one checkpoint, in memory that is kept from one to the next.

    Args:
        most_bytes: What it may take.
        pinned: Whether to page-lock it, for CUDA.
    """

    def __init__(self, most_bytes: int, *, pinned: bool) -> None:
        self._most_bytes = most_bytes
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._registered = 0
        self._shards: dict[Identity, StagedShard] = {}
        self._lock = threading.Lock()
        self._no_update = threading.Condition()
        self._updates = 0

    @property
    def _must_stop(self) -> bool:
        return self._updates > 0

    @contextlib.contextmanager
    def lent_to(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Within this, the shards of a checkpoint are read from here, as far as they are here.

        Staging ends for it, and does not begin before it is over.
        """
        with self._no_update:
            self._updates += 1
        try:
            with self._lock:
                for shard in checkpoint.shards:
                    shard.file.staged = self._shards.get(shard.file.identity)
            yield
        finally:
            with self._no_update:
                self._updates -= 1
                self._no_update.notify_all()

    def fill(self, checkpoint: Checkpoint, wanted: Mapping[str, list[Range]], threads: int) -> int:
        """Read these ranges of a checkpoint, in order, as far as the memory goes.

        What was staged before is dropped. An update that begins meanwhile ends this.

        Args:
            checkpoint: Its open shards.
            wanted: Byte ranges by path of the shard; ascending, apart.
            threads: Reader threads.

        Returns:
            How many bytes are staged.

        Raises:
            CheckpointError: A shard could not be read.
        """
        with self._no_update:
            self._no_update.wait_for(lambda: not self._must_stop)
            self._lock.acquire()
        try:
            return self._fill(checkpoint, wanted, threads)
        finally:
            self._lock.release()

    def _fill(self, checkpoint: Checkpoint, wanted: Mapping[str, list[Range]], threads: int) -> int:
        self._shards.clear()
        total = sum(stop - start for ranges in wanted.values() for start, stop in ranges)
        self._reserve(min(total, self._most_bytes))
        position = 0
        for shard in checkpoint.shards:
            ranges, taken = _fitting(wanted.get(shard.file.path, []), len(self._memory) - position)
            room = self._memory[position : position + taken]
            if taken and self._read(shard, ranges, room, threads):
                self._shards[shard.file.identity] = _staged(ranges, room)
                position += taken
        self._register(position)
        return position

    def is_straddling(self, view: torch.Tensor) -> bool:
        """Whether a view of staged bytes is not page-locked in one piece."""
        first = view.data_ptr() - self._memory.data_ptr()
        last = first + view.numel() - 1
        return last >= self._registered or first // REGISTERED_BYTES != last // REGISTERED_BYTES

    def close(self) -> int:
        """Free the memory, and forget what is staged; returns its bytes."""
        with self._no_update, self._lock:
            self._shards.clear()
            freed = len(self._memory)
            self._free()
            return freed

    def _read(self, shard: Shard, ranges: list[Range], room: torch.Tensor, threads: int) -> bool:
        """Read ranges one after the other into ``room``; False if an update came."""
        jobs: list[tuple[int, torch.Tensor]] = []
        position = 0
        for start, stop in ranges:
            for offset in range(start, stop, READ_BYTES):
                nbytes = min(READ_BYTES, stop - offset)
                jobs.append((offset, room[position : position + nbytes]))
                position += nbytes

        def read(job: tuple[int, torch.Tensor]) -> None:
            if not self._must_stop:
                shard.file.read_into(job[0], [memory_of(job[1])])

        with ThreadPoolExecutor(threads, "weightlift-stage") as pool:
            list(pool.map(read, jobs))
        return not self._must_stop

    def _reserve(self, nbytes: int) -> None:
        if len(self._memory) >= nbytes:
            return
        self._free()
        self._memory = page_aligned(nbytes)

    def _register(self, used: int) -> None:
        """Page-lock what was read, and touched by that, piece by piece."""
        while self._pinned and self._registered < used and not self._must_stop:
            piece = self._memory[self._registered : self._registered + REGISTERED_BYTES]
            if not register(piece):
                return
            self._registered += len(piece)

    def _free(self) -> None:
        for start in range(0, self._registered, REGISTERED_BYTES):
            unregister(self._memory[start:])
        self._registered = 0
        self._memory = torch.empty(0, dtype=torch.uint8)


def _fitting(ranges: list[Range], room: int) -> tuple[list[Range], int]:
    """The first of these ranges that fit, and their bytes."""
    found: list[Range] = []
    taken = 0
    for start, stop in ranges:
        stop = min(stop, start + room - taken)
        if stop > start:
            found.append((start, stop))
            taken += stop - start
    return found, taken


def _staged(ranges: list[Range], room: torch.Tensor) -> StagedShard:
    sizes = [stop - start for start, stop in ranges]
    return StagedShard(
        [start for start, _ in ranges],
        [stop for _, stop in ranges],
        room[: sum(sizes)].split(sizes),
    )


_stage: Stage | None = None


def active_stage() -> Stage | None:
    """The stage of this process, if there is one."""
    return _stage


def staged_for(checkpoint: Checkpoint) -> contextlib.AbstractContextManager[None]:
    """:meth:`Stage.lent_to` of the stage of this process; nothing if there is none."""
    return contextlib.nullcontext() if _stage is None else _stage.lent_to(checkpoint)


def make_stage(most_bytes: int, *, pinned: bool) -> Stage:
    """The stage of this process, made if there is none."""
    global _stage
    _stage = _stage or Stage(most_bytes, pinned=pinned)
    return _stage


def _forget() -> None:
    """A forked child has neither the parent's locks nor its CUDA context."""
    global _stage
    _stage = None


os.register_at_fork(after_in_child=_forget)
