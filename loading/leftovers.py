"""Tensors without data that a load leaves in a model: found, or given memory of their own."""

from __future__ import annotations

from typing import Any

import torch

from weightlift.loading.lazy import LazyTensor

_DEPTH = 4


def find_lazy(model: torch.nn.Module) -> str:
    """The qualified name of what holds a lazy tensor among the modules' attributes, or ''.

    Looks into containers and plain objects (a quantisation method keeps state of its own).
    """
    for prefix, module in model.named_modules():
        for holder in (module._parameters, module._buffers, vars(module)):
            for name, value in holder.items():
                if _holds_lazy(value, _DEPTH):
                    return f"{prefix}.{name}".lstrip(".")
    return ""


def adopt_lazy(model: torch.nn.Module) -> None:
    """Replace lazy parameters and buffers by real ones, which are filled before the load ends.

    Engines that build models on the meta device make parameters of what they were offered.
    """
    landed: dict[int, torch.Tensor] = {}  # tied ones stay tied
    for module in model.modules():
        for holder in (module._parameters, module._buffers):
            lazy = {name: value for name, value in holder.items() if isinstance(value, LazyTensor)}
            tensors: dict[str, Any] = holder
            for name, value in lazy.items():
                if id(value) not in landed:
                    landed[id(value)] = _landed(value)
                tensors[name] = landed[id(value)]


def _landed(lazy: LazyTensor) -> torch.Tensor:
    real = lazy.source.recorder.land(lazy)
    if not isinstance(lazy, torch.nn.Parameter):
        return real
    return torch.nn.Parameter(real, requires_grad=lazy.requires_grad)


def _holds_lazy(value: Any, depth: int) -> bool:
    if isinstance(value, torch.Tensor):
        return isinstance(value, LazyTensor)
    if depth == 0 or isinstance(value, torch.nn.Module | str | bytes | int | float | type):
        return False
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, list | tuple | set):
        inside = list(value)
    else:
        inside = list(getattr(value, "__dict__", {}).values())
    return any(_holds_lazy(item, depth - 1) for item in inside)


def meta_names(model: torch.nn.Module) -> frozenset[str]:
    """Qualified names of the parameters and buffers that are on the meta device."""
    return frozenset(
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for holder in (module._parameters, module._buffers)
        for name, tensor in holder.items()
        if tensor is not None and tensor.is_meta
    )
