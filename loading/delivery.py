"""Gets what a load records into place: plans and reader threads by device, behind one gate."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from contextlib import ExitStack

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from weightlift.loading.files import ShardFile
from weightlift.loading.placement import window_bytes
from weightlift.loading.plan import Plan, Window
from weightlift.loading.reader import ReaderPool
from weightlift.loading.report import LoadReport
from weightlift.loading.settings import Settings
from weightlift.loading.transfer import Run, Transfer


class Delivery:
    """The plans and readers of one load.

    While the gate is shut, windows are gathered and nothing is written. The first flush opens it.

    Args:
        settings: Threads and memory.
        report: Gets the number of reader threads.
        before_write: Called once, before the first byte is written; what it raises keeps the gate
            shut. Without it the gate is open from the start, and reading overlaps planning.
    """

    def __init__(
        self, settings: Settings, report: LoadReport, before_write: Callable[[], None] | None
    ) -> None:
        self._settings = settings
        self._report = report
        self._before_write = before_write
        self._shut: list[tuple[ReaderPool, Window]] | None = [] if before_write else None
        self._pools: dict[torch.device, ReaderPool] = {}
        self._plans: dict[torch.device, Plan] = {}
        self._lock = threading.RLock()
        self._process = os.getpid()

    @property
    def is_gated(self) -> bool:
        """Whether nothing may be written yet."""
        return self._shut is not None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is pending here; a forked child has no readers to wait for."""
        if os.getpid() != self._process:
            return True
        return all(plan.is_empty for plan in list(self._plans.values()))

    def add(self, transfer: Transfer) -> None:
        """Record a transfer."""
        self._plan(transfer.target.device).add(transfer)

    def add_disjoint(
        self, file: ShardFile, pieces: list[Run | Transfer], memories: Collection[torch.Tensor]
    ) -> None:
        """Record work on one file, to one device; see :meth:`Plan.add_disjoint`."""
        device = next(iter(memories)).device
        self._plan(device).add_disjoint(file, pieces, memories)

    def touches(self, tensor: torch.Tensor) -> bool:
        """Whether bytes may still be on their way into this tensor's storage."""
        if tensor.layout is not torch.strided or tensor.is_meta:
            return False
        plans = list(self._plans.values())
        if is_traceable_wrapper_subclass(tensor):  # storages of its own within
            return bool(plans)
        return any(plan.touches(tensor) for plan in plans)

    def open_gate(self) -> None:
        """Allow writing, and hand on what was gathered so far.

        Raises:
            WeightliftError: What is to be written was found wanting.
        """
        with self._lock:
            if self._shut is None:
                return
            if self._before_write is not None:
                self._before_write()
            waiting, self._shut = self._shut, None
            for pool, window in waiting:
                pool.submit(window)

    def flush(self) -> None:
        """Put everything recorded so far in place.

        Raises:
            CheckpointError: A shard could not be read.
        """
        self.open_gate()
        for device, plan in list(self._plans.items()):
            plan.flush(self._pools[device].drain)

    def close(self) -> None:
        """End the readers."""
        with ExitStack() as closing:
            for pool in self._pools.values():
                closing.callback(pool.close)

    def _plan(self, device: torch.device) -> Plan:
        with self._lock:
            if device not in self._plans:
                pool = self._pools[device] = ReaderPool(device, self._settings)
                self._report.threads += pool.threads

                def submit(window: Window) -> None:
                    if self._shut is None:
                        pool.submit(window)
                    else:
                        self._shut.append((pool, window))

                self._plans[device] = Plan(window_bytes(device), submit)
            return self._plans[device]
