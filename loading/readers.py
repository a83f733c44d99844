"""Which readers a load gets, how many, and what may be made ready for it."""

from __future__ import annotations

import threading

import torch

from weightlift.loading.budget import ranks_here, reader_count, staging_limit
from weightlift.loading.crew_spec import SLOTS_A_READER, CrewSpec
from weightlift.loading.crews import crews
from weightlift.loading.feeder import CrewReaders
from weightlift.loading.placement import HOST_WINDOW_BYTES
from weightlift.loading.reader import HostReaders, ReaderPool
from weightlift.loading.settings import MIB, Settings

ALONE_CHUNK_BYTES = 4 * MIB
SHARED_CHUNK_BYTES = 2 * MIB
"""What one job of a crew reads. Twelve readers with two slots each then have 96 MiB under way, or 48
for each of several ranks, which fits the processor's last cache: on an H100 host (300 MiB) they read
55 GB/s with 2 MiB, 45 with 4 and 36 with 8. To the device, which takes 47, 4 MiB are as good as 2, and
half the Python; with 1 MiB one thread cannot hand out the jobs."""


def open_readers(device: torch.device, settings: Settings) -> ReaderPool:
    """Readers for one load to this device."""
    if device.type == "cpu" and settings.readers != "processes":
        return HostReaders(device, affordable_readers(settings, HOST_WINDOW_BYTES))
    return CrewReaders(device, crew_for(device, settings))


def crew_for(device: torch.device, settings: Settings) -> CrewSpec:
    """The crew for loads to this device."""
    chunk = ALONE_CHUNK_BYTES if ranks_here() == 1 else SHARED_CHUNK_BYTES
    return CrewSpec(
        affordable_readers(settings, SLOTS_A_READER * chunk),
        chunk,
        pinned=device.type == "cuda",
        in_processes=settings.readers != "threads",
    )


def affordable_readers(settings: Settings, bytes_each: int) -> int:
    """Readers that take so much staging memory each, within that and what the host allows."""
    memory = settings.staging_mib * MIB
    if "staging_mib" not in settings.asked:
        memory = min(memory, staging_limit() or memory)
    readers = settings.num_load_threads or reader_count()
    return max(1, min(readers, memory // bytes_each))


def warm_up(device: torch.device, settings: Settings) -> None:
    """Begin to make ready what a load to this device will need, while there is no load yet.

    To start twelve readers and pin their memory takes 80 ms; an engine takes longer to construct a
    model.
    """
    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index

    def make() -> None:
        torch.cuda.set_device(index)
        crews.give(crews.take(crew_for(device, settings)))

    threading.Thread(target=make, name="weightlift-warm-up", daemon=True).start()
