"""Models that leave the device and come back: sleep and wake-up.

Weights go to host memory that is kept from one sleep to the next, so that it is page-locked once, and
only what changed since is copied again. What changed is seen by digests of the content: whoever wrote,
an update, a LoRA or a kernel, need not tell.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Final

import torch

from weightlift.loading.budget import available_memory, ranks_here, reader_count
from weightlift.loading.digests import Digests, changed
from weightlift.loading.errors import WeightliftError
from weightlift.loading.host_blocks import HostBlocks
from weightlift.loading.report import human
from weightlift.loading.storages import Placed, Storage, lay, storages_of

logger = logging.getLogger("weightlift")

sleepers: Final[weakref.WeakSet[Sleeper]] = weakref.WeakSet()
"""All of this process."""


@dataclass(frozen=True)
class Moved:
    """What a sleep or a wake-up did.

    Attributes:
        nbytes: Bytes that left the device or came back.
        copied: Those of them that were copied.
        seconds: What that took.
    """

    nbytes: int = 0
    copied: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = human(self.copied / max(self.seconds, 1e-9))
        return (
            f"{human(self.nbytes)} of weights in {self.seconds:.3f} s, "
            f"{human(self.copied)} copied ({rate}/s)"
        )


@dataclass(slots=True)
class _HostCopy:
    """What a storage held, and its digests, on either side."""

    memory: torch.Tensor
    digests: torch.Tensor


@dataclass(slots=True)
class _Asleep:
    tensors: list[Placed]
    device: torch.device
    copy: _HostCopy

    def still_there(self) -> list[Placed]:
        """Its tensors, but for those that were given other memory since."""
        memory = self.copy.memory.untyped_storage().data_ptr()
        return [
            placed for placed in self.tensors if placed[0].untyped_storage().data_ptr() == memory
        ]


class Sleeper:
    """Moves the weights and buffers of models to the host and back, all of them or none.

    They stay the same tensor objects, tied ones stay tied, strides stay.

    Args:
        device_type: Of the devices that are left; what is elsewhere stays there.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        self._device_type = device_type
        self._digests = Digests()
        self._blocks: HostBlocks | None = None
        self._copies: dict[tuple[str, int], _HostCopy] = {}
        self._asleep: list[_Asleep] = []
        sleepers.add(self)

    @property
    def is_asleep(self) -> bool:
        """Whether weights are on the host until :meth:`wake_up`."""
        return bool(self._asleep)

    def sleep(self, models: Mapping[str, torch.nn.Module]) -> Moved:
        """Move the weights of models, by any name, to the host; nothing happens if they are there.

        Their device memory goes back to torch, which keeps it until ``torch.cuda.empty_cache``.

        Raises:
            WeightliftError: The host has not that much memory; nothing was moved.
            OSError: No thread can be started to make it ready; nothing was moved.
        """
        started = time.perf_counter()
        storages = [] if self._asleep else storages_of(models, self._device_type)
        if not storages:
            return Moved()
        with torch.inference_mode(mode=False), torch.no_grad():
            try:
                copied = self._copy_to_host(storages)
            except BaseException:
                _wait_for(storage.memory.device for storage in storages)
                self.release()
                raise
            finally:
                self._digests.free()
            for storage, copy in zip(storages, self._copies.values(), strict=True):
                lay(storage.tensors, copy.memory)
                self._asleep.append(_Asleep(storage.tensors, storage.memory.device, copy))
        moved = Moved(self._nbytes, copied, time.perf_counter() - started)
        logger.info("weightlift: asleep: %s", moved)
        return moved

    def wake_up(self) -> Moved:
        """Move back what :meth:`sleep` moved; nothing happens if nothing is asleep.

        Raises:
            WeightliftError: The device has not that much memory; all of it is still asleep.
        """
        if not self._asleep:
            return Moved()
        started = time.perf_counter()
        with torch.inference_mode(mode=False), torch.no_grad():
            try:
                memories, digests = self._copy_from_host()
            except torch.cuda.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                raise WeightliftError(
                    f"waking up needs {human(self._nbytes)} of device memory, which is not free; all "
                    "weights are still on the host. Free device memory, then wake up again"
                ) from error
            finally:
                self._digests.free()
            for away, memory, found in zip(self._asleep, memories, digests, strict=True):
                lay(away.still_there(), memory)
                away.copy.digests = found
            _wait_for(memory.device for memory in memories)
        self._asleep = []
        moved = Moved(self._nbytes, self._nbytes, time.perf_counter() - started)
        logger.info("weightlift: awake: %s", moved)
        return moved

    def release(self) -> int:
        """Free the host memory, unless weights are in it; returns its bytes."""
        if self._asleep:
            return 0
        self._copies = {}
        blocks, self._blocks = self._blocks, None
        return blocks.release() if blocks else 0

    @property
    def _nbytes(self) -> int:
        return sum(copy.memory.numel() for copy in self._copies.values())

    def _copy_to_host(self, storages: list[Storage]) -> int:
        """Bring the host's copies up to date; the bytes that this took."""
        now = self._digests_of(storages)
        keys = [(storage.name, storage.memory.numel()) for storage in storages]
        is_known = keys == list(self._copies)
        copied = (self._copy_changed if is_known else self._copy_all)(storages, now)
        _wait_for(storage.memory.device for storage in storages)
        return copied

    def _digests_of(self, storages: list[Storage]) -> list[torch.Tensor]:
        """Digests of what is on devices, which takes some memory there."""
        try:
            return [self._digests.of(storage.memory) for storage in storages]
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
        return [self._digests.of(storage.memory) for storage in storages]

    def _copy_changed(self, storages: list[Storage], now: list[torch.Tensor]) -> int:
        copied = 0
        for storage, copy, found in zip(storages, self._copies.values(), now, strict=True):
            digests = found.cpu()
            for part in changed(copy.digests.cpu(), digests):
                copy.memory[part].copy_(storage.memory[part], non_blocking=True)
                copied += copy.memory[part].numel()
            copy.digests = digests
        return copied

    def _copy_all(self, storages: list[Storage], now: list[torch.Tensor]) -> int:
        with closing(self._new_blocks(storages).pieces()) as pieces:
            for storage, piece, found in zip(storages, pieces, now, strict=True):
                piece.copy_(storage.memory, non_blocking=True)
                self._copies[storage.name, piece.numel()] = _HostCopy(piece, found)
        for copy in self._copies.values():
            copy.digests = copy.digests.cpu()
        return self._nbytes

    def _new_blocks(self, storages: list[Storage]) -> HostBlocks:
        """Host memory for these, in place of what there was."""
        self.release()
        sizes = [storage.memory.numel() for storage in storages]
        needed, free = sum(sizes), available_memory() // ranks_here()
        if needed > free:
            raise WeightliftError(
                f"sleeping needs {human(needed)} of host memory for each rank, and there are "
                f"{human(free)}; all weights are still on the device. Free memory of the host, raise "
                "the container's limit, or restart the server instead"
            )
        device = storages[0].memory.device
        self._blocks = HostBlocks(sizes, device, reader_count(), pageable=True)
        return self._blocks

    def _copy_from_host(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Device memory with what is asleep, and its digests, computed while the next is copied."""
        beside = {away.device: _stream_of(away.device) for away in self._asleep}
        memories: list[torch.Tensor] = []
        digests = []
        try:
            for away in self._asleep:
                host, stream = away.copy.memory, beside[away.device]
                memories.append(torch.empty(host.numel(), dtype=host.dtype, device=away.device))
                memories[-1].copy_(host, non_blocking=True)
                if stream is not None:
                    stream.wait_stream(torch.cuda.current_stream(away.device))
                with torch.cuda.stream(stream):
                    digests.append(self._digests.of(memories[-1]))
        except BaseException:
            _wait_for(beside)
            memories.clear()
            raise
        return memories, digests


def _stream_of(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _wait_for(devices: Iterable[torch.device]) -> None:
    for device in {device for device in devices if device.type == "cuda"}:
        torch.cuda.synchronize(device)
