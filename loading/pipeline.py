"""Rounds on their way: a ring of scratch on the device, with several of them under way at once."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Sequence
from typing import Any

import torch

from weightlift.loading.errors import CheckpointError, PlanAborted
from weightlift.loading.files import ShardFile
from weightlift.loading.group import Group
from weightlift.loading.placement import window_bytes
from weightlift.loading.plan import Window
from weightlift.loading.reader import ReaderPool
from weightlift.loading.rounds import Round
from weightlift.loading.steps import Step, Storages
from weightlift.loading.transfer import Run

_copy_each: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]


class Pipeline:
    """Takes the rounds through a ring of scratch: read, gather, place; several under way at once.

    Args:
        group: The ranks.
        pool: This rank's readers.
        ring: A row of scratch for each round under way: uint8, on the device.
        files: The shards, by number.
    """

    def __init__(
        self, group: Group, pool: ReaderPool, ring: torch.Tensor, files: Sequence[ShardFile]
    ) -> None:
        self._group = group
        self._pool = pool
        self._ring = ring
        self._files = files
        self._arrivals: list[queue.SimpleQueue[torch.Event | None]]
        self._arrivals = [queue.SimpleQueue() for _ in ring]
        self._failure: Exception | None = None
        self._copies: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        is_cuda = ring.device.type == "cuda"
        self._stream = torch.cuda.Stream(ring.device) if is_cuda else None

    def run(
        self, rounds: Sequence[Round], steps: Sequence[Sequence[Step]], storages: Storages
    ) -> None:
        """Go through these rounds.

        Args:
            rounds: The same on all ranks.
            steps: What this rank takes from each.
            storages: Where it goes.

        Raises:
            CheckpointError: A rank could not read its part.
            PlanAborted: A rank had to stop for some other reason.
        """
        self._make_copies(rounds, steps, storages)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._ring.device))
        try:
            with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
                self._go_through(rounds)
        finally:
            self._pool.wait()  # readers write to the ring, which is about to go
            if self._stream is not None:
                torch.cuda.synchronize(self._ring.device)
        self._agree_on_the_end()

    def _go_through(self, rounds: Sequence[Round]) -> None:
        ahead = len(self._ring)
        counts = [self._read(number, shared) for number, shared in enumerate(rounds[:ahead])]
        for number, shared in enumerate(rounds):
            for _ in range(counts[number]):
                self._await_arrival(number)
            self._group.all_gather(self._row(number, shared))
            self._place(number)
            if number + ahead < len(rounds):
                counts.append(self._read(number + ahead, rounds[number + ahead]))

    def _row(self, number: int, shared: Round) -> torch.Tensor:
        """The scratch of a round: equal parts of all ranks."""
        size = self._group.size
        return self._ring[number % len(self._ring), : shared.length(size) * size]

    def _read(self, number: int, shared: Round) -> int:
        """Have this rank's part of a round read into its row; returns how many arrivals follow.

        The readers wait for what this stream still does with the row.
        """
        start, stop = shared.part(self._group.rank, self._group.size)
        row = self._row(number, shared)
        file, ready = self._files[shared.shard], self._pool.work_before()
        most = window_bytes(self._ring.device)
        arrived = self._arrivals[number % len(self._ring)].put
        count = 0
        for offset in range(start, stop, most):
            run = Run(offset, min(offset + most, stop), row, offset - shared.start)
            count += self._pool.offer(Window(file, offset, run.stop, [run], ready, arrived))
        return count

    def _await_arrival(self, number: int) -> None:
        event = self._arrivals[number % len(self._ring)].get()
        if event is not None and self._stream is not None:
            self._stream.wait_event(event)

    def _make_copies(
        self, rounds: Sequence[Round], steps: Sequence[Sequence[Step]], storages: Storages
    ) -> None:
        """Make the views that are copied, before readers compete for the interpreter."""
        try:
            for number, (shared, work) in enumerate(zip(rounds, steps, strict=True)):
                row = self._row(number, shared)
                self._copies.append([(s.parameter(storages), s.elements(row)) for s in work])
        except Exception as error:  # noqa: BLE001 - told to the others at the end, who wait for it
            self._failure = error

    def _place(self, number: int) -> None:
        """Copy what this rank takes from a round to its parameters."""
        if self._failure is not None:
            return
        try:
            plain = [pair for pair in self._copies[number] if pair[0].dtype == pair[1].dtype]
            if plain:  # in one call, which takes one dtype for all if it takes a short cut
                targets, sources = zip(*plain, strict=True)
                _copy_each(list(targets), list(sources), non_blocking=True)
            for target, source in self._copies[number]:
                if target.dtype != source.dtype:
                    target.copy_(source, non_blocking=True)
        except Exception as error:  # noqa: BLE001 - told to the others at the end, who wait for it
            self._failure = error

    def _agree_on_the_end(self) -> None:
        failure = self._pool.failure or self._failure
        kind = "" if failure is None else _DAMAGED if _is_damage(failure) else _OTHER
        told = self._group.gather(kind and f"{kind}{str(failure) or repr(failure)}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(told):
            if text.startswith(_DAMAGED):
                problem = f"rank {rank} could not read its part: {text.removeprefix(_DAMAGED)}"
                raise CheckpointError("the checkpoint", problem)
            if text:  # its engine loads again by itself, and so must this one's
                raise PlanAborted(f"rank {rank} had to stop: {text.removeprefix(_OTHER)}")


_DAMAGED, _OTHER = "damaged: ", "stopped: "


def _is_damage(failure: BaseException) -> bool:
    return isinstance(failure, CheckpointError)
