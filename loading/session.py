"""One load: lazy tensors out, transfers in, everything in place before the engine goes on."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from weightlift.loading.checkpoint import Checkpoint, Shard
from weightlift.loading.copies import Copies
from weightlift.loading.delivery import Delivery
from weightlift.loading.errors import PlanAborted, UnsupportedCheckpoint
from weightlift.loading.exchange import Exchange
from weightlift.loading.files import ShardFile
from weightlift.loading.guard import PendingGuard
from weightlift.loading.header import TensorEntry
from weightlift.loading.landing import DType
from weightlift.loading.lazy import CPU, LazyTensor
from weightlift.loading.lazy_functions import lazy_tensor
from weightlift.loading.leftovers import find_lazy, meta_names
from weightlift.loading.pools import Pools
from weightlift.loading.progress import Progress
from weightlift.loading.recording import Ledger
from weightlift.loading.report import LoadReport
from weightlift.loading.settings import Settings
from weightlift.loading.shared_files import locked_for
from weightlift.loading.source import Source
from weightlift.loading.stage import staged_for
from weightlift.loading.uncollected import uncollected

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
        exchange: How ranks of this host share the reading, if they may.
        pools: Readers that it shares with other loads.
        all_wait: Whether small copies wait for readers as large ones do: on a device that is busy
            with large copies each takes a millisecond at once. For loaders that read none back.
    """

    def __init__(
        self,
        settings: Settings,
        report: LoadReport,
        ledger: Ledger | None = None,
        weights: Callable[[LoadSession, Checkpoint], NamedWeights] | None = None,
        before_write: Callable[[], None] | None = None,
        exchange: Exchange | None = None,
        pools: Pools | None = None,
        *,
        all_wait: bool = False,
    ) -> None:
        self.report = report
        self.ledger = ledger
        self._settings = settings
        self._exchange = exchange
        self._weights = weights or LoadSession.lazies
        self.is_finished = False
        self.delivery = Delivery(settings, report, before_write, exchange, pools)
        self._copies = Copies(self.delivery, report, ledger, all_wait=all_wait)
        self.checkpoints: list[tuple[Checkpoint, bool]] = []  # and whether pages are dropped
        self.begun: dict[str, Shard] = {}  # by path: read, and no loader has asked for them
        self._sources: weakref.WeakSet[Source] = weakref.WeakSet()
        self._plan_started = report.started
        self._lent = ExitStack()

    @property
    def aborted(self) -> PlanAborted | None:
        """What made this load one that cannot be planned, also if the loader swallowed it."""
        return self._copies.aborted

    @property
    def is_exhausted(self) -> bool:
        """Whether the loader was told that there are no more tensors."""
        return self._copies.is_exhausted

    def abort(self, reason: PlanAborted) -> PlanAborted:
        """Remember that this load cannot be finished by plan, and why; returns ``reason``."""
        return self._copies.abort(reason)

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Within this, iterators of this thread yield lazy tensors."""
        before = active_session()
        _thread.session = self
        self._copies.thread = threading.get_ident()
        try:
            with PendingGuard(self._copies), uncollected():
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
        files = [os.path.abspath(file) for file in files]
        if files and self.begun.keys() >= set(files):  # perhaps not all of what was begun
            return Checkpoint([self.begun.pop(file) for file in files])
        try:
            checkpoint = self.hold(Checkpoint.open(files), drop_cache=drop_cache)
        except UnsupportedCheckpoint as error:
            raise self.abort(PlanAborted(str(error))) from error
        self._lent.enter_context(staged_for(checkpoint))
        if any(shard.file.staged or shard.file.locked for shard in checkpoint.shards):
            self.delivery.read_alone("its bytes are in page-locked memory already")
        return checkpoint

    def begin(self, files: list[str], device: torch.device, dtype: DType, room: int = 0) -> bool:
        """:meth:`open` these shards before a loader does, and read; see :meth:`Landing.begin`."""
        checkpoint = self.open(files)
        self.begun.update((shard.file.path, shard) for shard in checkpoint.shards)
        return self._copies.begin(checkpoint, device, dtype, room)

    def hold(self, checkpoint: Checkpoint, *, drop_cache: bool = False) -> Checkpoint:
        """Have an open checkpoint read as the settings say and closed with the session."""
        for shard in checkpoint.shards:
            shard.file.direct_io = self._settings.direct_io
        self._lent.enter_context(locked_for(checkpoint, self._settings, self.report.phase))
        if self._exchange is not None:
            self._exchange.add(checkpoint)
        self.checkpoints.append((checkpoint, drop_cache))
        return checkpoint

    def iterate(self, files: Iterable[str], *, drop_cache: bool = False) -> NamedWeights:
        """:meth:`open`, then what the loader must see of it."""
        checkpoint = self.open(files, drop_cache=drop_cache)
        self._plan_started = time.perf_counter()
        yield from self._weights(self, checkpoint)

    def lazies(
        self,
        checkpoint: Checkpoint,
        wanted: Container[str] | None = None,
        device: torch.device = CPU,
    ) -> NamedWeights:
        """The tensors of open shards, lazily: file by file as given, each sorted by name.

        That is the order of the stock iterators, and what some models rely on. With ``wanted``,
        only these; they say that they are on ``device``.
        """
        is_heard = self.report.rank == 0
        with Progress(checkpoint.nbytes, self._bytes_read, visible=is_heard) as progress:
            for shard in checkpoint.shards:
                for name in sorted(shard.tensors):
                    if wanted is None or name in wanted:
                        progress.update()
                        yield name, self._lazy(shard.tensors[name], shard.file, device)

    def _lazy(self, entry: TensorEntry, file: ShardFile, device: torch.device) -> LazyTensor:
        """A tensor of the checkpoint, lazily."""
        self.report.tensors += 1
        if self.ledger is not None:
            self.ledger.offer(entry)
        with torch._C.DisableTorchFunction():  # the guard has nothing to see
            source = Source(entry, file, self._copies, self._copies.landing.of(file, entry.name))
        self._sources.add(source)
        return lazy_tensor(source, device)

    def held_names(self) -> set[str]:
        """Tensors of which somebody still holds a lazy view: more may come of them."""
        return {source.entry.name for source in list(self._sources)}

    def guard(self, weights: Iterable[tuple[str, torch.Tensor]]) -> NamedWeights:
        """Pass the weights on; before their end is told, everything recorded is in place.

        What a loader copies after that (it may have collected them all) is copied at once.
        """
        yield from weights
        self.end()

    def end(self) -> None:
        """No more tensors come; all that was recorded is in place on return. Twice does no harm."""
        if not self.is_exhausted:
            self._copies.is_exhausted = True
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
        lazy = find_lazy(model) if len(self._sources) else ""
        if leftover := lazy or min(meta_names(model) - was_meta, default=""):
            raise self.abort(PlanAborted(f"{leftover} of the model was left without its data"))
        self.is_finished = True

    def flush(self) -> None:
        """Put everything recorded so far in place; see :meth:`Delivery.flush`."""
        self.delivery.flush()
        for checkpoint, _ in self.checkpoints:
            checkpoint.check()

    def __enter__(self) -> LoadSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.report.seconds = time.perf_counter() - self.report.started
        self._copies.landing.clear()
        for source in self._sources:
            source.landed = None  # who keeps a lazy tensor keeps no memory
        with ExitStack() as closing:
            for checkpoint, drop_cache in self.checkpoints:
                closing.callback(checkpoint.close, drop_cache=drop_cache)
            closing.callback(self._lent.close)
            is_interrupted = kind is not None and not issubclass(kind, Exception)
            closing.callback(self.delivery.close, is_interrupted=is_interrupted)
            files = [shard.file for held, _ in self.checkpoints for shard in held.shards]
            self.report.count(files)

    def _bytes_read(self) -> int:
        return sum(checkpoint.bytes_read for checkpoint, _ in self.checkpoints)
