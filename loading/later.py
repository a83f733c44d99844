"""Copies that wait for what they copy to be read."""

from __future__ import annotations

import threading
from typing import Final

import torch

from weightlift.loading.budget import free_memory

LATER_BYTES: Final = 1 << 30
"""Copies wait until they take so much: what they copy is memory that is taken twice."""


class LaterCopies:
    """Copies between tensors, in their order, from memory that is still being filled."""

    def __init__(self) -> None:
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._storages: set[int] = set()
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def is_empty(self) -> bool:
        """Whether there are none."""
        return not self._copies

    @property
    def is_full(self) -> bool:
        """Whether they should wait no longer."""
        return self._nbytes > LATER_BYTES

    def have_room(self, device: torch.device) -> bool:
        """Whether this device may hold what copies wait for besides what it is copied to."""
        return not self.is_empty or free_memory(device) > 2 * LATER_BYTES

    def add(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """One more.

        Args:
            target: Of the shape of ``source``; of any strides and dtype, on any device.
            source: What is being filled.
        """
        with self._lock, torch._C.DisableTorchFunction():  # a guard would have them made here
            self._copies.append((target.detach(), source))
            held = source.untyped_storage()
            if held.data_ptr() not in self._storages:
                self._nbytes += held.nbytes()
            self._storages |= {held.data_ptr(), target.untyped_storage().data_ptr()}

    def touch(self, tensor: torch.Tensor) -> bool:
        """Whether one of them goes to this tensor's storage, or comes from it."""
        return tensor.untyped_storage().data_ptr() in self._storages

    def make(self) -> None:
        """Make them, now that all is filled. Sources are let go of."""
        with self._lock, torch._C.DisableTorchFunction(), torch.no_grad():
            for target, source in self._copies:
                target.copy_(source)
            for device in {source.device for _, source in self._copies if source.is_cuda}:
                torch.cuda.current_stream(device).synchronize()
            self.clear()

    def clear(self) -> None:
        """Forget them."""
        self._copies.clear()
        self._storages.clear()
        self._nbytes = 0
