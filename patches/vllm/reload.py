"""``reload_weights`` of vLLM from 0.18 on: new weights into a running model, module by module.

The engine puts the whole model on the meta device, has its ``load_weights`` run on that while it keeps
what it is given, and loads each module for real once all of its weights are there: into new memory, from
where it is copied to where the kernels know it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.errors import CheckpointError, WeightliftError
from weightlift.loading.leftovers import meta_names
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession, NamedWeights
from weightlift.loading.settings import Settings
from weightlift.patches.planned import report_of
from weightlift.patches.shadow import shadowed
from weightlift.patches.vllm.loader import refusal_of, with_engine_config

logger = logging.getLogger("weightlift")


def _reload_weights(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Reload by plan from files; what a trainer hands over goes in as the engine does it."""
    if instance is None:  # runners of another class borrow this method, from 0.22 to 0.31
        instance, args = args[0], args[1:]
        wrapped = functools.partial(wrapped, instance)
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    is_from_files = call.get("weights_iterator") is None and call.get("is_checkpoint_format", True)
    if not is_from_files:
        return wrapped(*args, **kwargs)
    model = instance.get_model()
    config = getattr(instance, "model_config", None) or instance.vllm_config.model_config
    load_config = getattr(instance, "load_config", None) or instance.vllm_config.load_config
    settings = with_engine_config(context_of("vllm").settings(), load_config)
    path = str(call.get("weights_path") or config.model)
    report = report_of("vllm", path, "update", type(model).__name__)
    refusal = refusal_of(load_config, settings)
    if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        refusal = refusal or _NO_FILES  # before any weight is replaced
    if config.quantization is not None:
        refusal = refusal or f"{config.quantization} was not tested with planned reloads"
    if refusal:
        report.fall_back(settings.insist(refusal))
        result = wrapped(*args, **kwargs)
    else:
        result = _by_plan(wrapped, args, kwargs, model, settings, report)
    report.finish(settings)
    return result


def _by_plan(
    wrapped: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    model: torch.nn.Module,
    settings: Settings,
    report: LoadReport,
) -> Any:
    """Reload with lazy tensors; if that cannot be, with real ones."""
    session = LoadSession(settings, report, all_wait=True)
    was_meta = frozenset() if model in _emptied else meta_names(model)

    def load_weights(original: Any, weights: NamedWeights) -> Any:
        with session.armed():
            result = original(session.guard(weights))
        session.end()  # the engine copies on what it was given, whether all was taken or not
        return result

    try:
        with session:
            with shadowed(model, "load_weights", load_weights):
                result = wrapped(*args, **kwargs)
            session.finish(model, was_meta)
    except CheckpointError:
        _leave(model, report)
        raise
    except Exception as error:  # noqa: BLE001 - told, and the engine reloads by itself
        try:
            report.fall_back(settings.insist(str(session.aborted or repr(error))))
        except WeightliftError:
            _leave(model, report)
            raise
        _put_back(model)
        _emptied.add(model)  # unless this succeeds
        result = wrapped(*args, **kwargs)
    else:
        if not report.tensors:
            report.fall_back(settings.insist(_NO_FILES))
    _emptied.discard(model)
    return result


_NO_FILES = "it has no safetensors files"

_emptied: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
"""Models that a reload left without weights: what the engine set aside may be of two checkpoints."""


def _leave(model: torch.nn.Module, report: LoadReport) -> None:
    """After an error: the weights before if this is the only rank and nothing was read, else none.

    Modules, or ranks, would be of two checkpoints otherwise, and the server would go on.
    """
    distributed = torch.distributed
    is_alone = not distributed.is_initialized() or distributed.get_world_size() == 1
    _put_back(model)
    if is_alone and report.bytes_needed == 0 and model not in _emptied:
        logger.error("weightlift: the reload failed; the model is as it was")
    else:
        _layerwise().initialize_layerwise_reload(model)
        _emptied.add(model)
        logger.error(
            "weightlift: the reload failed and left the model without weights; restart it, "
            "or reload a checkpoint that is whole"
        )


def _put_back(model: torch.nn.Module) -> None:
    """Let modules that are not reloaded yet have their weights again, which the engine set aside."""
    engine = _layerwise()
    for layer in model.modules():
        info = engine.get_layerwise_info(layer)
        if info.load_numel_total is not None and info.kernel_tensors is not None:
            engine._place_kernel_tensors(layer, info)
        info.reset()
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload


def _layerwise() -> Any:
    return importlib.import_module("vllm.model_executor.model_loader.reload.layerwise")


def _record(target: str, versions: str) -> Patch:
    return Patch(
        target=target,
        versions=versions,
        wrapper=_reload_weights,
        parameters=("weights_iterator", "weights_path", "is_checkpoint_format"),
        why="The engine copies tensor by tensor on one thread while it reads, and a file that is damaged "
        "leaves a model on the meta device.",
        how="The model's own `load_weights` gets lazy tensors; each module is read as the engine puts it "
        "in place, and what the engine then copies to where the kernels know it waits for up to 1 GiB "
        "of it. After damage that shows before a byte is read, one rank alone has its weights again; "
        "else the model has none, until a reload of a checkpoint that is whole.",
        upstream="Nothing of the kind is proposed.",
        drop_when="The engine's own reload reads at the speed of the hardware.",
    )


PATCHES: tuple[Patch, ...] = (
    _record("vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights", ">=0.18,<0.34"),
    _record("vllm.v1.worker.gpu.model_runner:GPUModelRunner.reload_weights", ">=0.32,<0.34"),
)
