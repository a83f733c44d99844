"""From files to a device by a crew: one thread hands out windows; readers and device do the rest."""

from __future__ import annotations

import functools
import queue
import time
from collections import deque
from typing import NamedTuple

import torch

from weightlift.loading.crew import Crew
from weightlift.loading.crew_spec import CrewSpec
from weightlift.loading.crews import crews
from weightlift.loading.errors import CheckpointError
from weightlift.loading.placement import Copies, place
from weightlift.loading.plan import Window
from weightlift.loading.reader import ReaderPool
from weightlift.loading.stage import active_stage
from weightlift.loading.transfer import Run
from weightlift.loading.worker import LINE
from weightlift.loading.writers import Writer, make_writer

_NAP = 5e-4
"""The crew has work for 5 ms then."""


class _Asked(NamedTuple):
    """A window that a crew was asked for."""

    number: int
    parts: int
    window: Window
    is_direct: bool


class CrewReaders(ReaderPool):
    """A crew that reads, and a thread that tells it and the device what to do, some windows ahead.

    Which window's bytes are there, and which slot is free again, the two tell each other, so that this
    thread need not be on time. It holds the interpreter lock for some 30 us a window; on a PCIe 5 bus
    there is one every 150.

    Args:
        device: Where the windows go: the CPU or a CUDA device.
        spec: The crew.
    """

    def __init__(self, device: torch.device, spec: CrewSpec) -> None:
        super().__init__(device, spec.readers)
        self._spec = spec
        self._asked: deque[_Asked] = deque()
        self._most_asked = spec.most_windows
        self._is_sound = True
        self._base = 0
        self._crew: Crew
        self._writer: Writer
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
                    self._give_up(error)
                self.finish(window)
            if is_ready:
                self._leave()

    def _get_ready(self) -> bool:
        try:
            self._crew = crews.take(self._spec)
            self._base = self._crew.ring.memory.data_ptr()
            try:
                self._writer = make_writer(self._device, self._crew, self._give_up)
            except BaseException:
                crews.give(self._crew)
                raise
        except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
            self.fail(error)
            return False
        return True

    def _give_up(self, error: BaseException) -> None:
        """Note why windows are not read from now on; nobody waits for the others any more."""
        self._is_sound = False
        self._crew.words.let_go()
        self.fail(error)

    def _leave(self) -> None:
        """Give the crew back, with no file open and nothing under way."""
        while self._asked:
            self._look()
            time.sleep(_NAP)
        try:
            self._writer.wait(self._let_go)
            if self._is_sound:
                self._crew.close_files()
        except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
            self._give_up(error)
        crews.give(self._crew, is_sound=self._is_sound)

    def _let_go(self) -> None:
        """Once more if there was a failure: readers may have written since."""
        if not self._is_sound:
            self._crew.words.let_go()

    def _next(self) -> Window | None:
        """The next window, or None at the end; notes meanwhile what has arrived."""
        while self._asked:
            try:
                return self._waiting.get(timeout=_NAP)
            except queue.Empty:
                self._look()
        return self._waiting.get()

    def _look(self) -> None:
        """Note what has arrived, or that nothing will."""
        try:
            if self._is_sound:
                self._note_arrivals()
                self._crew.check()
        except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
            self._give_up(error)
        while self._asked and not self._is_sound:
            self.finish(self._asked.popleft().window)

    def _note_arrivals(self) -> None:
        """Finish the windows that were fetched, in their order."""
        words = self._crew.words
        while self._asked:
            first = self._asked[0]
            line = first.number % words.slots * LINE
            if words.free[line] < first.number:
                return
            for part in range(first.parts):
                if words.short[line + part] >= first.number:
                    self._find_out_why(first)
            first.window.file.count(first.window.span, is_direct=first.is_direct)
            self._asked.popleft()
            self.finish(first.window)

    def _find_out_why(self, asked: _Asked) -> None:
        """Read again what a reader could not."""
        window, file = asked.window, asked.window.file
        file.read(window.start, window.span)
        remedy = "Load again; if that does not help, see what the kernel says of the device."
        raise CheckpointError(
            file.path,
            f"bytes {window.start} to {window.stop} could not be read once",
            remedy=remedy,
        )

    def _begin(self, window: Window) -> None:
        """Have a window read, or place it at once where its bytes are in memory already."""
        staged = window.file.staged_view(window.start, window.stop)
        if staged is not None:
            stage = active_stage()
            as_one = stage is not None and not stage.is_straddling(staged)
            self._writer.begin(window.ready)
            self._write(window, staged.data_ptr() if as_one else None, staged)
            self._writer.run(functools.partial(self.finish, self._told(window)))
            return
        while len(self._asked) >= self._most_asked:
            self._look()
            time.sleep(_NAP)
        if not self._is_sound:
            raise RuntimeError("readers have given up")
        is_direct = window.file.is_direct(window.start, window.stop)
        way, plain = window.file.way(is_direct=is_direct), window.file.way(is_direct=False)
        number, parts, position = self._crew.ask(way, plain, window.start, window.stop)
        self._writer.begin(window.ready)
        self._writer.await_read(number, parts)
        self._write(window, self._base + position, position)
        self._told(window)
        self._writer.free(number)
        self._asked.append(_Asked(number, parts, window, is_direct))

    def _write(self, window: Window, address: int | None, data: torch.Tensor | int) -> None:
        """Bring a window's bytes to its targets.

        Args:
            window: The window.
            address: Where its bytes are, if all of them can be copied from there by address.
            data: Its bytes, or where in the crew's memory they are.
        """
        copies = Copies()
        if address is not None:
            base = address - window.start
            for piece in window.pieces:
                if not isinstance(piece, Run):
                    break
                copies.add(piece.address, base + piece.offset, piece.nbytes)
        if len(copies.sizes) == len(window.pieces):
            self._writer.write(copies)
            return
        if isinstance(data, int):
            data = self._crew.ring.memory[data : data + window.span]
        self._writer.run(functools.partial(self._place, window, data))

    def _place(self, window: Window, data: torch.Tensor) -> None:
        """Cast and scatter a window's bytes on the device that they are for."""
        place(window, data.to(self._device, non_blocking=True))

    def _told(self, window: Window) -> Window:
        """The window, once who waits for it knows, or will know, that it is in place."""
        issued, window.issued = window.issued, None
        if issued is not None:
            self._writer.tell(issued)
        return window
