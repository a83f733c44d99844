"""What ``ranks.py`` times: ways to fill the parameters of a rank, and the limits of the machine."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model import Sharded

from weightlift.loading.buffers import memory_of
from weightlift.loading.checkpoint import shard_paths
from weightlift.loading.exchange import Exchange
from weightlift.loading.families import Families
from weightlift.loading.group import TorchGroup
from weightlift.loading.parameters import Parameters
from weightlift.loading.planner import Planner
from weightlift.loading.recording import Recording
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession
from weightlift.loading.settings import Settings
from weightlift.loading.staging import page_aligned, register


@dataclasses.dataclass
class Load:
    """One loader on one rank; subclasses fill in :meth:`run`."""

    path: Path
    device: torch.device
    rank: int
    size: int
    model: Sharded
    bytes_read: int = 0
    note: str = ""
    fills: bool = True
    state: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: Callable[[], None] = lambda: None

    @property
    def files(self) -> list[str]:
        """Paths of the shards."""
        return [str(file) for file in shard_paths(self.path)]

    @property
    def nbytes(self) -> int:
        """Bytes of the shards."""
        return sum(os.path.getsize(file) for file in self.files)


def weightlift(load: Load, *, exchange: bool, fast: bool = True) -> Load:
    """As the engine patches do it: fast load at first, then replays."""
    recording: Recording | None = None
    settings = Settings(exchange="on" if exchange else "off")
    group = TorchGroup(load.rank, load.size, dist.group.WORLD, dist.group.WORLD)

    def run() -> None:
        nonlocal recording
        report = LoadReport(rank=load.rank)
        parameters = Parameters(load.model.parameters)
        planner = Planner(parameters, recording=recording, families=Families(), is_fast=fast)
        shared = Exchange(group, load.device, report) if exchange and load.size > 1 else None
        session = LoadSession(
            settings, report, planner.ledger, planner.weights, lambda: None, shared
        )
        with session, session.armed():
            load.model.load(session.guard(session.iterate(load.files)))
        recording, why = planner.recorded(None)
        if recording is not None and shared is not None:
            recording = dataclasses.replace(recording, shared=shared.plan)
        load.bytes_read = report.bytes_read
        load.note = f"{planner.plan} {planner.note or why} {report.exchange_note} plan {report.plan_seconds:.3f} s"

    load.run = run
    return load


def native(load: Load) -> Load:
    """The engines' loop: map, slice, copy tensor by tensor."""
    from safetensors import safe_open

    def run() -> None:
        for file in load.files:
            with safe_open(file, framework="pt", device="cpu") as shard:
                load.model.load((name, shard.get_tensor(name)) for name in shard.keys())  # noqa: SIM118

    load.run = run
    return load


def prefetch(load: Load) -> Load:
    """safetensors 0.9's prefetch, with dim-0 slices where the model wants them; two files ahead."""
    from safetensors import safe_open

    def run() -> None:
        for file in load.files:
            with safe_open(file, framework="pt") as shard:
                plan: dict[str, Any] = {}
                for name in shard.keys():  # noqa: SIM118 - it is no dict
                    plan[name] = None
                    if load.model.dimension(name) == 0:
                        plan[name] = slice(
                            *load.model.bounds(name, shard.get_slice(name).get_shape()[0])
                        )
                with shard.prefetch(plan=plan, device=str(load.device), threads=8) as tensors:
                    for name, tensor in tensors:
                        if load.model.dimension(name) == 0:
                            load.model.place(name, tensor)
                        else:
                            load.model.load([(name, tensor)])
                        del tensor

    load.run = run
    return load


def instanttensor(load: Load) -> Load:
    """Buffered, its ring kept, every rank a part of each chunk and all of it by NCCL."""
    os.environ["INSTANTTENSOR_CACHE_BUFFER"] = "1"
    from instanttensor import Backend, BackendPolicy, safe_open

    in_memory = str(load.path).startswith("/dev/shm")
    backend = Backend.MMAP if in_memory else BackendPolicy.BUFFERED
    how: dict[str, Any] = {"chunk_size": 8 << 20, "io_depth": 32, "copy": False}
    if load.size > 1:
        how["process_group"] = dist.group.WORLD

    def run() -> None:
        with safe_open(
            load.files, framework="pt", device=load.rank, backend=backend, **how
        ) as shards:
            load.model.load(shards.tensors())

    load.run = run
    return load


def fastsafetensors(load: Load) -> Load:
    """Warm settings: no O_DIRECT, no GDS, a large bounce buffer."""
    os.environ["FASTSAFETENSORS_ODIRECT"] = "0"
    from fastsafetensors import ParallelLoader

    group = dist.group.WORLD if load.size > 1 else None

    def run() -> None:
        loader = ParallelLoader(
            group, load.files, device=str(load.device), nogds=True, bbuf_size_kb=512 << 10,
            max_threads=16, use_tqdm_on_load=False,
        )  # fmt: skip
        load.model.load(loader.iterate_weights())
        loader.close()

    load.run = run
    return load


def _pinned(nbytes: int) -> torch.Tensor:
    memory = page_aligned(nbytes).zero_()
    register(memory)
    return memory


def pinned_copies(load: Load) -> Load:
    """The floor: each rank's share of the bytes from pinned memory, all GPUs at once."""
    source, load.fills = _pinned(512 << 20), False
    target = torch.empty_like(source, device=load.device)
    share = load.nbytes // load.size

    def run() -> None:
        for _ in range(max(1, share // len(source))):
            target.copy_(source, non_blocking=True)
        load.note = f"{max(1, share // len(source)) * len(source) / 1e9:.1f} GB a rank"

    load.run = run
    return load


def page_cache_reads(load: Load) -> Load:
    """Each rank's share of the files into pinned memory, 12 threads of 8 MiB."""
    threads, chunk = 12, 8 << 20
    slots = [_pinned(chunk) for _ in range(threads)]
    load.fills = False
    jobs = [
        (file, offset)
        for file in load.files
        for offset in range(0, os.path.getsize(file) - chunk, chunk)
    ][load.rank :: load.size]

    def run() -> None:
        open_files = {file: os.open(file, os.O_RDONLY) for file in load.files}
        waiting, lock = iter(jobs), threading.Lock()

        def work(slot: torch.Tensor) -> None:
            memory = memory_of(slot)
            while True:
                with lock:
                    job = next(waiting, None)
                if job is None:
                    return
                os.preadv(open_files[job[0]], [memory], job[1])

        workers = [threading.Thread(target=work, args=(slot,)) for slot in slots]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for descriptor in open_files.values():
            os.close(descriptor)

    load.run = run
    return load


def all_gathers(load: Load) -> Load:
    """The whole checkpoint's bytes by all-gathers of 16 MiB a rank."""
    load.fills = False
    row = torch.empty(load.size * (16 << 20), dtype=torch.uint8, device=load.device)

    def run() -> None:
        for _ in range(max(1, load.nbytes // len(row))):
            dist.all_gather_into_tensor(row, row.chunk(load.size)[load.rank])

    load.run = run
    return load


ceilings = {
    "ceiling: pinned copies": pinned_copies,
    "ceiling: page cache to pinned": page_cache_reads,
    "ceiling: all-gather": all_gathers,
}
LOADERS: dict[str, Callable[[Load], Load]] = {
    **ceilings,
    "native loop": native,
    "weightlift": lambda load: weightlift(load, exchange=True),
    "weightlift, no exchange": lambda load: weightlift(load, exchange=False),
    "instanttensor": instanttensor,
    "safetensors prefetch": prefetch,
    "fastsafetensors": fastsafetensors,
}
