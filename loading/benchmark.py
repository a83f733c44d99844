"""Timing a checkpoint's way into final tensors: weightlift, safetensors, and installed peers.

Each loader runs in a process of its own, into tensors that are there before the clock starts, at
the settings that suit it best. The first call, which pays for threads and pinned memory, is told
apart from the rest. Cold means that the page cache was dropped, and found to be empty, before.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightlift.loading.ceilings import cold_ceiling, warm_ceiling
from weightlift.loading.checkpoint import Checkpoint, shard_paths
from weightlift.loading.peers import LOADERS, Loader, Targets

CEILING = "ceiling"
"""What the machine allows: pinned copies to a GPU or reads by many threads where files are warm, and
reads past the page cache where they are cold. As if it were a loader."""

COLD_FRACTION = 0.02
"""Part of a file that may be in the page cache and the file still counts as cold."""


@dataclass(frozen=True)
class Timing:
    """One loader, warm or cold.

    Attributes:
        loader: Its name.
        state: ``warm`` or ``cold``.
        first_s: Seconds of the first call in its process.
        seconds: Of the calls after it.
        nbytes: Bytes of the checkpoint.
        is_equal: Whether every tensor is that of the file, cast where that was asked for; None for
            a ceiling, which loads nothing.
        device_bytes: Device memory that it took besides the tensors, at its peak.
        host_bytes: Host memory of its process that it took, and kept to the end.
        problem: Why there are no numbers, or ''.
    """

    loader: str
    state: str
    first_s: float = 0.0
    seconds: tuple[float, ...] = ()
    nbytes: int = 0
    is_equal: bool | None = False
    device_bytes: int = 0
    host_bytes: int = 0
    problem: str = ""

    @property
    def median_s(self) -> float:
        """Median of the calls after the first, or the first if it was the only one."""
        return statistics.median(self.seconds or (self.first_s,))


def compare(
    path: Path,
    device: torch.device,
    loaders: list[str],
    states: list[str],
    calls: int,
    dtype: torch.dtype | None = None,
) -> Iterator[Timing]:
    """Time what the machine allows and these loaders, one process each, and yield as they are done.

    Args:
        path: A checkpoint.
        device: Where the tensors are.
        loaders: Names from :data:`LOADERS`.
        states: ``warm``, ``cold`` or both.
        calls: Calls in each process, at least one.
        dtype: Of the tensors, if not as stored.
    """
    context = multiprocessing.get_context("spawn")
    for state in states:
        for name in (CEILING, *loaders):
            ours, theirs = context.Pipe(duplex=False)
            job = _Job(name, path, device, state, calls, dtype)
            process = context.Process(target=_measure, args=(job, theirs))
            process.start()
            theirs.close()
            try:
                yield ours.recv()
            except EOFError:
                process.join()
                yield Timing(name, state, problem=f"its process died ({process.exitcode})")
            process.join()


@dataclass(frozen=True)
class _Job:
    """What a loader's own process does."""

    loader: str
    path: Path
    device: torch.device
    state: str
    calls: int
    dtype: torch.dtype | None


def _measure(job: _Job, answer: Any) -> None:
    """Runs in the loader's own process."""
    try:
        timing = _timed(job)
    except Exception as error:  # noqa: BLE001 - a peer's trouble is a row of the table
        timing = Timing(job.loader, job.state, problem=f"{type(error).__name__}: {error}")
    answer.send(timing)


def _timed(job: _Job) -> Timing:
    path = job.path
    with Checkpoint.from_path(path) as checkpoint:
        nbytes = sum(entry.nbytes for entry in checkpoint.entries())
    if job.loader == CEILING:
        return _ceiling(job, nbytes)
    loader = LOADERS[job.loader]
    with contextlib.ExitStack() as stack:
        if loader.convert is not None:
            converted = loader.convert(path)
            stack.callback(converted.unlink)
        return _calls(job, loader, nbytes)


