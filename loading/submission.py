"""A window on its way: a crew is asked to read it, a writer to bring it to its targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from weightlift.loading.crew import Crew
from weightlift.loading.placement import place
from weightlift.loading.plan import Window
from weightlift.loading.stage import active_stage
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
        crew: Reads them.
        writer: Brings them there.
    """

    def __init__(self, crew: Crew, writer: Writer) -> None:
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
            self._place(window, self._crew.ring.memory[first : first + window.span])
        self._tell(window)
        self._writer.free(number)
        return Asked(number, parts, window, is_direct)

    def bring(self, window: Window, data: torch.Tensor, done: Callable[[], object]) -> None:
        """Bring a window that is in memory already to its targets, then call ``done``.

        Raises:
            RuntimeError: The device cannot.
        """
        stage = active_stage()
        self._writer.begin(window.ready)
        is_one_piece = stage is not None and not stage.is_straddling(data)
        if not (is_one_piece and self._copy(window, data.data_ptr())):
            self._place(window, data)
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

    def _place(self, window: Window, data: torch.Tensor) -> None:
        """Cast and scatter a window's bytes on the device that they are for."""
        self._writer.run(lambda: place(window, self._writer.fetch(data)))

    def _tell(self, window: Window) -> None:
        """Let who waits for a window know when it is, or will be, in place."""
        if window.issued is not None:
            self._writer.tell(window.issued)
            window.issued = None
