"""How the modules of a pipeline take weights when they are launched, for updates that do it otherwise."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from weightlift.loading.session import NamedWeights
from weightlift.patches.sglang_diffusion.weights import is_sharded

_RUNTIME = "sglang.multimodal_gen.runtime"
_MADE_AT_LAUNCH = (
    *("gate_compress", "wcscales", "wtscale", "bias", "input_scale", "weight_scale"),
    *("norm_q", "norm_k"),
)
"""Parts of names of parameters that launches up to 0.5.13 make where a checkpoint has none."""


def loads_itself(module: torch.nn.Module) -> bool:
    """Whether a launch has it load by itself: the engine's encoders, which know their fused parameters."""
    return ".models.encoders." in type(module).__module__ and hasattr(module, "load_weights")


def is_apart(module: torch.nn.Module) -> bool:
    """Whether its parameters are not whole and where they are used: sharded, or layers on the host."""
    managers = getattr(module, "layerwise_offload_managers", None) or ()
    return is_sharded(module) or any(manager.enabled for manager in managers)


def complete(module: torch.nn.Module, weights: NamedWeights) -> NamedWeights:
    """The tensors of a checkpoint by the names that a module has for them.

    Raises:
        ValueError: A parameter has none.
    """
    named = _translated(module, weights)
    _refuse_unfilled(module, set(named), _MADE_AT_LAUNCH)
    return iter(named.items())


def take(module: torch.nn.Module, weights: NamedWeights) -> None:
    """Fill a module in place as it is filled at launch: names are translated, and fused ones found.

    Args:
        module: Loaded, its parameters whole and where they are used.
        weights: The tensors of a checkpoint.

    Raises:
        ValueError: Shapes differ, or a parameter has no tensor or a tensor no parameter.
    """
    if loads_itself(module):
        with _as_launched(module):
            filled = set(module.load_weights(weights))  # type: ignore[operator]
        _refuse_unfilled(module, filled, ())  # as strict as the launch
        return
    named = _translated(module, weights)
    filled = _assign(module, named)
    if type(module).__module__.startswith("sglang."):
        _refuse_unfilled(module, filled, _MADE_AT_LAUNCH)
    else:  # a component of another library may have parameters that no checkpoint holds
        _refuse(module, "the model has nothing for", named.keys() - filled)


def _as_launched(module: torch.nn.Module) -> AbstractContextManager[None]:
    """Within this, the ranks that took an encoder apart at launch are those that share tensors."""
    state = importlib.import_module(f"{_RUNTIME}.distributed.parallel_state")
    group: Any = getattr(module, "_encoder_tp_group", None)  # from 0.5.18 on
    if group is None:
        base = importlib.import_module(f"{_RUNTIME}.models.encoders.base")
        config = getattr(module, "config", None)
        if hasattr(base, "get_folding_tp_group") and hasattr(config, "parallel_folding_mode"):
            group = base.get_folding_tp_group(config)
    if group is None or group is state.get_tp_group():
        return nullcontext()
    use = getattr(state, "use_tensor_parallel_group", None) or state.patch_tensor_parallel_group
    within: AbstractContextManager[None] = use(group)
    return within


def _refuse_unfilled(module: torch.nn.Module, filled: set[str], tolerated: Iterable[str]) -> None:
    names = {name for name, _ in module.named_parameters()} - filled
    names = {name for name in names if not any(part in name for part in tolerated)}
    _refuse(module, "the checkpoint has nothing for", names)


def _refuse(module: torch.nn.Module, problem: str, names: set[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        remedy = "Update from a checkpoint of this model, or restart with the other one"
        raise ValueError(f"{problem} {min(names)}{more} of {type(module).__name__}. {remedy}")


def _translated(module: torch.nn.Module, weights: NamedWeights) -> dict[str, torch.Tensor]:
    """By the names that the model has for them; parts of one are joined."""
    names = importlib.import_module(f"{_RUNTIME}.loader.utils")
    translate = names.get_param_names_mapping(getattr(module, "param_names_mapping", None) or {})
    more: dict[str, Any] = {}
    if "valid_target_names" in inspect.signature(names.hf_to_custom_state_dict).parameters:
        more["valid_target_names"] = set(module.state_dict())  # from 0.5.10 on
    named: dict[str, torch.Tensor] = names.hf_to_custom_state_dict(weights, translate, **more)[0]
    return named


def _assign(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> set[str]:
    """Copy tensors to the parameters and buffers of their names; returns the names."""
    targets = module.state_dict(keep_vars=True)
    for name in weights.keys() & targets.keys():
        target, weight = targets[name], weights[name]
        load = getattr(target, "weight_loader", None)
        if load is not None:
            load(target, weight.to(target.dtype))
        elif target.shape != weight.shape:
            shapes = f"{tuple(weight.shape)} in the checkpoint, {tuple(target.shape)} in the model"
            raise ValueError(f"{name} of {type(module).__name__}: {shapes}")
        else:
            target.data.copy_(weight)
    return weights.keys() & targets.keys()