def _ceiling(job: _Job, nbytes: int) -> Timing:
    is_warm = job.state == "warm"
    # On H100 hosts the first to read what was just written takes up to twice as long
    prepare_cache(job.path, job.state, reads_all=True)
    rate = warm_ceiling(job.path, job.device) if is_warm else cold_ceiling(job.path)
    if not rate:
        return Timing(
            CEILING, job.state, problem="no reads past the page cache here", is_equal=None
        )
    return Timing(CEILING, job.state, nbytes / rate, nbytes=nbytes, is_equal=None)


def _calls(job: _Job, loader: Loader, nbytes: int) -> Timing:
    path, device = job.path, job.device
    targets = empty_targets(path, device, job.dtype)
    memory = _Memory(device)
    seconds = []
    for _ in range(job.calls):
        prepare_cache(path, job.state)
        started = time.perf_counter()
        with torch.no_grad():
            loader.run(path, targets, device, job.state)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    taken = memory.taken()
    equal = is_equal(path, targets)
    return Timing(job.loader, job.state, seconds[0], tuple(seconds[1:]), nbytes, equal, *taken)


class _Memory:
    """What a loader takes of the device and of the host, beyond what was taken before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = _anonymous_bytes()
        self._free = self._allocated = 0
        if device.type == "cuda":
            self._free = torch.cuda.mem_get_info(device)[0]
            self._allocated = torch.cuda.memory_allocated(device)

    def taken(self) -> tuple[int, int]:
        """Bytes of the device, at the peak or still, and of the host, still."""
        host = max(0, _anonymous_bytes() - self._host)
        if self._device.type == "cpu":
            return 0, host
        by_torch = torch.cuda.max_memory_allocated(self._device) - self._allocated
        by_all = self._free - torch.cuda.mem_get_info(self._device)[0]
        return max(0, by_torch, by_all), host


def _anonymous_bytes() -> int:
    """Resident memory of this process that is of no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def empty_targets(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> Targets:
    """Zeroed tensors of the checkpoint's shapes and, if no other is given, dtypes."""
    with Checkpoint.from_path(path) as checkpoint:
        return {
            entry.name: torch.zeros(entry.shape, dtype=dtype or entry.dtype, device=device)
            for entry in checkpoint.entries()
        }


def prepare_cache(path: Path, state: str, *, reads_all: bool = False) -> None:
    """Bring all of the checkpoint into the page cache, or none of it.

    Args:
        path: The checkpoint.
        state: ``warm`` or ``cold``.
        reads_all: Whether to read, for ``warm``, what is there already, too.

    Raises:
        OSError: The kernel keeps pages that should go (some filesystems and containers do).
    """
    with Checkpoint.from_path(path) as checkpoint:
        for shard in checkpoint.shards:
            if state == "cold":
                make_cold(shard.file.path)
                if shard.file.cached_bytes() > COLD_FRACTION * shard.file.size:
                    raise OSError(f"{shard.file.path} stays in the page cache")
            elif reads_all or shard.file.cached_bytes() < shard.file.size:
                for offset in range(0, shard.file.size, 16 << 20):
                    shard.file.read(offset, min(16 << 20, shard.file.size - offset))


def make_cold(path: str | Path) -> None:
    """Write a file back and take it out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # a dirty page cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def is_equal(path: Path, targets: Targets) -> bool:
    """Whether the targets hold, bit by bit, what safetensors reads and torch casts."""
    from safetensors import safe_open

    for file in shard_paths(path):
        with safe_open(file, framework="pt", device="cpu") as shard:
            for name in shard.keys():  # noqa: SIM118 - it is no dict
                expected = shard.get_tensor(name).to(targets[name].device).to(targets[name].dtype)
                left, right = (
                    item.reshape(-1).view(torch.uint8) for item in (expected, targets[name])
                )
                if not torch.equal(left, right):
                    return False
    return True
