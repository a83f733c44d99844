"""From a crew's shared memory to the device: one thread hands out chunks and passes on what came."""

from __future__ import annotations

import queue
from collections import deque

import torch

from weightlift.loading.buffers import memory_at
from weightlift.loading.chunks import Chunk, Journey, chunks_of
from weightlift.loading.crew import Crew
from weightlift.loading.crew_spec import CrewSpec
from weightlift.loading.crews import crews
from weightlift.loading.placement import Copies, DeviceWriter, make_writer, place
from weightlift.loading.plan import Window
from weightlift.loading.reader import ReaderPool
from weightlift.loading.stage import active_stage
from weightlift.loading.transfer import Run


class CrewReaders(ReaderPool):
    """A crew that reads, and a thread that passes on what it read.

    That thread alone talks to the device. It holds the interpreter lock for some 20 us a chunk, of
    which PCIe 5 takes one every 75 us.

    Args:
        device: Where the windows go: the CPU or a CUDA device.
        spec: The crew.
    """

    def __init__(self, device: torch.device, spec: CrewSpec) -> None:
        super().__init__(device, spec.readers)
        self._spec = spec
        self._free: deque[int] = deque()
        self._reading: dict[int, Chunk] = {}
        self._written: deque[tuple[torch.Event, list[int]]] = deque()
        self._is_sound = True
        self._crew: Crew
        self._writer: DeviceWriter
        self.start(1, "feeder")

    def work(self) -> None:
        """Take windows until there comes None."""
        with torch.inference_mode():
            is_ready = self._get_ready()
            while (window := self._next()) is not None:
                try:
                    if self._failure is None:
                        self._begin(window)
                        continue
                except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
                    self.fail(error)
                self.finish(window)
            if is_ready:
                self._leave()

    def _get_ready(self) -> bool:
        try:
            self._writer = make_writer(self._device)
            self._crew = crews.take(self._spec)
        except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
            self.fail(error)
            return False
        self._free.extend(range(self._spec.slots))
        return True

    def _leave(self) -> None:
        """Give the crew back, with no file open and nothing under way."""
        while self._reading:
            self._collect()
        try:
            self._writer.wait()
            if self._is_sound:
                self._crew.close_files()
        except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
            self.fail(error)
            self._is_sound = False
        crews.give(self._crew, is_sound=self._is_sound)

    def _next(self) -> Window | None:
        """The next window, or None at the end; waits for chunks rather than for windows."""
        while self._reading:
            try:
                return self._waiting.get_nowait()
            except queue.Empty:
                self._collect()
        return self._waiting.get()

    def _begin(self, window: Window) -> None:
        """Have a window read, or place it at once where its bytes are in memory already."""
        runs = [piece for piece in window.pieces if isinstance(piece, Run)]
        as_it_is = len(runs) == len(window.pieces)
        staged = window.file.staged_view(window.start, window.stop)
        if staged is not None:
            self._place_staged(window, staged, runs if as_it_is else [])
            return
        scratch = None if as_it_is else self._writer.scratch(window.span)
        if scratch is not None:
            runs = [Run(window.start, window.stop, scratch, 0)]
        is_direct = window.file.is_direct(window.start, window.stop)
        journey = Journey(window, window.file.way(is_direct=is_direct), scratch)
        chunks = list(chunks_of(journey, runs, self._spec.chunk_bytes))
        journey.to_come = len(chunks)
        for chunk in chunks:
            self._ask(chunk)

    def _place_staged(self, window: Window, staged: torch.Tensor, runs: list[Run]) -> None:
        stage = active_stage()
        self._wait_for_targets(window)
        if runs and stage is not None and not stage.is_straddling(staged):
            copies, base = Copies(), staged.data_ptr() - window.start
            for run in runs:
                copies.add(run.address, base + run.offset, run.nbytes)
            self._writer.write(copies)
        else:
            place(window, self._writer.scratch(window.span).copy_(staged, non_blocking=True))
        self.finish(window, self._writer.event())

    def _ask(self, chunk: Chunk) -> None:
        """Have a chunk read as soon as a slot is free."""
        try:
            slot = self._take_slot() if self._failure is None else -1
            if self._failure is None:
                self._crew.ask(slot, chunk.journey.way, chunk.first, chunk.length)
                self._reading[slot] = chunk
                return
        except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
            self.fail(error)
        self._end(chunk)

    def _take_slot(self) -> int:
        """A free slot; any number if there is a failure, after which none is needed."""
        while not self._free and self._failure is None:
            if self._reading:
                self._collect()
            else:
                self._written[0][0].synchronize()
                self._reclaim()
        return self._free.popleft() if self._free else -1

    def _collect(self) -> None:
        """Pass on the chunks that were read; waits until there are some."""
        try:
            answers = self._crew.answers()
        except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
            self.fail(error)
            self._is_sound = False
            answers = [(slot, 0) for slot in self._reading]  # nobody reads them any more
        done = [self._reading.pop(slot) for slot, _ in answers]
        try:
            if self._failure is None:
                self._pass_on(answers, done)
                self._hand_back([slot for slot, _ in answers])
        except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
            self.fail(error)
        for chunk in done:
            self._end(chunk)

    def _hand_back(self, slots: list[int]) -> None:
        """These slots are free once what was written from them is."""
        event = self._writer.event()
        if event is None:
            self._free.extend(slots)
        else:
            self._written.append((event, slots))
            self._reclaim()

    def _reclaim(self) -> None:
        while self._written and self._written[0][0].query():
            self._free.extend(self._written.popleft()[1])

    def _pass_on(self, answers: list[tuple[int, int]], chunks: list[Chunk]) -> None:
        """Write chunks from their slots to where they go, in one call."""
        copies = Copies()
        for (slot, got), chunk in zip(answers, chunks, strict=True):
            chunk.journey.got += got
            if got < chunk.stop - chunk.first:
                self._read_rest(chunk, slot, got)
            self._wait_for_targets(chunk.journey.window)
            base = self._crew.addresses[slot] - chunk.first
            for zero, start, stop in chunk.parts:
                copies.add(zero + start, base + start, stop - start)
        self._writer.write(copies)

    def _read_rest(self, chunk: Chunk, slot: int, got: int) -> None:
        """Read what the reader could not, or find out why."""
        file = chunk.journey.window.file
        if chunk.journey.way.alignment > 1:
            file.direct_io = "off"
        here = max(chunk.start, chunk.first + got)
        place = self._crew.addresses[slot] + here - chunk.first
        file.read_into(here, [memory_at(place, chunk.stop - here)])

    def _wait_for_targets(self, window: Window) -> None:
        if window.ready is not None:
            self._writer.wait_for(window.ready)

    def _end(self, chunk: Chunk) -> None:
        """A chunk is written, or never will be."""
        journey = chunk.journey
        journey.to_come -= 1
        if journey.to_come:
            return
        window, event = journey.window, None
        window.file.count(journey.got, is_direct=journey.way.alignment > 1)
        try:
            if self._failure is None:
                if journey.scratch is not None:
                    place(window, journey.scratch)
                event = self._writer.event() if window.issued else None
        except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
            self.fail(error)
        self.finish(window, event)
