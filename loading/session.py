"""One load: lazy tensors out, transfers in, everything in place before the engine goes on."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.errors import PlanAborted, UnsupportedCheckpoint
from weightlift.loading.files import memory_of
from weightlift.loading.guard import PendingGuard
from weightlift.loading.lazy import LazyTensor, data_of, geometry, lazy_tensor, place_of
from weightlift.loading.leftovers import find_lazy, meta_names
from weightlift.loading.placement import window_bytes
from weightlift.loading.plan import Plan
from weightlift.loading.progress import Progress
from weightlift.loading.reader import ReaderPool
from weightlift.loading.report import LoadReport
from weightlift.loading.settings import Settings
from weightlift.loading.source import Source
from weightlift.loading.transfer import Transfer, extent

_thread = threading.local()


def active_session() -> LoadSession | None:
    """The session that is armed in this thread, if any."""
    return getattr(_thread, "session", None)


class LoadSession:
    """A load from open to closed. A context manager; leaving it ends threads and closes files.

    Args:
        settings: Threads and memory.
        report: Counts what happens.
    """

    def __init__(self, settings: Settings, report: LoadReport) -> None:
        self.report = report
        self.aborted: PlanAborted | None = None
        """What made this load one that cannot be planned, also if the loader swallowed it."""
        self.is_finished = False
        self._settings = settings
        self._checkpoints: list[tuple[Checkpoint, bool]] = []
        self._pools: dict[torch.device, ReaderPool] = {}
        self._plans: dict[torch.device, Plan] = {}
        self._lock = threading.RLock()
        self._is_exhausted = False
        self._sources: weakref.WeakSet[Source] = weakref.WeakSet()
        self._process = os.getpid()

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Within this, iterators of this thread yield lazy tensors."""
        before = active_session()
        _thread.session = self
        try:
            with PendingGuard(self, self._is_idle):
                yield
        finally:
            _thread.session = before

    def open(self, files: Iterable[str], *, drop_cache: bool = False) -> Checkpoint:
        """Open shards; they are closed with the session.

        Args:
            files: Paths of the shards.
            drop_cache: Take each file out of the page cache once the load is over.

        Raises:
            CheckpointError: A shard is missing, damaged, or does not match its index.
            PlanAborted: A dtype that this torch does not have.
        """
        try:
            return self.hold(Checkpoint.open(files), drop_cache=drop_cache)
        except UnsupportedCheckpoint as error:
            raise self.abort(PlanAborted(str(error))) from error

    def hold(self, checkpoint: Checkpoint, *, drop_cache: bool = False) -> Checkpoint:
        """Have an open checkpoint closed with the session; returns it."""
        self._checkpoints.append((checkpoint, drop_cache))
        return checkpoint

    def iterate(
        self, files: Iterable[str], *, drop_cache: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """:meth:`open`, then :meth:`lazies`."""
        yield from self.lazies(self.open(files, drop_cache=drop_cache))

    def lazies(self, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of open shards, lazily: file by file as given, each sorted by name.

        That is the order of the stock iterators, and what some models rely on.
        """
        is_heard = self.report.rank == 0
        with Progress(checkpoint.nbytes, self._bytes_read, visible=is_heard) as progress:
            for shard in checkpoint.shards:
                for name in sorted(shard.tensors):
                    self.report.tensors += 1
                    progress.update()
                    source = Source(shard.tensors[name], self)
                    self._sources.add(source)
                    yield name, lazy_tensor(source)

    def guard(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass the weights on; before their end is told, everything recorded is in place.

        What a loader copies after that (it may have collected them all) is copied at once.
        """
        yield from weights
        self._is_exhausted = True
        self.flush()

    def finish(self, model: torch.nn.Module, was_meta: frozenset[str] = frozenset()) -> None:
        """Wait for what is under way and make sure that the model holds data, all of it.

        Args:
            model: The loaded model.
            was_meta: Names of what was on the meta device before the load.

        Raises:
            PlanAborted: A lazy tensor stays in it, or a loader did what cannot be planned.
            CheckpointError: A shard could not be read.
        """
        self.flush()
        if self.aborted is not None:
            raise self.aborted
        leftover = find_lazy(model) if len(self._sources) else ""
        leftover = leftover or min(meta_names(model) - was_meta, default="")
        if leftover:
            raise self.abort(PlanAborted(f"{leftover} of the model was left without its data"))
        self.is_finished = True

    # What lazy tensors report to: see `source.Recorder`.

    def copy(self, target: torch.Tensor, lazy: LazyTensor) -> None:
        """Fill ``target`` from the file, in the background where that is safe.

        Sources of at most one dimension are copied at once: scales, norms and state-space
        parameters, which some loaders read back (``composed_weight_loader``), are all of them.
        """
        shape, stride, _, dtype = geometry(lazy)
        if len(shape) < 2 or not _is_plain(target, shape) or lazy.source.realised is not None:
            self.settle([target])
            with torch._C.DisableTorchFunction():
                target.copy_(data_of(lazy))
            return
        file, where = lazy.source.entry.file, place_of(lazy)
        transfer = Transfer(file, where, dtype, shape, stride, target.detach()).in_file_order()
        with self._lock:
            self.report.planned += 1
            self.report.bytes_needed += transfer.nbytes
        self._plan(target.device).add(transfer)
        if self._is_exhausted:
            self.flush()

    def read(self, lazy: LazyTensor) -> torch.Tensor:
        """The data of a lazy tensor, on the CPU, in memory of its own."""
        shape, stride, _, dtype = geometry(lazy)
        with self._lock:
            self.report.materialised += 1
        with torch._C.DisableTorchFunction():
            if 0 in shape:
                return torch.empty_strided(shape, stride, dtype=dtype)
            data = torch.empty(extent(shape, stride), dtype=dtype)
            lazy.source.entry.file.read_into(place_of(lazy), [memory_of(data)])
            with self._lock:
                self.report.bytes_needed += data.numel() * dtype.itemsize
            return data.as_strided(shape, stride)

    def settle(self, tensors: Iterable[torch.Tensor]) -> None:
        """Return once no transfer into these tensors' storages is under way."""
        with torch._C.DisableTorchFunction():
            touched = any(
                is_traceable_wrapper_subclass(tensor) or plan.touches(tensor)
                for tensor in tensors
                if _has_memory(tensor)
                for plan in list(self._plans.values())
            )
        if touched:
            self.flush()

    def abort(self, reason: PlanAborted) -> PlanAborted:
        """Remember that this load cannot be finished by plan, and why; returns ``reason``."""
        self.aborted = self.aborted or reason
        return reason

    def flush(self) -> None:
        """Put everything recorded so far in place.

        Raises:
            CheckpointError: A shard could not be read.
        """
        for device, plan in list(self._plans.items()):
            plan.flush(self._pools[device].drain)

    def __enter__(self) -> LoadSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.report.seconds = time.perf_counter() - self.report.started
        with ExitStack() as closing:
            for checkpoint, drop_cache in self._checkpoints:
                closing.callback(checkpoint.close, drop_cache=drop_cache)
            for pool in self._pools.values():
                closing.callback(pool.close)
            self.report.bytes_read = self._bytes_read()

    def _plan(self, device: torch.device) -> Plan:
        with self._lock:
            if device not in self._plans:
                pool = self._pools[device] = ReaderPool(device, self._settings)
                self.report.threads += pool.threads
                self._plans[device] = Plan(window_bytes(device), pool.submit)
            return self._plans[device]

    def _is_idle(self) -> bool:
        """Whether nothing is pending here; a forked child has no readers to wait for."""
        if os.getpid() != self._process:
            return True
        return all(plan.is_empty for plan in list(self._plans.values()))

    def _bytes_read(self) -> int:
        return sum(checkpoint.bytes_read for checkpoint, _ in self._checkpoints)


def _is_plain(target: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether readers may write to this target's memory themselves."""
    return (
        tuple(target.shape) == shape
        and target.device.type in ("cpu", "cuda")
        and _has_memory(target)
        and not is_traceable_wrapper_subclass(target)
        and not (target.is_conj() or target.is_neg())
    )


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta
