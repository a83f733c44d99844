"""``DefaultModelLoader``: its weights come lazily, and readers put them in place.

``load_weights`` makes the iterator and runs the model's own ``load_weights`` on it; what the loader
imported as safetensors iterators gives lazy tensors meanwhile. ``reload_weights`` goes past it, to
the iterators alone, and stays the engine's.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.errors import CheckpointError
from weightlift.loading.leftovers import meta_names
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession, NamedWeights, active_session
from weightlift.loading.settings import Settings
from weightlift.patches import VLLM
from weightlift.patches.shadow import shadowed

logger = logging.getLogger("weightlift")

_MODULE = "vllm.model_executor.model_loader.default_loader"
_FORMATS = ("auto", "hf", "safetensors", "mistral")


def _load_weights(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Load by plan if this load allows it, else as the engine does; either way, report."""
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    settings = context_of("vllm").settings()
    if "multithread_load" not in settings.asked:
        logger.info(
            "weightlift: vLLM loads by itself; WEIGHTLIFT_MULTITHREAD_LOAD=1 has weightlift do it, "
            "which is new and was not tried on a GPU"
        )
        return wrapped(*args, **kwargs)
    model, config = call["model"], call["model_config"]
    report = _report(model, str(config.model))
    load = functools.partial(wrapped, *args, **kwargs)
    if reason := _refusal(instance, config, settings):
        report.fall_back(settings.insist(reason))
        result = load()
    else:
        result = _load_by_plan(load, model, settings, report)
    report.finish(settings.report)
    return result


def _report(model: torch.nn.Module, path: str) -> LoadReport:
    distributed = torch.distributed
    is_one_of_many = distributed.is_available() and distributed.is_initialized()
    return LoadReport(
        engine="vllm",
        version=context_of("vllm").engine.version,
        phase="launch",
        model_path=path,
        rank=distributed.get_rank() if is_one_of_many else 0,
        architecture=type(model).__name__,
    )


def _refusal(loader: Any, config: Any, settings: Settings) -> str:
    """Why this load is left to the engine, or ''."""
    given = loader.load_config
    wanted = str(getattr(given.load_format, "value", given.load_format))
    if not settings.multithread_load:
        return "multithread load is switched off"
    if type(loader).__name__ != "DefaultModelLoader":
        return f"{type(loader).__name__} has ways of its own"
    if wanted not in _FORMATS:
        return f"--load-format {wanted} has ways of its own"
    if given.safetensors_load_strategy not in (None, "lazy"):
        return f"--safetensors-load-strategy {given.safetensors_load_strategy} was asked for"
    if config.quantization is not None:
        return f"{config.quantization} was not tested with planned loading"
    return ""


def _load_by_plan(
    load: Callable[[], Any], model: torch.nn.Module, settings: Settings, report: LoadReport
) -> Any:
    """Load with lazy tensors; if the loader cannot do with them, load again with real ones."""
    session = LoadSession(settings, report)
    try:
        with _planned_by(session, model):
            result = load()
    except Exception as error:
        # A damaged file stays damaged. Anything else may be a lazy tensor's fault; what is not
        # fails again, with this error as its context.
        if session.is_finished or isinstance(error, CheckpointError):
            raise
        report.fall_back(settings.insist(str(session.aborted or repr(error))))
        return load()
    if not report.tensors:
        report.fall_back(settings.insist("it has no safetensors files"))
    return result


def _planned_by(session: LoadSession, model: torch.nn.Module) -> AbstractContextManager[None]:
    """Within this, ``model.load_weights`` gets lazy tensors and returns with all in place."""

    def load_weights(original: Any, weights: NamedWeights, *args: Any, **kwargs: Any) -> Any:
        was_meta = meta_names(model)
        with session:
            with session.armed():
                result = original(session.guard(weights), *args, **kwargs)
            session.finish(model, was_meta)
        return result

    return shadowed(model, "load_weights", load_weights)


def _safetensors_iterator(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> NamedWeights:
    """Lazy tensors if a session is armed when the first is asked for, else the stock iterator."""
    session = active_session()
    if session is None:
        yield from wrapped(*args, **kwargs)
        return
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    yield from session.iterate(call["hf_weights_files"])


_ITERATOR_NOTES = {
    "why": "The iterator maps the shards and hands out views: the reading happens page by page in "
    "the engine's copy, on one thread, into pageable memory, also in the multi-thread variant.",
    "how": "Within a planned load it yields lazy tensors whose copies become reads of file windows "
    "by several readers. Outside of one it is the stock iterator.",
    "upstream": "vllm-project/vllm#57973 (safetensors' prefetch) is open.",
    "drop_when": "The engine's iterator reads just the bytes a rank needs, without page faults.",
}

PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{_MODULE}:DefaultModelLoader.load_weights",
        versions=VLLM.versions,
        wrapper=_load_weights,
        parameters=("model", "model_config"),
        why="The engine copies tensor by tensor on one thread while it reads.",
        how="Gives the model's own `load_weights` lazy tensors, waits for the last byte, and repeats "
        "the load natively if it cannot be planned. Only where multithread load was asked for.",
        upstream="Nothing of the kind is proposed.",
        drop_when="The engine offers a loader interface that its own `--load-format auto` uses.",
    ),
    Patch(
        target=f"{_MODULE}:safetensors_weights_iterator",
        versions=VLLM.versions,
        wrapper=_safetensors_iterator,
        parameters=("hf_weights_files",),
        **_ITERATOR_NOTES,
    ),
    Patch(
        target=f"{_MODULE}:multi_thread_safetensors_weights_iterator",
        versions=VLLM.versions,
        wrapper=_safetensors_iterator,
        parameters=("hf_weights_files",),
        **_ITERATOR_NOTES,
    ),
)
