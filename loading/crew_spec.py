"""What a crew is to be like."""

from __future__ import annotations

from dataclasses import dataclass

from weightlift.loading.residency import PAGE

SLOTS_A_READER = 2
"""One that is read, and one on its way to the device. Three brought nothing, and cost 20 ms more to pin."""


@dataclass(frozen=True)
class CrewSpec:
    """What a crew is to be like.

    Attributes:
        readers: How many.
        chunk_bytes: The most that one job reads.
        pinned: Whether their memory is page-locked, for CUDA.
        in_processes: Whether they are processes, where these can be started; threads otherwise.
    """

    readers: int
    chunk_bytes: int
    pinned: bool = False
    in_processes: bool = True

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: a chunk, from the page on that it begins in."""
        return self.chunk_bytes + 2 * PAGE

    @property
    def slots(self) -> int:
        """How many slots there are. Slot ``s`` is for reader ``s % readers``."""
        return self.readers * SLOTS_A_READER
