"""Crews are kept from load to load: processes to start and memory to pin cost 80 ms."""

from __future__ import annotations

import atexit
import os
import threading
from typing import Final

from weightlift.loading.crew import Crew
from weightlift.loading.crew_spec import CrewSpec
from weightlift.loading.errors import PlanAborted

IDLE_SECONDS = 120.0
"""So long the processes of a crew wait for the next load. Its memory waits longer."""


class Crews:
    """The crew that is kept between loads, and those that are out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: Crew | None = None
        self._out: set[Crew] = set()
        self._idle = threading.Timer(IDLE_SECONDS, self.stop)

    def take(self, spec: CrewSpec) -> Crew:
        """A crew with its readers ready: the one that is kept if it is like that, or another.

        Raises:
            OSError: The host has no such memory.
        """
        with self._lock:  # a warm-up may be making the one that is wanted
            self._idle.cancel()
            crew, self._kept = self._kept, None
            try:
                if crew is not None and not (crew.spec == spec and _is_sound(crew)):
                    crew.release()
                    crew = None
                crew = crew or Crew(spec)
                self._out.add(crew)  # a child that is forked now must let go of it
                if not crew.is_started:
                    crew.start()
            except BaseException:
                if crew is not None:
                    self._out.discard(crew)
                    crew.release()
                raise
            return crew

    def has(self, spec: CrewSpec) -> bool:
        """Whether a crew like that waits for work, so that to take it costs a millisecond."""
        kept = self._kept
        return kept is not None and kept.spec == spec and kept.is_started

    def give(self, crew: Crew, *, is_sound: bool = True) -> None:
        """Give a crew back. It is kept if it is sound and the only one; threads end.

        A reader of one that is not may yet write to its memory, which nobody must use again.
        """
        with self._lock:
            self._out.discard(crew)
            if not is_sound or self._kept is not None:
                crew.release()
                return
            self._kept = crew
            if not crew.in_processes:
                crew.stop()
                return
            self._idle = threading.Timer(IDLE_SECONDS, self.stop)
            self._idle.name, self._idle.daemon = "weightlift-idle", True
            try:
                self._idle.start()
            except RuntimeError:  # too many threads: nobody would end the readers later
                crew.stop()

    def stop(self) -> None:
        """End the readers of the crew that is kept; its memory stays."""
        with self._lock:
            self._idle.cancel()
            if self._kept is not None:
                self._kept.stop()

    def release(self) -> int:
        """End the readers of the crew that is kept and free its memory; returns its bytes."""
        with self._lock:
            self._idle.cancel()
            crew, self._kept = self._kept, None
            return crew.release() if crew is not None else 0

    def forget(self) -> None:
        """In a forked child: they are the parent's."""
        self._lock = threading.Lock()
        for crew in (*self._out, *((self._kept,) if self._kept else ())):
            crew.forget()
        self._kept = None
        self._out = set()


def _is_sound(crew: Crew) -> bool:
    """Whether the readers of a crew without work answer, if it has any."""
    try:
        if crew.is_started:
            crew.close_files()
    except PlanAborted:
        return False
    return True


crews: Final = Crews()
"""Those of this process."""

os.register_at_fork(after_in_child=crews.forget)
atexit.register(crews.release)
