"""The component loaders: the engine builds on its own thread, and the bytes move beside it.

Loading several components at once in threads, the obvious way, leaves wrong dtypes behind: a load
changes the default dtype, class methods and the tensor-parallel group of the whole process
(https://github.com/sgl-project/sglang/issues/19092). So nothing of the engine runs anywhere else.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.errors import CheckpointError, PlanAborted
from weightlift.loading.lazy import LazyTensor
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession, NamedWeights, active_session
from weightlift.loading.settings import Settings
from weightlift.patches import SGLANG_DIFFUSION
from weightlift.patches.planned import ITERATOR_NOTES
from weightlift.patches.shadow import shadowed

logger = logging.getLogger("weightlift")

_LOADER = "sglang.multimodal_gen.runtime.loader"


class _Component:
    """A component that is loaded by plan if it can be, else as the engine does."""

    def __init__(self, path: str, settings: Settings) -> None:
        self._damage: CheckpointError | None = None
        self._path = path
        self._settings = settings

    def load(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the loader's own ``load_customized``."""
        report = LoadReport(
            engine="sglang",
            version=context_of("sglang").engine.version,
            phase="launch",
            model_path=self._path,
            rank=rank(),
        )
        reason = _refusal(self._path)
        if reason:
            report.fall_back(reason)
            component = original(*args, **kwargs)
        else:
            component = self._by_plan(report, original, *args, **kwargs)
        if report.tensors or reason:
            report.architecture = type(component).__name__
            report.finish(self._settings.report)
        return component

    def load_native(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the loader's own ``load_native``, where the engine goes from any error."""
        if self._damage is not None:
            raise self._damage
        return original(*args, **kwargs)

    def _by_plan(
        self, report: LoadReport, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        session = LoadSession(self._settings, report, all_wait=True)
        random_before = torch.get_rng_state()
        try:
            with session:
                with session.armed():
                    component = original(*args, **kwargs)
                if isinstance(component, torch.nn.Module):
                    session.finish(component)
            return component
        except CheckpointError as error:
            self._damage = error
            raise
        except Exception as error:
            if not report.tensors:  # nothing of ours was in it
                raise
            reason = str(session.aborted or repr(error))
            logger.warning("weightlift: %s is loaded again by the engine: %s", self._path, reason)
            report.fall_back(reason)
            report.tensors = 1
            torch.set_rng_state(random_before)  # layers are initialised once more
            return original(*args, **kwargs)


def _load(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Have the customised loader of a component see lazy tensors, if that was asked for."""
    settings = context_of("sglang").settings()
    if not settings.parallel_module_load:
        return wrapped(*args, **kwargs)
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    component = _Component(str(call["component_model_path"]), settings)
    with (
        shadowed(instance, "load_customized", component.load),
        shadowed(instance, "load_native", component.load_native),
    ):
        return wrapped(*args, **kwargs)


def rank() -> int:
    """Of this process among those of the engine."""
    distributed = torch.distributed
    is_one_of_many = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if is_one_of_many else 0


def _refusal(path: str) -> str:
    """Why a component is left to the engine, or ''."""
    try:
        config = json.loads(Path(path, "config.json").read_text())
    except (OSError, ValueError):  # a scheduler, a single file; or the engine will tell
        return ""
    if isinstance(config, dict) and config.get("quantization_config"):
        return "quantised weights were not tested with planned loading"
    return ""


def _iterator(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> NamedWeights:
    """Lazy tensors within a planned load, said to be where the stock iterator would bring them."""
    session = active_session()
    if session is None:
        yield from wrapped(*args, **kwargs)
        return
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    checkpoint = session.open(call["hf_weights_files"])
    names = [entry.name for entry in checkpoint.entries()]
    if len(set(names)) < len(names):
        raise session.abort(PlanAborted("several of its files have a tensor of the same name"))
    is_wanted = call.get("key_filter") or bool
    wanted = {name for name in names if is_wanted(name)}
    yield from session.lazies(checkpoint, wanted, _device(wrapped, call))


def _device(iterator: Callable[..., Any], call: dict[str, Any]) -> torch.device:
    """Where the stock iterator would bring the tensors."""
    plan = call.get("weight_load_plan")
    if plan is not None:
        return torch.device(plan.checkpoint_load_device)
    if call.get("to_cpu", True):
        return torch.device("cpu")
    return torch.device(iterator.__globals__["get_local_torch_device"]())


def _load_full_state_dict(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Have every parameter filled before the engine works with them."""
    session = active_session()
    if session is None:
        return wrapped(*args, **kwargs)
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    device = call.get("checkpoint_load_device")
    if device is not None and device.type == "cpu" and torch.cuda.is_available():
        raise session.abort(PlanAborted("its weights stay on the host, mapped"))
    result = wrapped(*args, **kwargs)
    session.adopt(call["model"])
    return result


def _make_param_like(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Give a lazy tensor memory of its own before it becomes a parameter of the right class."""
    parameter, tensor = args
    if isinstance(tensor, LazyTensor):
        tensor = tensor.source.recorder.land(tensor)
    return wrapped(parameter, tensor)


def _load_file(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The tensors of a file, lazily within a planned load."""
    session = active_session()
    if session is None or len(args) != 1 or kwargs:
        return wrapped(*args, **kwargs)
    return dict(session.iterate(args))


_STATE_DICT_NOTES = {
    "why": "The transformer is built on the meta device and gets parameters made of what it is offered.",
    "how": "Within a planned load such parameters get memory on their device, which readers fill; "
    "all are filled before the engine goes on.",
    "upstream": "Nothing is proposed.",
    "drop_when": "The engine's own loader reads at the speed of the hardware.",
}

_COMPONENT_NOTES = {
    "why": "Components load one after the other, from pageable memory: 63 of the 77 s in which a "
    "Qwen-Image server starts (sgl-project/sglang#19087).",
    "how": "With `--enable-parallel-module-load` the loader of each component gets lazy tensors. If it "
    "cannot do with them it loads again with real ones; a damaged file is an error and not a reason "
    "to load the native component.",
    "upstream": "sgl-project/sglang#19092 is open; #19114, loaders in threads, was closed.",
    "drop_when": "The engine loads its components at the speed of the hardware.",
}
_FILE_NOTES = {
    "why": "It reads the whole file into pageable memory.",
    "how": "Within a planned load it gives lazy tensors.",
    "upstream": "From 0.5.20 on the engine's loader of VAEs takes the iterator.",
    "drop_when": "Releases before 0.5.20 are not supported any more.",
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
    *(
        Patch(
            target=f"{_LOADER}.{module}:safetensors_load_file",
            versions=versions,
            wrapper=_load_file,
            parameters=("filename",),
            **_FILE_NOTES,
        )
        for module, versions in (
            ("component_loader", ">=0.5.7,<0.5.9"),
            ("component_loaders.vae_loader", ">=0.5.9,<0.5.19"),
        )
    ),
    Patch(
        target=f"{_LOADER}.weight_utils:safetensors_weights_iterator",
        versions=SGLANG_DIFFUSION,
        wrapper=_iterator,
        parameters=("hf_weights_files",),
        **{**ITERATOR_NOTES, "upstream": "sgl-project/sglang#34064 reads slices of a rank."},
    ),
    Patch(
        target=f"{_LOADER}.fsdp_load:load_model_from_full_model_state_dict",
        versions=SGLANG_DIFFUSION,
        wrapper=_load_full_state_dict,
        parameters=("model",),
        **_STATE_DICT_NOTES,
    ),
    Patch(
        target=f"{_LOADER}.fsdp_load:_make_param_like",
        versions=">=0.5.8,<0.5.24",
        wrapper=_make_param_like,
        parameters=("actual_param", "tensor"),
        **_STATE_DICT_NOTES,
    ),
)
