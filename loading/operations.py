"""What torch operations do with a tensor: view it, describe it, copy from it, write to it.

The sets hold the functions as torch hands them to ``__torch_function__``. Releases differ: what
this torch lacks is left out. The method wrappers of properties are made anew at each look-up, so
they are found by equality alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Function = Callable[..., Any]


def _named(owner: Any, names: str) -> list[Function]:
    """These attributes of ``owner``; a property counts by its getter."""
    found = [getattr(owner, name) for name in names.split() if hasattr(owner, name)]
    return [item if callable(item) else item.__get__ for item in found]


_T = torch.Tensor
GET_ITEM: Function = _T.__getitem__
SET_ITEM: Function = _T.__setitem__
COPY: Function = _T.copy_

VIEWS = frozenset(
    {
        *_named(_T, "narrow select view reshape transpose t permute chunk split split_with_sizes"),
        *_named(_T, "unbind squeeze unsqueeze flatten unflatten expand expand_as view_as movedim"),
        *_named(_T, "moveaxis swapaxes swapdims detach contiguous alias as_strided diagonal ravel"),
        *_named(_T, "tensor_split unfold hsplit vsplit broadcast_to __getitem__ T mT data"),
        *_named(torch, "narrow select reshape transpose t permute chunk split unbind squeeze"),
        *_named(torch, "unsqueeze flatten movedim moveaxis tensor_split as_strided swapaxes"),
        *_named(torch, "swapdims ravel broadcast_to detach"),
    }
)
"""Results share the memory of the first argument; some copy where the layout leaves no choice."""

MAY_COPY = frozenset(
    _named(_T, "reshape contiguous flatten ravel") + _named(torch, "reshape flatten ravel")
)

GETTERS = frozenset(
    {
        *_named(_T, "shape ndim layout size stride dim ndimension numel nelement"),
        *_named(_T, "storage_offset is_contiguous __len__ requires_grad requires_grad_ is_leaf"),
        *_named(_T, "grad grad_fn __hash__ is_sparse is_quantized is_nested names is_conj is_neg"),
        *_named(_T, "is_inference _is_view"),
        *_named(torch, "numel is_tensor"),
        _T.requires_grad.__set__,  # type: ignore[attr-defined]
    }
)
"""Answered from shape and strides."""

DTYPE_GETTERS = frozenset(
    {
        *_named(_T, "dtype element_size itemsize nbytes is_floating_point is_complex is_signed"),
        *_named(torch, "is_floating_point is_complex"),
    }
)
"""Answered from shape and dtype."""

DEVICE_GETTERS: dict[Function, str] = {
    getter: name
    for name in ("device", "is_cpu", "is_cuda", "is_meta", "is_xpu")
    for getter in _named(_T, name)
}

DESCRIPTIONS = frozenset(
    {
        *GETTERS,
        *DTYPE_GETTERS,
        *DEVICE_GETTERS,
        *_named(torch, "empty empty_strided empty_like is_grad_enabled"),
        torch._C._set_grad_enabled,
    }
)
"""No data is looked at, whatever the arguments are. Engines ask these a dozen times for each tensor."""

CONCATENATIONS = frozenset(_named(torch, "cat concat concatenate"))

MOVES = frozenset(_named(_T, "to cpu cuda float half bfloat16 double type"))
"""To another device or dtype; the tensor itself where that is the one it has."""

ESCAPES = frozenset(
    {
        _T.data.__set__,  # type: ignore[attr-defined]
        *_named(_T, "data_ptr untyped_storage storage _typed_storage set_ share_memory_"),
        *_named(_T, "__dlpack__ is_pinned is_shared numpy squeeze_ unsqueeze_ t_ transpose_"),
        *_named(_T, "resize_ resize_as_ as_strided_ swapaxes_ swapdims_ detach_"),
    }
)
"""Needs the memory itself, or changes the tensor's own shape."""

_BLIND = VIEWS - MAY_COPY
_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__"
    for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()
)


def is_in_place(func: Function) -> bool:
    """Whether this writes to its first argument, as its name tells."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS


def is_basic(key: Any) -> bool:
    """Whether indexing with this key gives a view: integers, slices, None and Ellipsis alone."""
    return all(
        item is None
        or item is ...
        or isinstance(item, slice)
        or (isinstance(item, int) and not isinstance(item, bool))
        for item in (key if isinstance(key, tuple) else (key,))
    )


def only_views(func: Function, args: tuple[Any, ...]) -> bool:
    """Whether this operation gives a view of its first argument, and looks at no data."""
    if func not in _BLIND:
        return False
    if len(args) == 1:
        return True
    return next(tensors_in(args[1:]), None) is None and (func != GET_ITEM or is_basic(args[1]))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a value, looking into lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """``value`` with ``change`` applied to the tensors that :func:`tensors_in` finds."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        items: Iterable[Any] = (map_tensors(item, change) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value
