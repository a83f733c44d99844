"""The component loaders: the engine builds on its own thread, and the bytes move beside it.

Loading several components at once in threads, the obvious way, leaves wrong dtypes behind: a load
changes the default dtype, class methods and the tensor-parallel group of the whole process
(https://github.com/sgl-project/sglang/issues/19092). So nothing of the engine runs anywhere else.
"""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.errors import CheckpointError, PlanAborted
from weightlift.loading.session import LoadSession
from weightlift.loading.settings import Settings
from weightlift.patches.planned import report_of
from weightlift.patches.sglang_diffusion.pipeline_load import current_load, refusal_of
from weightlift.patches.shadow import shadowed

logger = logging.getLogger("weightlift")

_LOADER = "sglang.multimodal_gen.runtime.loader"


class _Component:
    """A component that is loaded by plan if it can be, else as the engine does."""

    def __init__(self, path: str, settings: Settings) -> None:
        self._damage: CheckpointError | None = None
        self._path = path
        self._settings = settings
        self._pipeline = current_load()

    def load(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the loader's own ``load_customized``."""
        session = self._session()
        report, reason = session.report, refusal_of(Path(self._path))
        if reason:
            report.fall_back(reason)
            component = original(*args, **kwargs)
        else:
            component = self._by_plan(session, original, *args, **kwargs)
        if report.tensors or report.fallback_reason:
            report.architecture = type(component).__name__
            report.finish(self._settings)
        return component

    def load_native(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the loader's own ``load_native``, where the engine goes from any error."""
        if self._damage is not None:
            raise self._damage
        return original(*args, **kwargs)

    def _session(self) -> LoadSession:
        if self._pipeline is not None:
            return self._pipeline.session_for(self._path)
        report = report_of("sglang", self._path, "launch")
        return LoadSession(self._settings, report, all_wait=True)

    def _by_plan(
        self, session: LoadSession, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        put_back = _process_state()
        try:
            return self._planned(session, original, *args, **kwargs)
        except CheckpointError as error:
            self._damage = error
            raise
        except PlanAborted as error:
            reason = str(error)
        # The error is gone, and with its traceback the session and the component that was half built.
        logger.warning("weightlift: %s is loaded again by the engine: %s", self._path, reason)
        session.report.fall_back(reason)
        gc.collect()
        put_back()  # layers are initialised once more
        return original(*args, **kwargs)

    def _planned(
        self, session: LoadSession, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Load once, by plan.

        Raises:
            PlanAborted: That cannot be, whatever the loader made of it.
            CheckpointError: A file is damaged.
        """
        report = session.report
        try:
            with self._pipeline.on(session) if self._pipeline else nullcontext(), session:
                with session.armed():
                    component = original(*args, **kwargs)
                if isinstance(component, torch.nn.Module):
                    session.finish(component)
                elif report.tensors:
                    raise session.abort(PlanAborted(f"{type(component).__name__} is no module"))
            return component
        except CheckpointError:
            raise
        except Exception as error:
            is_ours = report.tensors or session.aborted or session.begun
            if not is_ours:
                raise
            raise PlanAborted(str(session.aborted or repr(error))) from error


def _load(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Have the customised loader of a component see lazy tensors, if that was asked for."""
    settings = context_of("sglang").settings()
    if not settings.parallel_module_load:
        return wrapped(*args, **kwargs)
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    path = str(call["component_model_path"])
    component, pipeline = _Component(path, settings), current_load()
    if pipeline is not None:
        pipeline.begin(path)
    with (
        shadowed(instance, "load_customized", component.load),
        shadowed(instance, "load_native", component.load_native),
    ):
        return wrapped(*args, **kwargs)


def _process_state() -> Callable[[], None]:
    """What puts back what a load that fails leaves changed: up to 0.5.8 the default dtype, too."""
    dtype, random = torch.get_default_dtype(), torch.get_rng_state()
    on_device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def put_back() -> None:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(random)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device)

    return put_back


_COMPONENT_NOTES = {
    "why": "Components load one after the other, from pageable memory: 63 of the 77 s in which a "
    "Qwen-Image server starts (sgl-project/sglang#19087).",
    "how": "With `--enable-parallel-module-load` the loader of each component gets lazy tensors. If it "
    "cannot do with them it loads again with real ones; a damaged file is an error and not a reason "
    "to load the native component.",
    "upstream": "sgl-project/sglang#19092 is open; #19114, loaders in threads, was closed.",
    "drop_when": "The engine loads its components at the speed of the hardware.",
}
PATCHES: tuple[Patch, ...] = (
    *(
        Patch(
            target=f"{_LOADER}.{module}:ComponentLoader.load",
            versions=versions,
            wrapper=_load,
            parameters=("component_model_path",),
            **_COMPONENT_NOTES,
        )
        for module, versions in (
            ("component_loader", ">=0.5.7,<0.5.9"),
            ("component_loaders.component_loader", ">=0.5.9,<0.5.24"),
        )
    ),
)
