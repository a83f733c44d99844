"""Crews are kept from load to load: processes to start and memory to pin cost 40 ms."""

from __future__ import annotations

import atexit
import os
import threading
from typing import Final

from weightlift.loading.crew import Crew, CrewSpec


class Crews:
    """The crew that is kept between loads, and those that are out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: Crew | None = None
        self._out: set[Crew] = set()

    def take(self, spec: CrewSpec) -> Crew:
        """A crew with its readers ready: the one that is kept if it is like that, or another.

        Raises:
            OSError: The host has no such memory.
        """
        with self._lock:  # a warm-up may be making the one that is wanted
            crew, self._kept = self._kept, None
            if crew is not None and crew.spec != spec:
                crew.release()
                crew = None
            crew = crew or Crew(spec)
            crew.start()
            self._out.add(crew)
            return crew

    def give(self, crew: Crew, *, is_sound: bool = True) -> None:
        """Give a crew back. It is kept, if it is sound and the only one; threads end."""
        with self._lock:
            self._out.discard(crew)
            if not (is_sound and crew.in_processes):
                crew.stop()
            if self._kept is None:
                self._kept = crew
            else:
                crew.release()

    def release(self) -> int:
        """End the readers of the crew that is kept and free its memory; returns its bytes."""
        with self._lock:
            crew, self._kept = self._kept, None
            return crew.release() if crew is not None else 0

    def forget(self) -> None:
        """In a forked child: they are the parent's."""
        self._lock = threading.Lock()
        for crew in (*self._out, *((self._kept,) if self._kept else ())):
            crew.forget()
        self._kept = None
        self._out = set()


crews: Final = Crews()
"""Those of this process."""

os.register_at_fork(after_in_child=crews.forget)
atexit.register(crews.release)
