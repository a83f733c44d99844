"""One load: lazy tensors out, transfers in, everything in place before the engine goes on."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.delivery import Delivery
from weightlift.loading.errors import PlanAborted, UnsupportedCheckpoint
from weightlift.loading.files import ShardFile, memory_of
from weightlift.loading.guard import PendingGuard
from weightlift.loading.header import TensorEntry
from weightlift.loading.lazy import LazyTensor, data_of, geometry, lazy_tensor, place_of
from weightlift.loading.leftovers import find_lazy, meta_names
from weightlift.loading.progress import Progress
from weightlift.loading.recording import Ledger
from weightlift.loading.report import LoadReport
from weightlift.loading.settings import Settings
from weightlift.loading.source import Source
from weightlift.loading.stage import active_stage
from weightlift.loading.transfer import Transfer, extent

NamedWeights = Iterator[tuple[str, torch.Tensor]]

_thread = threading.local()


def active_session() -> LoadSession | None:
    """The session that is armed in this thread, if any."""
    return getattr(_thread, "session", None)


class LoadSession:
    """A load from open to closed. A context manager; leaving it ends threads and closes files.

    Args:
        settings: Threads and memory.
        report: Counts what happens.
        ledger: Takes down what becomes of each tensor, if the load is to be done again.
        weights: Gives the lazy tensors of a checkpoint that the loader must see; all if left out.
        before_write: Called once, before the first byte is written; see :class:`Delivery`.
    """

    def __init__(
        self,
        settings: Settings,
        report: LoadReport,
        ledger: Ledger | None = None,
        weights: Callable[[LoadSession, Checkpoint], NamedWeights] | None = None,
        before_write: Callable[[], None] | None = None,
    ) -> None:
        self.report = report
        self.ledger = ledger
        self._weights = weights or LoadSession.lazies
        self.aborted: PlanAborted | None = None
        """What made this load one that cannot be planned, also if the loader swallowed it."""
        self.is_exhausted = False
        """Whether the loader was told that there are no more tensors."""
        self.is_finished = False
        self.delivery = Delivery(settings, report, before_write)
        self._checkpoints: list[tuple[Checkpoint, bool]] = []
        self._lock = threading.RLock()
        self.is_exhausted = False
        self._sources: weakref.WeakSet[Source] = weakref.WeakSet()
        self._thread = 0
        self._plan_started = report.started
        self._lent = ExitStack()

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Within this, iterators of this thread yield lazy tensors."""
        before = active_session()
        _thread.session = self
        self._thread = threading.get_ident()
        try:
            with PendingGuard(self), _without_collecting():
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
            checkpoint = self.hold(Checkpoint.open(files), drop_cache=drop_cache)
        except UnsupportedCheckpoint as error:
            raise self.abort(PlanAborted(str(error))) from error
        stage = active_stage()
        if stage is not None:
            self._lent.enter_context(stage.lent_to(checkpoint))
        return checkpoint

    def hold(self, checkpoint: Checkpoint, *, drop_cache: bool = False) -> Checkpoint:
        """Have an open checkpoint closed with the session; returns it."""
        self._checkpoints.append((checkpoint, drop_cache))
        return checkpoint

    def iterate(self, files: Iterable[str], *, drop_cache: bool = False) -> NamedWeights:
        """:meth:`open`, then what the loader must see of it."""
        checkpoint = self.open(files, drop_cache=drop_cache)
        self._plan_started = time.perf_counter()
        yield from self._weights(self, checkpoint)

    def lazies(self, checkpoint: Checkpoint, wanted: Container[str] | None = None) -> NamedWeights:
        """The tensors of open shards, lazily: file by file as given, each sorted by name.

        That is the order of the stock iterators, and what some models rely on. With ``wanted``,
        only these.
        """
        is_heard = self.report.rank == 0
        with Progress(checkpoint.nbytes, self._bytes_read, visible=is_heard) as progress:
            for shard in checkpoint.shards:
                for name in sorted(shard.tensors):
                    if wanted is None or name in wanted:
                        progress.update()
                        yield name, self._lazy(shard.tensors[name], shard.file)

    def _lazy(self, entry: TensorEntry, file: ShardFile) -> LazyTensor:
        """A tensor of the checkpoint, lazily."""
        self.report.tensors += 1
        if self.ledger is not None:
            self.ledger.offer(entry)
        source = Source(entry, file, self)
        self._sources.add(source)
        return lazy_tensor(source)

    def held_names(self) -> set[str]:
        """Tensors of which somebody still holds a lazy view: more may come of them."""
        return {source.entry.name for source in list(self._sources)}

    def guard(self, weights: Iterable[tuple[str, torch.Tensor]]) -> NamedWeights:
        """Pass the weights on; before their end is told, everything recorded is in place.

        What a loader copies after that (it may have collected them all) is copied at once.
        """
        yield from weights
        self.is_exhausted = True
        if self.ledger is not None:
            self.ledger.end()
        self.report.plan_seconds = time.perf_counter() - self._plan_started
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
        While nothing may be written, they wait too; the guard sees who reads them back.
        """
        shape, stride, _, dtype = geometry(lazy)
        entry = lazy.source.entry
        if not _is_plain(target, shape) or lazy.source.realised is not None:
            self._blame(entry, "a copy that takes more than moving bytes")
            self._copy_now(target, lazy)
            return
        if 0 in shape:
            return
        transfer = Transfer(lazy.source.file, place_of(lazy), dtype, shape, stride, target.detach())
        transfer = transfer.in_file_order()
        with self._lock:
            if self.ledger is not None:
                self.ledger.moved(entry, transfer)
                self.ledger.strangers |= threading.get_ident() != self._thread
            is_small = len(shape) < 2 and not self._is_held_back()
            self.report.planned += not is_small
        if is_small:
            self._copy_now(target, lazy)
            return
        with self._lock:
            self.report.bytes_needed += transfer.nbytes
        self.delivery.add(transfer)
        if self.is_exhausted:
            self.flush()

    def _is_held_back(self) -> bool:
        """Whether this thread's copies may wait: nothing may be written, and the guard is here."""
        return self.delivery.is_gated and threading.get_ident() == self._thread

    def _copy_now(self, target: torch.Tensor, lazy: LazyTensor) -> None:
        self.delivery.open_gate()
        self.settle([target])
        with torch._C.DisableTorchFunction():
            target.copy_(data_of(lazy))

    def materialised(self, lazy: LazyTensor) -> None:
        """A loader works with the data of this tensor itself, and may write what it makes of it."""
        self._blame(lazy.source.entry, "its data was worked with")
        self.delivery.open_gate()

    def _blame(self, entry: TensorEntry, why: str) -> None:
        if self.ledger is not None:
            self.ledger.blamed.setdefault(entry.name, why)

    def read(self, lazy: LazyTensor) -> torch.Tensor:
        """The data of a lazy tensor, on the CPU, in memory of its own."""
        shape, stride, _, dtype = geometry(lazy)
        with self._lock:
            self.report.materialised += 1
        with torch._C.DisableTorchFunction():
            if 0 in shape:
                return torch.empty_strided(shape, stride, dtype=dtype)
            data = torch.empty(extent(shape, stride), dtype=dtype)
            lazy.source.file.read_into(place_of(lazy), [memory_of(data)])
            with self._lock:
                self.report.bytes_needed += data.numel() * dtype.itemsize
            return data.as_strided(shape, stride)

    def settle(self, tensors: Iterable[torch.Tensor]) -> None:
        """Return once no transfer into these tensors' storages is under way."""
        if self.delivery.is_idle:
            return
        with torch._C.DisableTorchFunction():
            touched = any(self.delivery.touches(tensor) for tensor in tensors)
        if touched:
            self.flush()

    def observed(self, func: Callable[..., Any], tensors: list[torch.Tensor]) -> None:
        """A loader runs something on real tensors that is no copy of a lazy one."""
        with torch._C.DisableTorchFunction():
            tensors = [tensor for tensor in tensors if not tensor.is_meta and tensor.numel()]
            if self.ledger is not None and self.ledger.touched(func, tensors):
                self.delivery.open_gate()  # it may write to them
        self.settle(tensors)

    def abort(self, reason: PlanAborted) -> PlanAborted:
        """Remember that this load cannot be finished by plan, and why; returns ``reason``."""
        self.aborted = self.aborted or reason
        return reason

    def flush(self) -> None:
        """Put everything recorded so far in place.

        Raises:
            CheckpointError: A shard could not be read.
        """
        self.delivery.flush()

    def __enter__(self) -> LoadSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.report.seconds = time.perf_counter() - self.report.started
        with ExitStack() as closing:
            for checkpoint, drop_cache in self._checkpoints:
                closing.callback(checkpoint.close, drop_cache=drop_cache)
            closing.callback(self._lent.close)
            closing.callback(self.delivery.close)  # before what it reads from is given back
            self.report.bytes_read = self._bytes_read()
            self.report.bytes_staged = sum(
                shard.file.bytes_staged for held, _ in self._checkpoints for shard in held.shards
            )

    def _bytes_read(self) -> int:
        return sum(checkpoint.bytes_read for checkpoint, _ in self._checkpoints)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """No garbage collection: planning makes objects by the ten thousand, and none in a cycle."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _is_plain(target: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether readers may write to this target's memory themselves."""
    return (
        tuple(target.shape) == shape
        and target.device.type in ("cpu", "cuda")
        and target.layout is torch.strided
        and not is_traceable_wrapper_subclass(target)
        and not (target.is_conj() or target.is_neg())
    )
