"""Which readers a load gets, how many, and what may be made ready for it."""

from __future__ import annotations

import threading

import torch

from weightlift.loading import crew
from weightlift.loading.budget import reader_count, staging_limit
from weightlift.loading.crews import crews
from weightlift.loading.feeder import CrewReaders
from weightlift.loading.placement import HOST_WINDOW_BYTES
from weightlift.loading.reader import HostReaders, ReaderPool
from weightlift.loading.settings import MIB, Settings


def open_readers(device: torch.device, settings: Settings) -> ReaderPool:
    """Readers for one load to this device."""
    count = affordable_readers(device, settings)
    if device.type == "cpu" and settings.readers != "processes":
        return HostReaders(device, count)
    return CrewReaders(device, count, in_processes=settings.readers != "threads")


def affordable_readers(device: torch.device, settings: Settings) -> int:
    """Readers for this device, within the staging memory and what the host allows."""
    memory = settings.staging_mib * MIB
    if "staging_mib" not in settings.asked:
        memory = min(memory, staging_limit() or memory)
    readers = settings.num_load_threads or reader_count()
    return max(1, min(readers, memory // staging_bytes(device)))


def staging_bytes(device: torch.device) -> int:
    """Host memory that one reader for this device takes."""
    if device.type == "cpu":
        return HOST_WINDOW_BYTES
    return crew.SLOTS_A_READER * crew.slot_bytes()


def warm_up(device: torch.device, settings: Settings) -> None:
    """Begin to make ready what a load to this device will need, while there is no load yet.

    To start twelve readers and pin their memory takes 40 ms; an engine takes longer to construct a
    model.
    """
    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index

    def make() -> None:
        torch.cuda.set_device(index)
        in_processes = settings.readers != "threads"
        count = affordable_readers(device, settings)
        crews.give(crews.take(count, pinned=True, in_processes=in_processes))

    threading.Thread(target=make, name="weightlift-warm-up", daemon=True).start()
