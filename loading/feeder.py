"""From files to a device by a crew: who offers windows hands them out; readers and device do the rest."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque

import torch

from weightlift.loading.crew import Crew
from weightlift.loading.crew_spec import CrewSpec
from weightlift.loading.crews import crews
from weightlift.loading.errors import CheckpointError, PlanAborted
from weightlift.loading.plan import Window
from weightlift.loading.reader import ReaderPool
from weightlift.loading.stage import active_stage
from weightlift.loading.submission import Asked, Submission, copies_alone
from weightlift.loading.words import LINE, MOST_WINDOWS, NEVER
from weightlift.loading.writer import Writer
from weightlift.loading.writers import make_writer

_NAP, _SHORT_NAP = 2e-3, 5e-4
"""Of the feeder, beside an engine that plans, and while one waits. The crew has work for longer."""


class CrewReaders(ReaderPool):
    """A crew that reads, told what to do some windows ahead.

    Which window's bytes are there, and which slot is free again, crew and device tell each other, so that
    nobody has to be on time. Windows are handed out by the thread that offers them: a thread beside it
    would take as long, and the engine that plans would wait for the interpreter at each turn. A thread,
    the feeder, does it while nobody offers, and where torch has to cast or scatter, which an engine's
    thread may count or put into memory of its own; mostly it naps.

    Args:
        device: Where the windows go: the CPU or a CUDA device.
        spec: The crew.
    """

    def __init__(self, device: torch.device, spec: CrewSpec) -> None:
        super().__init__(device, spec.readers)
        self._spec = spec
        self._offered: deque[Window] = deque()
        self._asked: deque[Asked] = deque()
        self._turn = threading.Lock()  # for one thread at a time to hand out and look
        self._needed = threading.Event()
        self._nap = _NAP
        self._is_ready = self._is_ended = False
        self._is_sound = self._knows_places = True
        self._crew: Crew
        self._writer: Writer
        self._submission: Submission
        # The feeder might have to wait 5 ms for the interpreter first
        if crews.has(spec) and self._is_on_device():
            self._is_ready = self._get_ready()
        try:
            self.start(1, "feeder")
        except BaseException:
            if self._is_ready:
                self._leave()
            raise

    def hand_on(self, window: Window) -> None:
        """Ask for it at once if the crew takes more; if not, the feeder will."""
        self._offered.append(window)
        if not self._needed.is_set():
            self._needed.set()
        if self._is_ready and self._is_on_device() and not self._turn.locked():
            with self._turn:  # after ``acquire``, Ctrl-C may come before any ``try``
                self._hand_out()
            if isinstance(self._failure, KeyboardInterrupt):
                raise self._failure

    def end(self) -> None:
        """The feeder does the rest."""
        self._is_ended = True
        self._needed.set()

    def wait(self, load: object = None) -> None:
        """Return once nothing of a load is under way, whatever became of it."""
        self._nap = _SHORT_NAP
        super().wait(load)
        self._nap = _NAP

    def work(self) -> None:
        """Hand out what is left, note what has arrived, and give the crew back at the end."""
        self._is_ready = self._get_ready()
        while not self._is_ended:
            self._needed.wait()
            self._needed.clear()
            with self._turn:
                self._look()
                self._hand_out(is_feeder=True)
            if self._offered or self._asked or not self._is_sound:
                self._needed.set()
                time.sleep(self._nap)
        with self._turn:
            if self._is_ready:
                self._leave()
            self._is_ready = False
            self._drop_offered()

    def _is_on_device(self) -> bool:
        """Whether the device's functions, called on this thread, work on the device."""
        return self._device.type != "cuda" or torch._C._cuda_getDevice() == self._index

    def _get_ready(self) -> bool:
        """Have this thread work on the device, and take a crew if there is none yet; whether there is one."""
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
                # The driver's own functions need the device's context on this thread, too
                torch.cuda.current_stream(self._device).query()
            if self._is_ready:
                return True
            self._crew = crews.take(self._spec)
            try:
                self._writer = make_writer(self._device, self._crew, self._give_up)
                self._submission = Submission(self._device, self._crew, self._writer)
            except BaseException:
                crews.give(self._crew)
                raise
        except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
            self.fail(error)
            return self._is_ready
        return True

    def _give_up(self, error: BaseException) -> None:
        """Note why windows are not read from now on, and have nobody wait for them."""
        self.fail(error)  # first: who sees that nothing is under way looks for it
        self._is_sound = False
        self._let_go()

    def _leave(self) -> None:
        """Give the crew back, with no file open and nothing under way."""
        while self._asked:
            self._look()
            time.sleep(_SHORT_NAP)
        try:
            self._writer.wait(self._let_go)
            if self._is_sound:
                self._crew.close_files()
        except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
            self._give_up(error)
        crews.give(self._crew, is_sound=self._is_sound)

    def _let_go(self) -> None:
        """Again and again after a failure: readers may have written since."""
        if not self._is_sound:
            self._crew.words.let_go()

    def _look(self) -> None:
        """Note what has arrived, or that nothing will."""
        try:
            if self._is_ready and self._is_sound:
                self._note_arrivals()
                self._crew.readers.check()
        except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
            self._give_up(error)
        self._let_go()
        while self._asked and not self._is_sound:
            self.finish(self._asked.popleft().window)

    def _hand_out(self, *, is_feeder: bool = False) -> None:
        """Ask for what was offered, in order, as far as the crew takes more; torch's work is the feeder's."""
        window: Window | None = None
        try:
            with torch._C.DisableTorchFunction():  # engines' threads are watched
                while self._offered and self._takes_more():
                    if not (is_feeder or copies_alone(self._offered[0])):
                        break
                    window = self._offered.popleft()
                    if window.load in self._left:
                        self.finish(window)
                    else:
                        self._begin(window)
                    window = None
        except BaseException as error:  # noqa: BLE001 - handed to who waits for the load
            self._give_up(error)
            if window is not None and not (self._asked and self._asked[-1].window is window):
                self.finish(window)
        if self._failure is not None:
            self._drop_offered()

    def _takes_more(self) -> bool:
        if self._failure is not None or not self._is_ready:
            return False
        if len(self._asked) >= MOST_WINDOWS:
            self._note_arrivals()
        return len(self._asked) < MOST_WINDOWS

    def _drop_offered(self) -> None:
        while self._offered:
            self.finish(self._offered.popleft())

    def _note_arrivals(self) -> None:
        """Finish the windows that were fetched, in their order."""
        words = self._crew.words
        while self._asked:
            first = self._asked[0]
            line = first.number % words.slots * LINE
            free, short = words.free[line], words.short[line : line + first.parts].tolist()
            if free < first.number:
                return
            if free == NEVER or NEVER in short:
                self._crew.readers.check()
                raise PlanAborted("readers gave up")
            if first.number in short:
                self._find_out_why(first)
            first.window.file.count(first.window.span, is_direct=first.is_direct)
            self._asked.popleft()
            self.finish(first.window)

    def _find_out_why(self, asked: Asked) -> None:
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
        """Have a window read, or brought to its targets where its bytes are in memory already."""
        file, done = window.file, functools.partial(self.finish, window)
        staged, stage = file.staged_view(window.start, window.stop), active_stage()
        if staged is not None:
            self._knows_places = False
            is_whole = stage is not None and not stage.is_straddling(staged)
            self._submission.bring(window, staged, done, is_whole=is_whole)
            return
        locked = file.locked_view(window.start, window.stop) if self._spec.pinned else None
        if locked is not None:
            self._knows_places = False
            self._submission.bring(window, locked, done, is_whole=True)
        else:
            self._asked.append(self._submission.ask(window))
