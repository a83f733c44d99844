"""What the machine allows: the rates that loads are measured against, found in the same run."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from weightlift.loading.buffers import memory_of
from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.files import ShardFile
from weightlift.loading.pages import PAGE
from weightlift.loading.staging import page_aligned, register, unregister

CALLS = 3
PINNED_BYTES = 1 << 30
COPIED_BYTES = 8 << 30
DISK_BYTES = 4 << 30
"""Of each call. A rate needs no more."""

_READERS, _READ_BYTES = 16, 1 << 20


def warm_ceiling(path: Path, device: torch.device) -> float:
    """Bytes a second of one long copy from pinned memory; on a CPU, of reads by many threads."""
    if device.type == "cpu":
        return _best(lambda: _read(path, is_direct=False))
    source, target = page_aligned(PINNED_BYTES), torch.empty(0)
    source.zero_()
    register(source)
    try:
        target = torch.empty_like(source, device=device)
        return _best(lambda: _copy(source, target))
    finally:
        unregister(source)


def cold_ceiling(path: Path) -> float:
    """Bytes a second that the disk gives past the page cache; 0 if that cannot be."""
    return _best(lambda: _read(path, is_direct=True))


def _best(measure: Callable[[], tuple[int, float]]) -> float:
    rates = []
    for _ in range(CALLS):
        nbytes, seconds = measure()
        rates.append(nbytes / seconds if nbytes else 0.0)
    return max(rates)


def _copy(source: torch.Tensor, target: torch.Tensor) -> tuple[int, float]:
    torch.cuda.synchronize(target.device)
    started = time.perf_counter()
    for _ in range(COPIED_BYTES // PINNED_BYTES):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(target.device)
    return COPIED_BYTES // PINNED_BYTES * PINNED_BYTES, time.perf_counter() - started


def _read(path: Path, *, is_direct: bool) -> tuple[int, float]:
    """Read from the files by threads; how many bytes, in how many seconds."""
    with Checkpoint.from_path(path) as checkpoint, contextlib.ExitStack() as stack:
        jobs = list(itertools.islice(_jobs(checkpoint), DISK_BYTES // _READ_BYTES))
        for shard in checkpoint.shards:
            shard.file.direct_io = "on" if is_direct else "off"
            if is_direct and not shard.file.is_direct(0, 1):
                return 0, 1.0
        pool = stack.enter_context(ThreadPoolExecutor(_READERS))
        slots = [page_aligned(_READ_BYTES + 2 * PAGE) for _ in range(_READERS)]

        def work(number: int) -> int:
            room, done = memory_of(slots[number]), 0
            for file, offset in jobs[number::_READERS]:
                stop = min(offset + _READ_BYTES, file.size)
                file.fetch(offset, stop, room)
                done += stop - offset
            return done

        started = time.perf_counter()
        nbytes = sum(pool.map(work, range(_READERS)))
        return nbytes, time.perf_counter() - started


def _jobs(checkpoint: Checkpoint) -> Iterator[tuple[ShardFile, int]]:
    for shard in checkpoint.shards:
        yield from ((shard.file, offset) for offset in range(0, shard.file.size, _READ_BYTES))
