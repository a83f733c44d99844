"""What a loader does with lazy tensors: the recorder that their sources tell.

Copies become transfers, or happen at once where that is the only safe way. Whatever else is done is
noted, for it decides what can be done again without the loader.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from weightlift.loading.buffers import memory_of
from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.delivery import Delivery
from weightlift.loading.errors import CheckpointError, PlanAborted
from weightlift.loading.header import TensorEntry
from weightlift.loading.landing import DType, Landing
from weightlift.loading.lazy import LazyTensor, as_reported, data_of, geometry, place_of
from weightlift.loading.plain import can_wait, is_plain
from weightlift.loading.recording import Ledger
from weightlift.loading.report import LoadReport
from weightlift.loading.source import JoinedSource
from weightlift.loading.transfer import Transfer, extent


class Copies:
    """The recorder of one load; see :class:`~weightlift.loading.source.Recorder`.

    Attributes:
        aborted: What made this load one that cannot be planned, also if the loader swallowed it.
        is_exhausted: Whether the loader was told that there are no more tensors. Copies that it
            makes after that are put in place at once.
        thread: The one that the loader runs in; it may have others of its own.
        landing: What is read before the loader asks for it.
    """

    def __init__(
        self,
        delivery: Delivery,
        report: LoadReport,
        ledger: Ledger | None,
        *,
        all_wait: bool = False,
    ) -> None:
        self.delivery = delivery
        self.report = report
        self.ledger = ledger
        self.aborted: PlanAborted | None = None
        self.is_exhausted = False
        self.thread = 0
        self.landing = Landing(delivery)
        self._all_wait = all_wait
        self._lock = threading.RLock()

    @property
    def joins(self) -> bool:
        """Whether concatenations stay lazy; some ledgers take down copies of single tensors alone."""
        return self.ledger is None or self.ledger.joins

    def begin(self, checkpoint: Checkpoint, device: torch.device, dtype: DType, room: int) -> bool:
        """See :meth:`Landing.begin`; without a ledger alone, for what it reads goes unnoticed.

        Raises:
            PlanAborted: There are no readers, or no memory.
            CheckpointError: A shard could not be read.
        """
        assert self.ledger is None
        try:
            return self.landing.begin(checkpoint, device, dtype, room)
        except CheckpointError:
            raise
        except Exception as error:  # whatever hinders it, the engine's own load may still be had
            raise self.abort(PlanAborted(f"reading could not begin: {error!r}")) from error

    def copy(self, target: torch.Tensor, lazy: LazyTensor) -> None:
        """Fill ``target`` from the file, in the background where that is safe.

        Sources of at most one dimension are copied at once: scales, norms and state-space
        parameters, which some loaders read back (``composed_weight_loader``), are all of them.
        While nothing may be written, and where loaders are known to read none, they wait too; the
        guard sees who reads them back.
        """
        shape, stride, _, dtype = geometry(lazy)
        if target.is_meta:  # has no data; who counts what is copied sees it
            with torch._C.DisableTorchFunction():
                target.copy_(torch.empty(shape, dtype=dtype, device=target.device))
            return
        if self._is_loaders() and self.landing.is_in_place(target, lazy):
            self._count_landed(lazy)
            return
        entry = lazy.source.entry
        is_cast_twice = lazy.cast_to not in (None, target.dtype)
        is_joined = isinstance(lazy.source, JoinedSource)
        if is_joined and not is_cast_twice and self._copy_parts(target, lazy):
            return
        if (
            is_joined
            or is_cast_twice
            or not is_plain(target, shape)
            or lazy.source.realised is not None
        ):
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
                self.ledger.strangers |= not self._is_loaders()
            is_small = len(shape) < 2 and not self._must_wait()
            self.report.planned += not is_small
            self.report.bytes_needed += 0 if is_small else transfer.nbytes
        if is_small:
            self._copy_now(target, lazy)
            return
        is_there = self.landing.copy(target, lazy)
        self.report.landed += is_there
        if not is_there:
            self.delivery.add(transfer)
        if self.is_exhausted:
            self.delivery.flush()

    def _copy_parts(self, target: torch.Tensor, lazy: LazyTensor) -> bool:
        """Fill ``target`` from the parts of a joined tensor, if that is asked for as a whole."""
        source = lazy.source
        assert isinstance(source, JoinedSource)
        view = geometry(lazy)
        if source.realised is not None or target.shape != view[0] or not source.is_whole(view):
            return False
        start = 0
        for part in source.parts:
            length = part.shape[source.dimension]
            self.copy(target.narrow(source.dimension, start, length), part)
            start += length
        return True

    def land(self, lazy: LazyTensor) -> torch.Tensor:
        """A real tensor in place of a lazy one, where and of the dtype that it says; filled later."""
        landed = self.landing.take(lazy) if self._is_loaders() else None
        if landed is not None:
            self._count_landed(lazy)
            return landed
        with torch._C.DisableTorchFunction():  # no guard: this is no work of the loader's
            target = as_reported(lazy, lazy.reported_device)
            self.copy(target, lazy)
        return target

    def _count_landed(self, lazy: LazyTensor) -> None:
        with self._lock:
            self.report.planned += 1
            self.report.landed += 1
            self.report.bytes_needed += lazy.source.entry.nbytes

    def moved(self, lazy: LazyTensor) -> None:
        """A loader moves a lazy tensor."""
        if self._is_loaders():
            self.landing.moved(lazy.source)

    def empty_like(
        self, tensor: torch.Tensor, device: Any, dtype: torch.dtype | None
    ) -> torch.Tensor | None:
        """Memory for what was moved last, if it is on its way to some like it."""
        return self.landing.like(tensor, device, dtype)

    def _must_wait(self) -> bool:
        """Whether small copies of this thread wait, which they may where the guard is."""
        return (self._all_wait or self.delivery.is_gated) and self._is_loaders()

    def _is_loaders(self) -> bool:
        """Whether this is the loader's thread, where the guard is."""
        return threading.get_ident() == self.thread

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
        """The data of a lazy tensor in memory of its own, on the CPU or where its parts are."""
        shape, stride, offset, dtype = geometry(lazy)
        if isinstance(lazy.source, JoinedSource):
            parts = [data_of(part) for part in lazy.source.parts]
            with torch._C.DisableTorchFunction():
                whole = torch.cat(parts, lazy.source.dimension)
                return whole.view(-1).view(dtype).as_strided(shape, stride, offset).clone()
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
            self.delivery.flush()

    def observed(self, func: Callable[..., Any], tensors: list[torch.Tensor]) -> None:
        """A loader runs something on real tensors that is no copy of a lazy one."""
        with torch._C.DisableTorchFunction():
            tensors = [tensor for tensor in tensors if not tensor.is_meta and tensor.numel()]
            if self.ledger is not None and self.ledger.touched(func, tensors):
                self.delivery.open_gate()  # it may write to them
            self.landing.observed(tensors)
        self.settle(tensors)

    def postpone(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        """Make a loader's copy of what is still being read later, if there is room to hold that."""
        if not self.joins or self.is_exhausted or self.delivery.is_idle:
            return False
        with torch._C.DisableTorchFunction():
            is_awaited = self.delivery.touches(source) and can_wait(target, source)
            if not (is_awaited and self.delivery.has_room_for_later(source.device)):
                return False
            if self.ledger is not None:
                self.ledger.touched(torch.Tensor.copy_, (target, source))
            self.landing.observed([target, source])
            self.delivery.copy_later(target, source.detach())
        return True

    def abort(self, reason: PlanAborted) -> PlanAborted:
        """Remember that this load cannot be finished by plan, and why; returns ``reason``."""
        self.aborted = self.aborted or reason
        return reason
