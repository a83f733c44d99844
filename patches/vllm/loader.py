"""``DefaultModelLoader``: its weights come lazily, and readers put them in place.

``load_weights`` makes the iterator and runs the model's own ``load_weights`` on it; what the loader
imported as safetensors iterators gives lazy tensors meanwhile.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.settings import Settings
from weightlift.patches import VLLM
from weightlift.patches.planned import ITERATOR_NOTES, ModelLoad, safetensors_iterator

_MODULE = "vllm.model_executor.model_loader.default_loader"
_FORMATS = ("auto", "hf", "safetensors", "mistral")


def _load_weights(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Load by plan if this load allows it, else as the engine does."""
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    config = call["model_config"]
    load = ModelLoad(
        "vllm",
        call["model"],
        str(config.model),
        functools.partial(wrapped, *args, **kwargs),
    )
    settings = with_engine_config(context_of("vllm").settings(), instance.load_config)
    refusal = refusal_of(instance.load_config, settings)
    if config.quantization is not None and not is_stored_fp8(config):
        refusal = refusal or f"{config.quantization} was not tested with planned loading"
    if type(instance).__name__ != "DefaultModelLoader":
        refusal = refusal or f"{type(instance).__name__} has ways of its own"
    return load.run(settings, refusal)


def with_engine_config(settings: Settings, load_config: Any) -> Settings:
    """Threads of the engine's own configuration count where our option was not given."""
    given = load_config.model_loader_extra_config
    threads = given.get("num_threads") if isinstance(given, Mapping) else None
    return settings.with_threads(threads)


def refusal_of(given: Any, settings: Settings) -> str:
    """Why a load by the engine's configuration of loads is left to it, or ''."""
    wanted = str(getattr(given.load_format, "value", given.load_format))
    if not settings.multithread_load:
        return "multithread load is switched off"
    if wanted not in _FORMATS:
        return f"--load-format {wanted} has ways of its own"
    if given.safetensors_load_strategy not in (None, "lazy"):
        return f"--safetensors-load-strategy {given.safetensors_load_strategy} was asked for"
    return ""


def is_stored_fp8(config: Any) -> bool:
    """Whether the checkpoint itself is in FP8, with a scale for each block, as DeepSeek-V3's is."""
    stored = getattr(config.hf_config, "quantization_config", None)
    if config.quantization != "fp8" or not isinstance(stored, Mapping):
        return False
    is_plain = stored.get("quant_method") == "fp8" and not stored.get("store_dtype")
    return is_plain and bool(stored.get("weight_block_size"))


PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{_MODULE}:DefaultModelLoader.load_weights",
        versions=VLLM.versions,
        wrapper=_load_weights,
        parameters=("model", "model_config"),
        why="The engine copies tensor by tensor on one thread while it reads.",
        how="Gives the model's own `load_weights` lazy tensors, waits for the last byte, and repeats "
        "the load natively if it cannot be planned.",
        upstream="Nothing of the kind is proposed.",
        drop_when="The engine offers a loader interface that its own `--load-format auto` uses.",
    ),
    Patch(
        target=f"{_MODULE}:safetensors_weights_iterator",
        versions=VLLM.versions,
        wrapper=safetensors_iterator,
        parameters=("hf_weights_files",),
        **ITERATOR_NOTES,
    ),
    Patch(
        target=f"{_MODULE}:multi_thread_safetensors_weights_iterator",
        versions=VLLM.versions,
        wrapper=safetensors_iterator,
        parameters=("hf_weights_files",),
        **ITERATOR_NOTES,
    ),
)
