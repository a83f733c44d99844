"""A window on its way: a crew is asked to read it, a writer to bring it to its targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from weightlift.loading.crew import Crew
from weightlift.loading.placement import place
from weightlift.loading.plan import Window
from weightlift.loading.transfer import Run
from weightlift.loading.writer import CopyList, Writer


class Asked(NamedTuple):
    """A window that a crew was asked for.

    Attributes:
        number: The crew's for it.
        parts: In how many it is read.
        window: The window.
        is_direct: Whether it is read past the page cache.
    """

    number: int
    parts: int
    window: Window
    is_direct: bool


def copies_alone(window: Window) -> bool:
    """Whether a window takes copies alone, which need nothing of torch."""
    return window.file.staged is None and all(isinstance(piece, Run) for piece in window.pieces)


class Submission:
    """Tells crew and writer what to do for each window; never waits for either.

    Args:
        device: Where the windows go.
        crew: Reads them.
        writer: Brings them there.
    """

    def __init__(self, device: torch.device, crew: Crew, writer: Writer) -> None:
        self._device = device
        self._crew = crew
        self._writer = writer
        self._memory = crew.ring.memory.data_ptr()

    def ask(self, window: Window) -> Asked:
        """Have a window read and brought to its targets.

        Raises:
            PlanAborted: The readers are gone.
            RuntimeError: The device cannot.
        """
        file, start, stop = window.file, window.start, window.stop
        is_direct = file.is_direct(start, stop)
        way, plain = file.way(is_direct=is_direct), file.way(is_direct=False)
        number, parts, first = self._crew.ask(way, plain, start, stop)
        self._writer.begin(window.ready)
        self._writer.await_read(number, parts)
        if not self._copy(window, self._memory + first):
            self._place(window, self._crew.ring.memory[first : first + window.span], is_whole=True)
        self._tell(window)
        self._writer.free(number)
        return Asked(number, parts, window, is_direct)

    def bring(
        self, window: Window, data: torch.Tensor, done: Callable[[], object], *, is_whole: bool
    ) -> None:
        """Bring a window that is in memory already to its targets, then call ``done``.

        Args:
            window: The window.
            data: Its bytes.
            done: Called when they are, or will be, in place.
            is_whole: Whether they are page-locked in one piece.

        Raises:
            RuntimeError: The device cannot.
        """
        self._writer.begin(window.ready)
        if not (is_whole and self._copy(window, data.data_ptr())):
            self._place(window, data, is_whole=is_whole)
        self._tell(window)
        self._writer.run(done)

    def _copy(self, window: Window, address: int) -> bool:
        """Copy a window's bytes from this address, if all of its pieces are runs."""
        copies, base = CopyList(), address - window.start
        for piece in window.pieces:
            if not isinstance(piece, Run):
                return False
            copies.add(piece.address, base + piece.offset, piece.nbytes)
        self._writer.write(copies)
        return True

    def _place(self, window: Window, data: torch.Tensor, *, is_whole: bool) -> None:
        """Cast and scatter a window's bytes on the device that they are for."""

        def work() -> None:
            if is_whole:
                place(window, self._writer.fetch(data))
            else:
                place(window, data.to(self._device, non_blocking=True))

        self._writer.run(work)

    def _tell(self, window: Window) -> None:
        """Let who waits for a window know when it is, or will be, in place."""
        if window.issued is not None:
            self._writer.tell(window.issued)
            window.issued = None
