"""Tensors that know where their bytes are and hold none.

A :class:`LazyTensor` is a real ``torch.Tensor`` over meta storage: shape, dtype and strides are
those of the tensor in the file, and view operations stay lazy because the meta view keeps its
storage and offset. What functions do with them is in :mod:`~weightlift.loading.lazy_functions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch

from weightlift.loading.errors import CheckpointError, PlanAborted
from weightlift.loading.operations import Function
from weightlift.loading.source import Source
from weightlift.loading.transfer import extent

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
CPU = torch.device("cpu")
natively = torch._C.DisableTorchFunctionSubclass


class LazyTensor(torch.Tensor):
    """A view of a checkpoint tensor without its data.

    Made by :func:`~weightlift.loading.lazy_functions.lazy_tensor`.
    """

    call: ClassVar[Callable[[Function, Args, Kwargs], Any]]
    """Does what a function is to do with lazy tensors among its arguments."""

    source: Source
    reported_device: torch.device
    """What ``device`` says: the CPU, as for the stock tensor, or where ``.to()`` was asked to."""
    cast_to: torch.dtype | None
    """What ``.to()`` was asked to make of the file's elements; None for what they are."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Keep views lazy, record copies, and read the data for anything else."""
        return LazyTensor.call(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        name, path = self.source.entry.name, self.source.file.path
        return f"LazyTensor({name!r} of {path!r}, shape={tuple(self.shape)})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise aborted(self, f"{self!r} was pickled")


def wrap(
    meta: torch.Tensor, source: Source, device: torch.device, cast_to: torch.dtype | None = None
) -> LazyTensor:
    """A lazy tensor with the geometry of ``meta``, which views the source's meta storage."""
    with natively():
        lazy = meta.as_subclass(LazyTensor)
    lazy.source = source
    lazy.reported_device = device
    lazy.cast_to = cast_to
    return lazy


def geometry(lazy: LazyTensor) -> tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype]:
    """Shape, strides and storage offset in elements, and dtype in the file, of a lazy tensor."""
    with natively():
        return tuple(lazy.shape), lazy.stride(), int(lazy.storage_offset()), lazy.dtype


def as_reported(lazy: LazyTensor, device: torch.device) -> torch.Tensor:
    """An empty tensor of its shape and of the dtype that it reports, laid out as ``.to()`` would."""
    with natively():
        return torch.empty_like(lazy, dtype=lazy.cast_to, device=device).as_subclass(torch.Tensor)


def data_of(lazy: LazyTensor) -> torch.Tensor:
    """The data, where and of the dtype that the tensor says."""
    source = lazy.source
    if source.realised is None:
        data = source.recorder.read(lazy)
    else:
        data = view_of(source.realised, lazy)
    is_as_read = lazy.reported_device == CPU and lazy.cast_to is None
    return data if is_as_read else data.to(lazy.reported_device, lazy.cast_to or data.dtype)


def view_of(
    memory: torch.Tensor, lazy: LazyTensor, cast_to: torch.dtype | None = None
) -> torch.Tensor:
    """What a lazy tensor is of its source's elements, where these are in memory, perhaps cast."""
    shape, stride, offset, stored = geometry(lazy)
    dtype = cast_to or stored
    length = 0 if 0 in shape else extent(shape, stride)
    found = memory.view(-1).view(torch.uint8)[offset * dtype.itemsize :]
    return found[: length * dtype.itemsize].view(dtype).as_strided(shape, stride)


def place_of(lazy: LazyTensor) -> int:
    """The byte of the file where a lazy tensor's first element lies.

    Raises:
        CheckpointError: The view reaches beyond its tensor (``as_strided`` lets it).
    """
    shape, stride, offset, dtype = geometry(lazy)
    entry = lazy.source.entry
    start, length = offset * dtype.itemsize, extent(shape, stride) * dtype.itemsize
    if 0 not in shape and start + length > entry.nbytes:
        problem = f"a view of bytes {start} to {start + length} is out of its {entry.nbytes}"
        remedy = "The model's loader asks for more than is there."
        raise CheckpointError(lazy.source.file.path, problem, tensor=entry.name, remedy=remedy)
    return entry.offset + start


def aborted(lazy: LazyTensor, reason: str) -> PlanAborted:
    """Have its load know that it cannot be planned; returns the error to raise."""
    return lazy.source.recorder.abort(PlanAborted(reason))
