"""Which readers a load gets, how many, and what may be made ready for it."""

from __future__ import annotations

import logging

import torch

from weightlift.loading.budget import ranks_here, reader_count, staging_limit
from weightlift.loading.crew_spec import CrewSpec
from weightlift.loading.crews import crews
from weightlift.loading.feeder import CrewReaders
from weightlift.loading.placement import HOST_WINDOW_BYTES, window_bytes
from weightlift.loading.reader import HostReaders, ReaderPool
from weightlift.loading.settings import MIB, Settings
from weightlift.loading.threads import start_thread

logger = logging.getLogger("weightlift")

FEWEST_SLOTS = 3
"""One that is read, one that the device fetches, and one to come."""

UNDER_WAY_BYTES = 8 * MIB
"""For each reader of a rank that is alone on its host: twelve have 96 MiB. Where ranks share the host
each has half of that, so that the bytes of all are still in the processor's cache when the device
fetches them."""


def open_readers(device: torch.device, settings: Settings) -> ReaderPool:
    """Readers for one load to this device."""
    if device.type == "cpu" and settings.readers != "processes":
        return HostReaders(device, affordable_readers(settings, HOST_WINDOW_BYTES))
    return CrewReaders(device, crew_for(device, settings))


def crew_for(device: torch.device, settings: Settings) -> CrewSpec:
    """The crew for loads to this device; several readers work on a window."""
    window = window_bytes(device)
    each = UNDER_WAY_BYTES if ranks_here() == 1 else UNDER_WAY_BYTES // 2
    readers = affordable_readers(settings, each)
    slots = max(FEWEST_SLOTS, readers * each // window)
    return CrewSpec(
        readers,
        max(1, min(slots, _staging_bytes(settings) // window)),
        window,
        pinned=device.type == "cuda",
        in_processes=settings.readers != "threads",
    )


def affordable_readers(settings: Settings, bytes_each: int) -> int:
    """Readers that take so much staging memory each, within that and what the host allows."""
    readers = settings.num_load_threads or reader_count()
    return max(1, min(readers, _staging_bytes(settings) // bytes_each))


def _staging_bytes(settings: Settings) -> int:
    memory = settings.staging_mib * MIB
    return memory if "staging_mib" in settings.asked else min(memory, staging_limit() or memory)


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

    try:
        start_thread(make, "warm-up")
    except OSError as error:  # the load may find room
        logger.debug("weightlift: nothing is made ready before the load: %s", error)
