"""What is left to the engine's own loader, and when that is an error."""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version

from weightlift.compat.context import context_of
from weightlift.loading.errors import WeightliftError
from weightlift.loading.settings import Settings
from weightlift.patches.sglang.weights import RestartableWeights, extra_config, load_format

_FORMATS = ("auto", "safetensors")
_FP8_UPDATES_SINCE = Version("0.5.3")
"""Releases before it rebind ``layer.weight`` after a load, and lose its ``weight_loader``."""


def refusal(model: Any, weights: Any, device: torch.device, settings: Settings) -> str:
    """Why this load is left to the engine, or ''."""
    if not settings.multithread_load:
        return "multithread load is switched off"
    if not isinstance(weights, RestartableWeights):
        return "its weights are filtered, committed late or come from memory"
    if device.type not in ("cpu", "cuda"):
        return f"no way to place weights on {device.type!r} devices"
    return loader_refusal(weights.loader) or _quantisation_refusal(model, weights.phase)


def loader_refusal(loader: Any) -> str:
    """Why what this loader of the engine loads is left to it, or ''."""
    if type(loader).__name__ != "DefaultModelLoader":
        return f"{type(loader).__name__} has ways of its own"
    if extra_config(loader).get("enable_multithread_load") is False:
        return "--model-loader-extra-config says enable_multithread_load=false"
    wanted = load_format(loader)
    return "" if wanted in _FORMATS else f"--load-format {wanted} has ways of its own"


def _quantisation_refusal(model: torch.nn.Module, phase: str) -> str:
    """Why this model's quantisation is left to the engine, or ''.

    Plain weights and stored block-wise FP8 are copied as they are. Methods that quantise while
    they load count copies or rebind parameters; what was not tried stays stock as well.
    """
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        kind = type(method).__name__
        if method is None or kind.startswith("Unquantized"):
            continue
        config = getattr(method, "quant_config", None)
        is_stored = getattr(config, "is_checkpoint_fp8_serialized", False)
        if kind.startswith("Fp8") and is_stored and getattr(config, "weight_block_size", None):
            version = context_of("sglang").engine.parsed
            if phase == "update" and version and version < _FP8_UPDATES_SINCE:
                return f"post-processing of {name} replaced what the loader goes by"
            continue
        return f"{kind} of {name} was not tested with planned loading"
    return ""


def insist_on_fast_load(reason: str, settings: Settings) -> None:
    """Refuse a launch that cannot have the fast load that the user asked for.

    Only the first model of a process, the target: a draft model need not be known.

    Raises:
        WeightliftError: It cannot.
    """
    if reason and settings.fast_load and "fast_load" in settings.asked:
        raise WeightliftError(
            f"fast load was asked for and cannot be had here: {reason}. Leave out "
            "--enable-fast-load (or its variable or YAML key) to have every tensor planned."
        )
