"""``DiffusersPipelineLoader``: the weights of a diffusion pipeline come lazily.

Every release has ``load_weights``, which makes one stream of all the sources of the pipeline, and
makes it of the iterators under the names that the module imported. A plan takes all sources, so
that the readers go from one to the next without a pause. Before that, ``load_model`` has the pipeline
build itself and load other components; their files are read ahead.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.budget import page_cache_share
from weightlift.loading.read_ahead import ReadAhead, shards_in
from weightlift.loading.settings import Settings
from weightlift.patches import VLLM_OMNI
from weightlift.patches.planned import ITERATOR_NOTES, ModelLoad, safetensors_iterator

_MODULE = "vllm_omni.diffusion.model_loader.diffusers_loader"

_DEFAULT_THREADS = 4
"""What the engine says from 0.18 on where nobody chose: taken for no choice. On an H100 with 16 cores
four readers reached 52 % of the ceiling for 41 GB of bfloat16, twelve 83 %."""


_aheads: list[ReadAhead] = []
"""What reads ahead for the pipeline that is being built in this process, if one is."""


def _load_model(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Build and load a pipeline as the engine does, and read ahead until its own weights load."""
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    config = call.get("od_config") or instance.od_config
    with ReadAhead(lambda: False, page_cache_share()) as ahead:
        settings = context_of("vllm_omni").settings()
        if settings.multithread_load and not _is_off(config, settings) and _is_first_of_host():
            ahead.add(_shards(str(config.model)))
        _aheads.append(ahead)
        try:
            return wrapped(*args, **kwargs)
        finally:
            _aheads.remove(ahead)


def _is_first_of_host() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _shards(model: str) -> list[Path]:
    """Those of all components of a pipeline that is on this host; transformers, which are built
    before they are loaded, last."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache  # which every engine brings along

        index = try_to_load_from_cache(model, "model_index.json")
        if not isinstance(index, str):
            return []
        folder = Path(index).parent
    parts = sorted(part for part in folder.iterdir() if part.is_dir())
    components = sorted(parts, key=lambda part: part.name.startswith("transformer"))
    return [shard for component in components for shard in shards_in(component)]


def _load_weights(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Load by plan if this load allows it, else as the engine does."""
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    model, config = call["model"], getattr(instance, "od_config", None)
    settings = context_of("vllm_omni").settings()
    _tell(config, settings)
    settings = settings.with_threads(_threads(config))
    refusal = _refusal(call, config, settings)
    for ahead in _aheads:
        ahead.end()
    load = functools.partial(wrapped, *args, **kwargs)
    by_plan = ModelLoad("vllm_omni", model, _path(model), load, all_wait=True)
    return by_plan.run(settings, refusal)


def _tell(config: Any, settings: Settings) -> None:
    """Put our options where the engine looks, should it load by itself: 0.22 loses them on the way.

    https://github.com/vllm-project/vllm-omni/issues/4040
    """
    for option, theirs in (
        ("multithread_load", "enable_multithread_weight_load"),
        ("num_load_threads", "num_weight_load_threads"),
    ):
        if option in settings.asked and hasattr(config, theirs):
            setattr(config, theirs, getattr(settings, option))


def _is_off(config: Any, settings: Settings) -> bool:
    """Whether the stage's configuration switches it off, and nobody said otherwise."""
    is_off = getattr(config, "enable_multithread_weight_load", True) is False
    return is_off and "multithread_load" not in settings.asked


def _threads(config: Any) -> int | None:
    """The readers that the user chose through the engine's own flag, if any."""
    threads = getattr(config, "num_weight_load_threads", None)
    return None if threads == _DEFAULT_THREADS else threads


def _refusal(call: Any, config: Any, settings: Settings) -> str:
    """Why this load is left to the engine, or ''."""
    if not settings.multithread_load:
        return "multithread load is switched off"
    if _is_off(config, settings):
        return "multithread load is switched off in the stage's configuration"
    if call.get("stream_online_quant_to_cpu"):
        return "its layers are quantised and moved one by one"
    if getattr(config, "quantization_config", None) is not None:
        return "quantised weights were not tested with planned loading"
    return ""


def _path(model: Any) -> str:
    """Where the pipeline's weights come from."""
    sources = list(getattr(model, "weights_sources", ()))
    return str(sources[0].model_or_path) if sources else ""


PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{_MODULE}:DiffusersPipelineLoader.load_model",
        versions=VLLM_OMNI.versions,
        wrapper=_load_model,
        parameters=("load_device",),
        why="Pipelines load text encoders and VAEs by `from_pretrained`, one after the other, from files "
        "that may be cold; meanwhile nothing else is read.",
        how="A thread brings the files of all components into the page cache, as far as they are not "
        "there, until the pipeline's own weights load.",
        upstream="Nothing of the kind is proposed.",
        drop_when="The engine reads ahead by itself.",
    ),
    Patch(
        target=f"{_MODULE}:DiffusersPipelineLoader.load_weights",
        versions=VLLM_OMNI.versions,
        wrapper=_load_weights,
        parameters=("model",),
        why="The engine copies tensor by tensor on one thread while it reads, casts float32 weights "
        "on that thread too, and loads one component after the other.",
        how="Gives the pipeline's own `load_weights` lazy tensors, waits for the last byte, and "
        "repeats the load natively if it cannot be planned.",
        upstream="vllm-project/vllm-omni#5105 and #6478 propose pinned staging; neither is merged.",
        drop_when="The engine's own loader reads all components at the speed of the hardware.",
    ),
    Patch(
        target=f"{_MODULE}:safetensors_weights_iterator",
        versions=VLLM_OMNI.versions,
        wrapper=safetensors_iterator,
        parameters=("hf_weights_files",),
        **ITERATOR_NOTES,
    ),
    Patch(
        target=f"{_MODULE}:multi_thread_safetensors_weights_iterator",
        versions=">=0.18,<0.33",
        wrapper=safetensors_iterator,
        parameters=("hf_weights_files",),
        **ITERATOR_NOTES,
    ),
)
