"""Tensors that know where their bytes are and hold none.

A :class:`LazyTensor` is a real ``torch.Tensor`` over meta storage: shape, dtype and strides are
those of the tensor in the file, and view operations stay lazy because the meta view keeps its
storage and offset. A copy into a real tensor is handed to the recorder as a transfer. Anything
else that needs data reads this one tensor and runs on it, as the stock engine would have done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from weightlift.loading.checkpoint import TensorEntry
from weightlift.loading.errors import PlanAborted

_CPU = torch.device("cpu")
_natively = torch._C.DisableTorchFunctionSubclass


class Recorder(Protocol):
    """Who takes what is done with lazy tensors; a load session."""

    def copy(self, target: torch.Tensor, lazy: LazyTensor) -> None:
        """Fill ``target``, now or before the load ends."""

    def read(self, lazy: LazyTensor) -> torch.Tensor:
        """The data of a lazy tensor, on the CPU, with its shape and strides."""

    def settle(self, tensors: Iterable[torch.Tensor]) -> None:
        """Return once no transfer into these tensors' storages is under way."""

    def abort(self, reason: PlanAborted) -> PlanAborted:
        """Remember that this load cannot be finished by plan, whoever catches the error."""


class Source:
    """A tensor of the checkpoint, shared by all lazy views of it.

    ``realised`` is set once a loader wrote into one of the views: from then on they are views
    of that memory.
    """

    __slots__ = ("entry", "recorder", "_meta", "realised", "storage")

    def __init__(self, entry: TensorEntry, recorder: Recorder) -> None:
        self.entry = entry
        self.recorder = recorder
        self._meta = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        self.storage: int = self._meta.untyped_storage()._cdata
        self.realised: torch.Tensor | None = None

    def lazy(self) -> LazyTensor:
        """The whole tensor, lazily."""
        return _wrap(self._meta, self, _CPU)

    def realise(self) -> torch.Tensor:
        """The whole tensor's data, from now on in memory."""
        if self.realised is None:
            self.realised = self.recorder.read(self.lazy())
        return self.realised


