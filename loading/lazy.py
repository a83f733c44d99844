"""Tensors that know where their bytes are and hold none.

A :class:`LazyTensor` is a real ``torch.Tensor`` over meta storage: shape, dtype and strides are
those of the tensor in the file, and view operations stay lazy because the meta view keeps its
storage and offset. A copy into a real tensor is handed to the recorder as a transfer. Anything
else that needs data reads this one tensor and runs on it, as the stock engine would have done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from weightlift.loading.errors import CheckpointError, PlanAborted
from weightlift.loading.operations import (
    COPY,
    DEVICE_GETTERS,
    ESCAPES,
    GET_ITEM,
    GETTERS,
    MOVES,
    SET_ITEM,
    VIEWS,
    Function,
    is_basic,
    is_in_place,
    map_tensors,
    tensors_in,
)
from weightlift.loading.source import Source
from weightlift.loading.transfer import extent

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
_CPU = torch.device("cpu")
_natively = torch._C.DisableTorchFunctionSubclass


class LazyTensor(torch.Tensor):
    """A view of a checkpoint tensor without its data. Made by :func:`lazy_tensor`."""

    source: Source
    reported_device: torch.device
    """What ``device`` says: the CPU, as for the stock tensor, or where ``.to()`` was asked to."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Keep views lazy, record copies, and read the data for anything else."""
        return _HANDLERS.get(func, _run)(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        name, path = self.source.entry.name, self.source.file.path
        return f"LazyTensor({name!r} of {path!r}, shape={tuple(self.shape)})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _aborted(self, f"{self!r} was pickled")


def lazy_tensor(source: Source) -> LazyTensor:
    """The whole tensor, lazily."""
    return _wrap(source.meta, source, _CPU)


def geometry(lazy: LazyTensor) -> tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype]:
    """Shape, strides and storage offset in elements, and dtype, of a lazy tensor."""
    with _natively():
        return tuple(lazy.shape), lazy.stride(), int(lazy.storage_offset()), lazy.dtype


def data_of(lazy: LazyTensor) -> torch.Tensor:
    """The data, where the tensor says it is."""
    source = lazy.source
    if source.realised is None:
        data = source.recorder.read(lazy)
    else:
        shape, stride, offset, dtype = geometry(lazy)
        length = 0 if 0 in shape else extent(shape, stride)
        memory = source.realised.view(-1).view(torch.uint8)[offset * dtype.itemsize :]
        data = memory[: length * dtype.itemsize].view(dtype).as_strided(shape, stride)
    return data if lazy.reported_device == _CPU else data.to(lazy.reported_device)


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


def _wrap(meta: torch.Tensor, source: Source, device: torch.device) -> LazyTensor:
    with _natively():
        lazy = meta.as_subclass(LazyTensor)
    lazy.source = source
    lazy.reported_device = device
    return lazy


def _is_lazy(value: Any) -> bool:
    return any(isinstance(item, LazyTensor) for item in tensors_in(value))


