"""Keeps the planning thread from seeing a tensor before its bytes are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from weightlift.loading.lazy import LazyTensor
from weightlift.loading.operations import (
    COPY,
    DESCRIPTIONS,
    SET_ITEM,
    is_basic,
    only_views,
    tensors_in,
)
from weightlift.loading.source import Recorder


class PendingGuard(TorchFunctionMode):
    """Lets no operation of this thread see a real tensor before the transfers into it are done.

    Threads of a loader's own pool have no such guard: there, only operations that take a lazy
    tensor wait. What such loaders do is copy, and small copies happen at once.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Settle what this operation reads or writes, then run it."""
        kwargs = kwargs or {}
        if func in DESCRIPTIONS:
            found = self._landed(args, kwargs) if func is torch.empty_like else None
            return func(*args, **kwargs) if found is None else found
        if not (only_views(func, args) or _is_recorded(func, args, kwargs)):
            tensors = tensors_in((*args, *kwargs.values()))
            real = [item for item in tensors if not isinstance(item, LazyTensor)]
            if func == COPY and len(args) == len(real) == 2 and self._recorder.postpone(*real):
                return args[0]
            if real:
                self._recorder.observed(func, real)
        return func(*args, **kwargs)

    def _landed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Memory in which what a loader is about to copy arrives, in place of other like it."""
        if len(args) != 1 or not kwargs.get("device") or not kwargs.keys() <= {"device", "dtype"}:
            return None
        return self._recorder.empty_like(args[0], kwargs["device"], kwargs.get("dtype"))


def _is_recorded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this copies a lazy tensor, for which the recorder minds the order."""
    if func == SET_ITEM:
        return isinstance(args[2], LazyTensor) and is_basic(args[1])
    return func == COPY and any(
        isinstance(item, LazyTensor) for item in (*args[1:], *kwargs.values())
    )
