"""``load_modules``: while the engine builds one component, the files of the next are read."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.errors import WeightliftError
from weightlift.loading.readers import warm_up
from weightlift.patches import SGLANG_DIFFUSION
from weightlift.patches.sglang_diffusion.pipeline_load import PipelineLoad

logger = logging.getLogger("weightlift")

_RUNTIME = "sglang.multimodal_gen.runtime"
_MODULE = f"{_RUNTIME}.pipelines_core.composed_pipeline_base"


def _load_modules(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Load the components as the engine does, and read ahead meanwhile."""
    settings = context_of("sglang").settings()
    if not settings.parallel_module_load:
        logger.info(
            "weightlift: the engine loads its components by itself; --enable-parallel-module-load (or "
            "WEIGHTLIFT_PARALLEL_MODULE_LOAD=1) has weightlift do it"
        )
        return wrapped(*args, **kwargs)
    by_size = "order_component_load_specs" in wrapped.__globals__  # from 0.5.13 on
    if torch.cuda.is_available():
        warm_up(torch.device("cuda", torch.cuda.current_device()), settings)
    server_args = inspect.signature(wrapped).bind(*args, **kwargs).arguments["server_args"]
    components = instance.required_config_modules
    with PipelineLoad(components, settings, server_args, by_size=by_size):
        return wrapped(*args, **kwargs)


def _refuse_load_modules(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Load the components as the engine does, unless something else was asked for."""
    context = context_of("sglang")
    if context.settings().parallel_module_load:
        raise WeightliftError(
            f"parallel module load was asked for and cannot be had with SGLang {context.engine.version}: "
            "weightlift loads diffusion pipelines from 0.5.7 on. Upgrade SGLang, or unset "
            "WEIGHTLIFT_PARALLEL_MODULE_LOAD to load with the engine's own loaders."
        )
    return wrapped(*args, **kwargs)


PATCHES: tuple[Patch, ...] = (
    *(
        Patch(
            target=f"{_RUNTIME}.{package}.composed_pipeline_base:ComposedPipelineBase.load_modules",
            versions=versions,
            wrapper=_refuse_load_modules,
            parameters=("server_args",),
            why="Loaders of these releases are of another make, and who asks for parallel module load "
            "would get the engine's without a word.",
            how="Raises an error where parallel module load was asked for; all else is the engine's.",
            upstream="Nothing is proposed for releases this old.",
            drop_when="Releases before 0.5.7 are not supported any more.",
        )
        for package, versions in (
            ("pipelines", ">=0.5.5,<0.5.6"),
            ("pipelines_core", ">=0.5.6,<0.5.7"),
        )
    ),
    Patch(
        target=f"{_MODULE}:ComposedPipelineBase.load_modules",
        versions=SGLANG_DIFFUSION,
        wrapper=_load_modules,
        parameters=("server_args",),
        why="While a component is built, wrapped or pinned nothing is read, and the next one begins "
        "with a cold file.",
        how="With `--enable-parallel-module-load` components share readers, a text encoder that comes "
        "next is read to the GPU behind the transformer, and a thread brings the files of later "
        "components into the page cache, as far as they are not there, whenever no load reads.",
        upstream="sgl-project/sglang#19092 is open.",
        drop_when="The engine reads ahead by itself.",
    ),
)