class LazyTensor(torch.Tensor):
    """A view of a checkpoint tensor without its data. Made by :meth:`Source.lazy`."""

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
        handler = _HANDLERS.get(func)
        if handler is None:
            handler = _mutate if _is_in_place(func) and _is_lazy(args[:1]) else _read_and_run
        return handler(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        entry = self.source.entry
        return f"LazyTensor({entry.name!r} of {entry.file.path!r}, shape={tuple(self.shape)})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _aborted(self, f"{self!r} was pickled or deep-copied")


class PendingGuard(TorchFunctionMode):
    """Lets no operation of this thread see a real tensor before the transfers into it are done."""

    def __init__(self, recorder: Recorder, is_idle: Callable[[], bool]) -> None:
        super().__init__()
        self._recorder = recorder
        self._is_idle = is_idle

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Settle what this operation reads or writes, then run it."""
        kwargs = kwargs or {}
        if func not in _BLIND and not self._is_idle():
            is_recorded = func in _COPIES and _is_lazy((*args[1:], *kwargs.values()))
            if not is_recorded:
                self._recorder.settle(_real_tensors((*args, *kwargs.values())))
        return func(*args, **kwargs)


def geometry(lazy: LazyTensor) -> tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype]:
    """Shape, strides and storage offset in elements, and dtype, of a lazy tensor."""
    with _natively():
        return tuple(lazy.shape), lazy.stride(), lazy.storage_offset(), lazy.dtype


def _wrap(meta: torch.Tensor, source: Source, device: torch.device) -> LazyTensor:
    with _natively():
        lazy = meta.as_subclass(LazyTensor)
    lazy.source = source
    lazy.reported_device = device
    return lazy


def data_of(lazy: LazyTensor) -> torch.Tensor:
    """The data, where the tensor says it is."""
    source = lazy.source
    if source.realised is None:
        data = source.recorder.read(lazy)
    else:
        shape, stride, offset, dtype = geometry(lazy)
        data = source.realised.view(-1).view(dtype).as_strided(shape, stride, offset)
    return data if lazy.reported_device == _CPU else data.to(lazy.reported_device)


def _is_lazy(values: Iterable[Any]) -> bool:
    return any(isinstance(value, LazyTensor) for value in values)


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__") or name in _IN_PLACE_OPERATORS


def _map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """``value`` with ``change`` applied to its tensors, looking into lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    return value


def _real_tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _map_tensors(value, lambda tensor: None if isinstance(tensor, LazyTensor) else found.append(tensor))
    return found


def _read_and_run(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run on the data of every lazy argument."""

    def real(tensor: torch.Tensor) -> torch.Tensor:
        return data_of(tensor) if isinstance(tensor, LazyTensor) else tensor

    return func(*(_map_tensors(arg, real) for arg in args), **_map_tensors(kwargs, real))


def _describe(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Answer from shape, dtype and strides alone."""
    with _natively():
        return func(*args, **kwargs)


def _view(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run on the meta tensor; what is no view of it after all runs on the data."""
    lazy = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(lazy, LazyTensor) or _is_lazy((*args[1:], *kwargs.values())):
        return _read_and_run(func, args, kwargs)
    source = lazy.source
    if any(isinstance(item, torch.Tensor) for item in _flat(args[1:])):
        return _read_and_run(func, args, kwargs)
    with _natively():
        result = func(*args, **kwargs)
        results = result if isinstance(result, list | tuple) else (result,)
        is_view = all(item.untyped_storage()._cdata == source.storage for item in results)
    if not is_view:
        return _read_and_run(func, args, kwargs)
    wrapped = [_wrap(item, source, lazy.reported_device) for item in results]
    return type(result)(wrapped) if isinstance(result, list | tuple) else wrapped[0]


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _move(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``to``, ``cpu`` or ``cuda``: stays lazy if nothing but the device is asked to change."""
    lazy = args[0]
    if not isinstance(lazy, LazyTensor) or lazy.source.realised is not None:
        return _read_and_run(func, args, kwargs)
    shape, stride, _, dtype = geometry(lazy)
    # What an empty tensor would become tells the device and dtype that are asked for.
    probe = func(torch.empty(0, dtype=dtype), *(_probe(arg) for arg in args[1:]), **kwargs)
    if probe.dtype != dtype or kwargs.get("copy") or kwargs.get("memory_format"):
        return _read_and_run(func, args, kwargs)
    with _natively():
        return _wrap(lazy, lazy.source, probe.device)


def _probe(argument: Any) -> Any:
    """``to(other)`` takes the device and dtype of another tensor, lazy or not."""
    if isinstance(argument, LazyTensor):
        return torch.empty(0, dtype=argument.dtype, device=argument.reported_device)
    return argument


def _copy(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    target, lazy = (*args, kwargs.get("src"))[:2]
    if isinstance(target, LazyTensor) or not isinstance(lazy, LazyTensor):
        return _mutate(func, args, kwargs)
    lazy.source.recorder.copy(target, lazy)
    return target


def _set_item(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    target, key, lazy = args
    plain = all(item is None or item is ... or isinstance(item, int | slice) for item in _flat([key]))
    if isinstance(target, LazyTensor):
        return _mutate(func, args, kwargs)
    if not isinstance(lazy, LazyTensor) or not plain:
        return _read_and_run(func, args, kwargs)
    lazy.source.recorder.copy(target[key], lazy)
    return None


def _mutate(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A write into a lazy tensor: its source moves to memory, where all its views see the write."""
    args[0].source.realise()
    return _read_and_run(func, args, kwargs)


def _device(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    lazy: LazyTensor = args[0]
    return getattr(torch.empty(0, device=lazy.reported_device), _DEVICE_GETTERS[func])


def _escape(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    lazy = next(arg for arg in args if isinstance(arg, LazyTensor))
    what = getattr(func, "__qualname__", None) or repr(func)
    raise _aborted(lazy, f"{what} needs the memory of {lazy!r}")


def _aborted(lazy: LazyTensor, reason: str) -> PlanAborted:
    return lazy.source.recorder.abort(PlanAborted(reason))


def _named(owner: Any, names: str) -> list[Callable[..., Any]]:
    """These attributes of ``owner``, as torch hands them to ``__torch_function__``.

    A property counts by its getter. Releases differ: what this torch lacks is left out.
    """
    found = [getattr(owner, name) for name in names.split() if hasattr(owner, name)]
    return [item if callable(item) else item.__get__ for item in found]


_T = torch.Tensor
_VIEWS = {
    *_named(_T, "narrow select view reshape transpose t permute chunk split split_with_sizes"),
    *_named(_T, "unbind squeeze unsqueeze flatten unflatten expand expand_as view_as movedim"),
    *_named(_T, "swapaxes detach contiguous alias as_strided diagonal tensor_split unfold hsplit"),
    *_named(_T, "vsplit __getitem__ T mT data"),
    *_named(torch, "narrow select reshape transpose t permute chunk split unbind squeeze"),
    *_named(torch, "unsqueeze flatten movedim tensor_split as_strided swapaxes detach"),
}
_GETTERS = {
    *_named(_T, "shape dtype ndim layout size stride dim ndimension numel nelement element_size"),
    *_named(_T, "storage_offset is_contiguous __len__ is_floating_point is_complex is_signed"),
    *_named(_T, "requires_grad requires_grad_ itemsize nbytes is_leaf grad grad_fn __hash__"),
    *_named(_T, "is_sparse is_quantized is_nested names is_conj is_neg is_inference _is_view"),
    *_named(torch, "numel is_floating_point is_complex is_tensor"),
}
_DEVICE_GETTERS: dict[Any, str] = {
    getter: name
    for name in ("device", "is_cpu", "is_cuda", "is_meta", "is_xpu")
    for getter in _named(_T, name)
}
_ESCAPES = {
    _T.data.__set__,
    *_named(_T, "data_ptr untyped_storage storage _typed_storage set_ share_memory_ __dlpack__"),
    *_named(_T, "is_pinned is_shared"),
}
_COPIES = {_T.copy_, _T.__setitem__}
_IN_PLACE_OPERATORS = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "and", "or")}
_MAY_COPY = set(_named(_T, "reshape contiguous flatten") + _named(torch, "reshape flatten"))
_BLIND = frozenset({*_VIEWS, *_GETTERS, *_DEVICE_GETTERS} - _MAY_COPY)
"""What never looks at the data of a tensor."""

# Method wrappers of getters are made anew at each look-up: they are found by equality alone.
_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_GETTERS, _describe),
    **dict.fromkeys(_DEVICE_GETTERS, _device),
    **dict.fromkeys(_ESCAPES, _escape),
    **dict.fromkeys((_T.to, _T.cpu, _T.cuda), _move),
    _T.copy_: _copy,
    _T.__setitem__: _set_item,
}
