"""What torch functions do with lazy tensors.

Views stay lazy, and so does what is only to be moved or cast. A copy into a real tensor is handed to
the recorder. Anything else that needs data reads this one tensor and runs on it, as in stock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from weightlift.loading.lazy import (
    CPU,
    Args,
    Kwargs,
    LazyTensor,
    aborted,
    as_reported,
    data_of,
    geometry,
    natively,
    wrap,
)
from weightlift.loading.operations import (
    CONCATENATIONS,
    COPY,
    DEVICE_GETTERS,
    DTYPE_GETTERS,
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
from weightlift.loading.source import JoinedSource, Source

_META = torch.device("meta")
_TO: Function = torch.Tensor.to
_parse_to: Any = torch._C._nn._parse_to  # pyright: ignore[reportAttributeAccessIssue]


def lazy_tensor(source: Source, device: torch.device = CPU) -> LazyTensor:
    """The whole tensor, lazily; where it is read as data, it comes to this device."""
    return wrap(source.meta, source, device)


def _call(func: Function, args: Args, kwargs: Kwargs) -> Any:
    return _HANDLERS.get(func, _run)(func, args, kwargs)


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
    with natively():
        return func(*args, **kwargs)


def _view(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Run on the meta tensor; what is no view of it after all runs on the data."""
    lazy, *others = [*args, *kwargs.values()]
    if not isinstance(lazy, LazyTensor) or next(tensors_in(others), None) is not None:
        return _read_and_run(func, args, kwargs)
    if func == GET_ITEM and not is_basic(args[1]):
        return _read_and_run(func, args, kwargs)
    source = lazy.source
    if lazy.cast_to is not None and any(isinstance(item, torch.dtype) for item in others):
        return _read_and_run(func, args, kwargs)
    with natively():
        result = func(*args, **kwargs)
        results = result if isinstance(result, list | tuple) else (result,)
        is_view = all(item.untyped_storage()._cdata == source.storage for item in results)
    if not is_view:
        return _read_and_run(func, args, kwargs)
    wrapped = [wrap(item, source, lazy.reported_device, lazy.cast_to) for item in results]
    return type(result)(wrapped) if isinstance(result, list | tuple) else wrapped[0]


def _move(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Stay lazy, unless it was cast before: two casts are not one."""
    lazy, *others = args
    asks_for_copy = kwargs.get("copy") or sum(isinstance(item, bool) for item in others) > 1
    if not isinstance(lazy, LazyTensor) or lazy.source.realised is not None or asks_for_copy:
        return _read_and_run(func, args, kwargs)
    stored = geometry(lazy)[3]
    dtype = lazy.cast_to or stored
    asked = _asked(func, others, kwargs, lazy.reported_device, dtype)
    if asked is None or (asked[1] != dtype and lazy.cast_to is not None):
        return _read_and_run(func, args, kwargs)
    lazy.source.recorder.moved(lazy)
    if asked == (lazy.reported_device, dtype):
        return lazy
    with natively():
        cast_to = None if asked[1] == stored else asked[1]
        moved = wrap(lazy, lazy.source, asked[0], cast_to)
    if cast_to is not None and as_reported(moved, _META).stride() != geometry(lazy)[1]:
        return _read_and_run(func, args, kwargs)  # a cast has no holes
    lazy.source.is_moved = True
    return moved


def _asked(
    func: Function, others: list[Any], kwargs: Kwargs, device: torch.device, dtype: torch.dtype
) -> tuple[torch.device, torch.dtype] | None:
    """Where to and to which dtype this brings a tensor; None for what is more than that."""
    if "memory_format" in kwargs:
        return None
    is_plain = func == _TO and kwargs.keys() <= {"device", "dtype", "non_blocking"}
    if is_plain and next(tensors_in((*others, *kwargs.values())), None) is None:
        to, cast, *_ = _parse_to(*others, **kwargs)
        if to is None or _is_there(to):
            return to or device, cast or dtype
    # What an empty tensor becomes tells it, too, and takes ten times as long on a GPU.
    probe = func(torch.empty(0, dtype=dtype, device=device), *map(_probe, others), **kwargs)
    return (probe.device, probe.dtype) if isinstance(probe, torch.Tensor) else None


def _is_there(device: torch.device) -> bool:
    """Whether a tensor that is moved to this device says the same of itself."""
    if device.type == "cpu":
        return device.index is None
    return device.type == "cuda" and device.index in range(torch.cuda.device_count())


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
        raise aborted(lazy, f"{lazy!r} has a lazy copy and is written to")
    lazy.source.recorder.materialised(lazy)
    lazy.source.realise(lazy_tensor(lazy.source))


def _cat(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Stay lazy if whole tensors of one kind are concatenated."""
    parts = tuple(args[0]) if args else ()
    dimension = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not parts or not isinstance(dimension, int) or not kwargs.keys() <= {"dim"}:
        return _run(func, args, kwargs)
    kinds = {(part.dtype, part.device, part.dim()) for part in parts}
    if len(kinds) > 1 or not all(_can_join(part) for part in parts):
        return _run(func, args, kwargs)
    for part in parts:
        part.source.is_moved = True
    meta = torch.cat([as_reported(part, _META) for part in parts], dimension)
    source = JoinedSource(parts, dimension % meta.dim(), meta)
    return wrap(meta, source, parts[0].reported_device)


def _can_join(part: torch.Tensor) -> bool:
    return (
        isinstance(part, LazyTensor) and part.source.realised is None and part.source.recorder.joins
    )


def _dtype(func: Function, args: Args, kwargs: Kwargs) -> Any:
    lazy = args[0] if args else None
    if not isinstance(lazy, LazyTensor) or lazy.cast_to is None:
        return _describe(func, args, kwargs)
    return func(as_reported(lazy, _META), *args[1:], **kwargs)


def _device(func: Function, args: Args, kwargs: Kwargs) -> Any:
    lazy: LazyTensor = args[0]
    return getattr(torch.empty(0, device=lazy.reported_device), DEVICE_GETTERS[func])


def _escape(func: Function, args: Args, kwargs: Kwargs) -> Any:
    found = tensors_in((*args, *kwargs.values()))
    lazy = next(item for item in found if isinstance(item, LazyTensor))
    what = getattr(func, "__qualname__", None) or repr(func)
    raise aborted(lazy, f"{what} needs the memory of {lazy!r}")


_HANDLERS: dict[Function, Callable[[Function, Args, Kwargs], Any]] = {
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(GETTERS, _describe),
    **dict.fromkeys(DTYPE_GETTERS, _dtype),
    **dict.fromkeys(DEVICE_GETTERS, _device),
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(ESCAPES, _escape),
    **dict.fromkeys(CONCATENATIONS, _cat),
    COPY: _copy,
    SET_ITEM: _set_item,
}

LazyTensor.call = _call
