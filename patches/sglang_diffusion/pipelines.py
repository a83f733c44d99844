"""``load_modules``: while the engine builds one component, the files of the next are read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.budget import page_cache_share
from weightlift.loading.errors import WeightliftError
from weightlift.loading.read_ahead import ReadAhead, shards_in
from weightlift.loading.readers import warm_up
from weightlift.loading.session import LoadSession
from weightlift.patches import SGLANG_DIFFUSION

logger = logging.getLogger("weightlift")

_RUNTIME = "sglang.multimodal_gen.runtime"
_MODULE = f"{_RUNTIME}.pipelines_core.composed_pipeline_base"


class PipelineLoad:
    """The load of a pipeline, component by component.

    Args:
        components: Their names, in the order of the pipeline.
        by_size: Whether the engine loads the largest first.

    Attributes:
        session: The load of the component that is on, if it goes by plan.
        ahead: What reads the files of later ones.
    """

    def __init__(self, components: Sequence[str], *, by_size: bool) -> None:
        self.session: LoadSession | None = None
        self.ahead = ReadAhead(self._is_busy, page_cache_share())
        self._components = components
        self._by_size = by_size
        self._is_known = False

    def begin(self, component: str) -> None:
        """A component begins to load from this folder; the first one tells where the others are."""
        if not self._is_known and os.environ.get("LOCAL_RANK", "0") == "0":
            self._is_known = True
            root = Path(component).parent
            found = [shards_in(root / name) for name in self._components]
            if self._by_size:
                found.sort(key=lambda files: -sum(file.stat().st_size for file in files))
            self.ahead.add(file for files in found for file in files)

    def _is_busy(self) -> bool:
        session = self.session
        return session is not None and not session.delivery.is_idle


_current: list[PipelineLoad] = []


def current_load() -> PipelineLoad | None:
    """The load of a pipeline that is on in this process, if one is."""
    return _current[-1] if _current else None


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
    load = PipelineLoad(instance.required_config_modules, by_size=by_size)
    _current.append(load)
    try:
        with load.ahead:
            return wrapped(*args, **kwargs)
    finally:
        _current.remove(load)


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
        how="With `--enable-parallel-module-load` a thread brings the files of later components into "
        "the page cache, as far as they are not there, whenever no load reads.",
        upstream="sgl-project/sglang#19092 is open.",
        drop_when="The engine reads ahead by itself.",
    ),
)
