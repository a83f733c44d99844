"""Gets what a load records into place: plans and reader threads by device, behind one gate."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Collection
from contextlib import ExitStack

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from weightlift.loading.exchange import Exchange
from weightlift.loading.files import ShardFile
from weightlift.loading.later import LaterCopies
from weightlift.loading.placement import window_bytes
from weightlift.loading.plan import Plan, Window
from weightlift.loading.pools import Pools
from weightlift.loading.reader import ReaderPool
from weightlift.loading.readers import open_readers
from weightlift.loading.report import LoadReport
from weightlift.loading.settings import Settings
from weightlift.loading.shared_plan import SharedPlan
from weightlift.loading.steps import Storages
from weightlift.loading.transfer import Run, Transfer


class Delivery:
    """The plans and readers of one load.

    While the gate is shut, windows are gathered and nothing is written. The first flush opens it.
    With an exchange, windows are gathered until the first flush, for the ranks share all or none.

    Args:
        settings: Threads and memory.
        report: Gets the number of reader threads.
        before_write: Called once, before the first byte is written; what it raises keeps the gate
            shut. Without it the gate is open from the start, and reading overlaps planning.
        exchange: How ranks of this host share the reading, if they may.
        pools: Readers that it shares with other loads, and that outlast it; without an exchange.
    """

    def __init__(
        self,
        settings: Settings,
        report: LoadReport,
        before_write: Callable[[], None] | None = None,
        exchange: Exchange | None = None,
        pools: Pools | None = None,
    ) -> None:
        self._settings = settings
        self._shared = pools
        self._load = None if pools is None else self
        self._report = report
        self._before_write = before_write
        self._exchange = exchange
        self._held: list[tuple[torch.device, Window]] = []
        self._deferred: list[Callable[[], object]] = []
        self._deferred_storages: Storages = {}
        self._later = LaterCopies()
        self._pools: dict[torch.device, ReaderPool] = {}
        self._plans: dict[torch.device, Plan] = {}
        self._lock = threading.RLock()
        self._process = os.getpid()

    @property
    def is_gated(self) -> bool:
        """Whether nothing may be written yet."""
        return self._before_write is not None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is pending here; a forked child has no readers to wait for."""
        if os.getpid() != self._process:
            return True
        if self._deferred or not self._later.is_empty:
            return False
        return all(plan.is_empty for plan in list(self._plans.values()))

    def add(self, transfer: Transfer) -> None:
        """Record a transfer."""
        if self._later.touch(transfer.target):
            self.flush()
        self._plan(transfer.target.device).add(transfer)

    def add_disjoint(
        self, file: ShardFile, pieces: list[Run | Transfer], memories: Collection[torch.Tensor]
    ) -> None:
        """Record work on one file, to one device; see :meth:`Plan.add_disjoint`."""
        device = next(iter(memories)).device
        self._plan(device).add_disjoint(file, pieces, memories)

    def copy_later(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Record a copy from what transfers before it fill; see :meth:`LaterCopies.add`."""
        self._later.add(target, source)
        if self._later.is_full:
            self.flush()

    def has_room_for_later(self, device: torch.device) -> bool:
        """See :meth:`LaterCopies.have_room`."""
        return self._later.have_room(device)

    def touches(self, tensor: torch.Tensor) -> bool:
        """Whether bytes may still be on their way into this tensor's storage."""
        if tensor.layout is not torch.strided or tensor.is_meta:
            return False
        plans = list(self._plans.values())
        if is_traceable_wrapper_subclass(tensor):  # storages of its own within
            return bool(plans or self._deferred)
        if tensor.untyped_storage().data_ptr() in self._deferred_storages:
            return True
        if self._later.touch(tensor):
            return True
        return any(plan.touches(tensor) for plan in plans)

    def defer(
        self, work: Callable[[], object], plan: SharedPlan | None, storages: Storages
    ) -> None:
        """Record the work that this does, unless the ranks can do it by a plan that they shared.

        Args:
            work: Records it.
            plan: How the ranks shared the same work before, if they did.
            storages: What it writes to.
        """
        if self._exchange is None or plan is None:
            work()
            return
        self._exchange.plan, self._exchange.storages = plan, storages
        self._deferred.append(work)
        self._deferred_storages = storages

    def read_alone(self, reason: str) -> None:
        """Share nothing with other ranks in this load, and hand on what was gathered for it."""
        with self._lock:
            if self._exchange is None:
                return
            if self.is_gated:  # the ranks vote first, and ask each other then
                self._exchange.refuse(reason)
                return
            self._exchange.decline(reason)
            self._do_deferred()
            self._exchange = None
            self._release()

    def read_while_planning(self) -> None:
        """Planning takes longer than reading: share nothing, unless reading has to wait anyway."""
        if self._exchange is not None and not (self.is_gated or self._exchange.is_forced):
            self.read_alone("planning takes longer than reading")

    def hand_on(self) -> None:
        """Hand on what was recorded so far: the next transfers begin other windows."""
        for plan in list(self._plans.values()):
            plan.close_window()

    def open_gate(self) -> None:
        """Allow writing, and hand on what was gathered so far, unless it is to be shared.

        Raises:
            WeightliftError: What is to be written was found wanting.
        """
        with self._lock:
            if self._before_write is not None:
                self._before_write()
                self._before_write = None
                if self._exchange is None:
                    self._release()

    def flush(self) -> None:
        """Put everything recorded so far in place.

        Raises:
            CheckpointError: A shard could not be read.
        """
        self.open_gate()
        with self._lock:
            if self._exchange is not None:
                self._share(self._exchange)
        for device, plan in list(self._plans.items()):
            plan.flush(functools.partial(self._pools[device].drain, self._load))
        self._later.make()

    def _share(self, exchange: Exchange) -> None:
        """Do what was gathered together with the other ranks, once; the rest alone."""
        alone = exchange.share(self._pool(exchange.device), lambda: self._work(exchange.device))
        self._exchange = None
        self._deferred.clear()
        self._deferred_storages = {}
        self._held += [(exchange.device, window) for window in alone]
        self._release()
        self._pools[exchange.device].drain()

    def _work(self, device: torch.device) -> list[Window]:
        """All that was recorded for a device; it is held no more."""
        self._do_deferred()
        for plan in list(self._plans.values()):
            plan.close_window()
        work = [window for where, window in self._held if where == device]
        self._held = [held for held in self._held if held[0] != device]
        return work

    def _do_deferred(self) -> None:
        deferred, self._deferred, self._deferred_storages = self._deferred, [], {}
        for work in deferred:
            work()

    def _release(self) -> None:
        held, self._held = self._held, []
        for device, window in held:
            self._pool(device).submit(window, self._load)

    def _submit(self, device: torch.device, window: Window) -> None:
        if self.is_gated or self._exchange is not None:
            self._held.append((device, window))
        else:
            self._pool(device).submit(window, self._load)

    def close(self, *, is_interrupted: bool = False) -> None:
        """End the readers or, if they are shared, what they do for this load; then hold nothing.

        Args:
            is_interrupted: Whether by Ctrl-C, which may come where what is under way is counted.
        """
        with ExitStack() as closing:
            for held in (self._plans, self._held, self._later, self._deferred):
                closing.callback(held.clear)
            for pool in self._pools.values():
                is_over = self._shared is None or is_interrupted or pool.failure is not None
                # After a failure writers may be at work on windows that count as finished
                closing.callback(pool.close if is_over else functools.partial(pool.leave, self))

    def _pool(self, device: torch.device) -> ReaderPool:
        with self._lock:
            if device not in self._pools:
                shared = self._shared
                pool = shared.of(device) if shared else open_readers(device, self._settings)
                self._pools[device] = pool
                self._report.threads += pool.readers
            return self._pools[device]

    def _plan(self, device: torch.device) -> Plan:
        with self._lock:
            if device not in self._plans:
                self._pool(device)
                submit = functools.partial(self._submit, device)
                self._plans[device] = Plan(window_bytes(device), submit)
            return self._plans[device]
