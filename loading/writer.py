"""What brings the bytes of windows to their targets: copies, and torch's work, in an order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

Issued = Callable[[torch.Event | None], None]


@dataclass
class CopyList:
    """Copies from host memory, by address and in bytes.

    Attributes:
        targets: Where to.
        sources: Where from.
        sizes: How many bytes.
    """

    targets: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, target: int, source: int, size: int) -> None:
        """One more."""
        self.targets.append(target)
        self.sources.append(source)
        self.sizes.append(size)


class Writer(Protocol):
    """Brings windows to one device, in order, for one thread."""

    def begin(self, ready: torch.Event | None) -> None:
        """A window begins: what is written for it comes after this."""

    def await_read(self, window: int, parts: int) -> None:
        """What is written from now on comes after the crew has read these parts of a window."""

    def write(self, copies: CopyList) -> None:
        """Make these copies."""

    def run(self, work: Callable[[], object]) -> None:
        """Have torch do this after them, on the same stream."""

    def fetch(self, data: torch.Tensor) -> torch.Tensor:
        """Within :meth:`run`: these bytes of the host on the device."""
        ...

    def free(self, window: int) -> None:
        """Tell the crew, after all that, that the slot of this window may be filled again."""

    def tell(self, issued: Issued) -> None:
        """Call this with what tells that all is written so far; with None if it is."""

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Return once all is written; does this from time to time while it is not."""
