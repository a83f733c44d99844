"""Which tensors are memory and nothing else, so that others than torch's own functions may fill them."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(target: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether readers may write to this target's memory themselves."""
    return (
        target.shape == shape
        and (target.is_cuda or target.is_cpu)
        and target.layout is torch.strided
        and (type(target) in _PLAIN_TYPES or not is_traceable_wrapper_subclass(target))
        and not (target.is_conj() or target.is_neg())
    )


def can_wait(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether a copy is one of whole plain tensors that gradients have no part in."""
    has_gradient = target.requires_grad or source.requires_grad
    return (
        is_plain(target, tuple(source.shape))
        and is_plain(source, tuple(target.shape))
        and not (has_gradient and torch.is_grad_enabled())
    )


_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