def _run(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Run on the data of every lazy argument."""
    if is_in_place(func) and _is_lazy(args[:1] or list(kwargs.values())[:1]):
        if not isinstance(args[0] if args else None, LazyTensor):
            return _escape(func, args, kwargs)  # a list of tensors to write to
        _realise(args[0])
    elif _is_lazy(kwargs.get("out")):
        return _escape(func, args, kwargs)
    return _read_and_run(func, args, kwargs)


def _read_and_run(func: Function, args: Args, kwargs: Kwargs) -> Any:
    tensors = list(tensors_in((*args, *kwargs.values())))
    first = next(item for item in tensors if isinstance(item, LazyTensor))
    first.source.recorder.settle([item for item in tensors if not isinstance(item, LazyTensor)])

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, LazyTensor):
            return tensor
        tensor.source.recorder.materialised(tensor)
        return data_of(tensor)

    return func(*(map_tensors(arg, real) for arg in args), **map_tensors(kwargs, real))


def _describe(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Answer from shape, dtype and strides alone."""
    with _natively():
        return func(*args, **kwargs)


def _view(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Run on the meta tensor; what is no view of it after all runs on the data."""
    lazy, *others = [*args, *kwargs.values()]
    if not isinstance(lazy, LazyTensor) or next(tensors_in(others), None) is not None:
        return _read_and_run(func, args, kwargs)
    if func == GET_ITEM and not is_basic(args[1]):
        return _read_and_run(func, args, kwargs)
    source = lazy.source
    with _natively():
        result = func(*args, **kwargs)
        results = result if isinstance(result, list | tuple) else (result,)
        is_view = all(item.untyped_storage()._cdata == source.storage for item in results)
    if not is_view:
        return _read_and_run(func, args, kwargs)
    wrapped = [_wrap(item, source, lazy.reported_device) for item in results]
    return type(result)(wrapped) if isinstance(result, list | tuple) else wrapped[0]


def _move(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Stay lazy if nothing but the device is asked to change."""
    lazy, *others = args
    asks_for_copy = kwargs.get("copy") or sum(isinstance(item, bool) for item in others) > 1
    if not isinstance(lazy, LazyTensor) or lazy.source.realised is not None or asks_for_copy:
        return _read_and_run(func, args, kwargs)
    dtype = geometry(lazy)[3]
    # What an empty tensor would become tells the device and dtype that are asked for.
    here = torch.empty(0, dtype=dtype, device=lazy.reported_device)
    probe = func(here, *map(_probe, others), **kwargs)
    if not isinstance(probe, torch.Tensor) or probe.dtype != dtype or "memory_format" in kwargs:
        return _read_and_run(func, args, kwargs)
    if probe.device == lazy.reported_device:
        return lazy
    lazy.source.is_moved = True
    with _natively():
        return _wrap(lazy, lazy.source, probe.device)


def _probe(argument: Any) -> Any:
    """``to(other)`` takes the device and dtype of another tensor, lazy or not."""
    if isinstance(argument, LazyTensor):
        return torch.empty(0, dtype=argument.dtype, device=argument.reported_device)
    return argument


def _copy(func: Function, args: Args, kwargs: Kwargs) -> Any:
    target, lazy = [*args, *kwargs.values()][:2]
    if isinstance(target, LazyTensor) or not isinstance(lazy, LazyTensor):
        return _run(func, args, kwargs)
    lazy.source.recorder.copy(target, lazy)
    return target


def _set_item(func: Function, args: Args, kwargs: Kwargs) -> Any:
    target, key, lazy = args
    if isinstance(target, LazyTensor):
        _realise(target)
    if isinstance(target, LazyTensor) or not isinstance(lazy, LazyTensor) or not is_basic(key):
        return _read_and_run(func, args, kwargs)
    place = target[key]
    weight: Any = lazy
    while weight.dim() > place.dim() and weight.shape[0] == 1:  # torch drops them here alone
        weight = weight[0]
    weight.source.recorder.copy(place, weight)
    return None


def _realise(lazy: LazyTensor) -> None:
    """A write is coming: the source moves to memory, where all its views see the write."""
    if lazy.source.is_moved:
        raise _aborted(lazy, f"{lazy!r} has a copy on another device and is written to")
    lazy.source.recorder.materialised(lazy)
    lazy.source.realise(lazy_tensor(lazy.source))


def _device(func: Function, args: Args, kwargs: Kwargs) -> Any:
    lazy: LazyTensor = args[0]
    return getattr(torch.empty(0, device=lazy.reported_device), DEVICE_GETTERS[func])


def _escape(func: Function, args: Args, kwargs: Kwargs) -> Any:
    found = tensors_in((*args, *kwargs.values()))
    lazy = next(item for item in found if isinstance(item, LazyTensor))
    what = getattr(func, "__qualname__", None) or repr(func)
    raise _aborted(lazy, f"{what} needs the memory of {lazy!r}")


def _aborted(lazy: LazyTensor, reason: str) -> PlanAborted:
    return lazy.source.recorder.abort(PlanAborted(reason))


_HANDLERS: dict[Function, Callable[[Function, Args, Kwargs], Any]] = {
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(GETTERS, _describe),
    **dict.fromkeys(DEVICE_GETTERS, _device),
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(ESCAPES, _escape),
    COPY: _copy,
    SET_ITEM: _set_item,
}
