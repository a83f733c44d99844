"""The tensor of a checkpoint behind lazy views, and whom it tells what is done with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from weightlift.loading.errors import PlanAborted
from weightlift.loading.files import ShardFile
from weightlift.loading.header import TensorEntry

if TYPE_CHECKING:
    from weightlift.loading.lazy import LazyTensor


class Recorder(Protocol):
    """Who takes what is done with lazy tensors; a load session."""

    @property
    def joins(self) -> bool:
        """Whether concatenations stay lazy: nobody keeps account of single tensors' copies."""
        ...

    def copy(self, target: torch.Tensor, lazy: LazyTensor) -> None:
        """Fill ``target``, now or before the load ends."""

    def land(self, lazy: LazyTensor) -> torch.Tensor:
        """A real tensor in place of a lazy one, which is filled before the load ends."""
        ...

    def moved(self, lazy: LazyTensor) -> None:
        """Note that a loader moves a lazy tensor to where it may copy it next."""

    def empty_like(
        self, tensor: torch.Tensor, device: Any, dtype: torch.dtype | None
    ) -> torch.Tensor | None:
        """Memory for what was moved last, where that is already on its way to some like it."""
        ...

    def read(self, lazy: LazyTensor) -> torch.Tensor:
        """The data of a lazy tensor, on the CPU, with its shape and strides."""
        ...

    def materialised(self, lazy: LazyTensor) -> None:
        """Note that a loader works with the data of a lazy tensor."""

    def observed(self, func: Callable[..., Any], tensors: list[torch.Tensor]) -> None:
        """Note that a loader runs ``func`` on these real tensors, and settle them."""

    def postpone(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        """Make a copy between real tensors once its source has its bytes; False if it cannot wait."""
        ...

    def settle(self, tensors: Iterable[torch.Tensor]) -> None:
        """Return once no transfer into these tensors' storages is under way."""

    def abort(self, reason: PlanAborted) -> PlanAborted:
        """Remember that this load cannot be finished by plan, whoever catches the error."""
        ...


class Source:
    """A tensor of the checkpoint, shared by all lazy views of it.

    Attributes:
        entry: Where it is in its file.
        file: The shard.
        recorder: The load it belongs to.
        meta: Its shape and dtype, on the meta device.
        storage: Identity of the meta storage that its views have in common.
        realised: Set once a loader wrote into one of the views: from then on they are views of
            that memory.
        landed: Memory of its own that it is read to before anybody asks for it.
        is_moved: Whether there is a lazy copy of it: on another device, cast, or in a joined tensor.
    """

    __slots__ = (
        *("__weakref__", "_lock", "entry", "file", "meta"),
        *("is_moved", "landed", "realised", "recorder", "storage"),
    )

    def __init__(
        self,
        entry: TensorEntry,
        file: ShardFile,
        recorder: Recorder,
        landed: torch.Tensor | None = None,
    ) -> None:
        self.entry = entry
        self.file = file
        self.recorder = recorder
        self.meta = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        self.storage: int = self.meta.untyped_storage()._cdata
        self.realised: torch.Tensor | None = None
        self.landed = landed
        self.is_moved = False
        self._lock = threading.Lock()

    def realise(self, whole: LazyTensor) -> None:
        """Bring the whole tensor's data into memory, to be written to."""
        with self._lock:
            if self.realised is None:
                self.realised = self.recorder.read(whole)


class JoinedSource(Source):
    """Several lazy tensors, one after the other along a dimension. Has the entry of the first.

    Attributes:
        parts: The tensors, of one dtype and on one device.
        dimension: Along which they follow each other.
    """

    __slots__ = ("dimension", "parts")

    def __init__(self, parts: tuple[LazyTensor, ...], dimension: int, meta: torch.Tensor) -> None:
        first = parts[0].source
        super().__init__(first.entry, first.file, first.recorder)
        self.meta = meta
        self.storage = meta.untyped_storage()._cdata
        self.parts = parts
        self.dimension = dimension

    def is_whole(self, view: tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype]) -> bool:
        """Whether a view with this geometry is all of it, as it is."""
        meta = self.meta
        return view == (tuple(meta.shape), meta.stride(), 0, meta.dtype)
