"""``DefaultModelLoader``: its weights come lazily, and readers put them in place.

The seams are the same in every release from 0.4.9.post2: the static
``load_weights_and_postprocess`` that every load goes through; and, in ``weights``, the two methods
that make the iterator it gets, and the safetensors iterators under the names that ``loader.py``
imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.errors import CheckpointError, UpdateRefused
from weightlift.loading.exchange import Exchange
from weightlift.loading.readers import warm_up
from weightlift.loading.report import LoadReport
from weightlift.loading.settings import Settings
from weightlift.loading.stager import start_stager
from weightlift.loading.transaction import Transaction, active_transaction
from weightlift.patches.planned import report_of
from weightlift.patches.sglang import weights as weights_module
from weightlift.patches.sglang.architectures import unknown_to_fast_load
from weightlift.patches.sglang.history import has_others, history_of, known_recordings
from weightlift.patches.sglang.planned import PlannedLoad
from weightlift.patches.sglang.refusals import (
    insist_on_fast_load,
    loader_refusal,
    refusal,
)
from weightlift.patches.sglang.sharing import exchange_for
from weightlift.patches.sglang.weights import (
    RestartableWeights,
    extra_config,
    load_format,
    wants_fast_load,
)


def _load_weights_and_postprocess(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Load by plan if this load allows it, else as the engine does; either way, report."""
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    model, weights = call.arguments["model"], call.arguments["weights"]
    transaction = active_transaction()
    if transaction and transaction.failure:
        # The engine's own rollback would read the new checkpoint again. The old weights are in
        # place, or come back when the ranks agreed on it; what was unpacked for them is packed.
        postprocess = getattr(type(weights.loader), "postprocess_weights", lambda *_: None)
        return postprocess(model, call.arguments["target_device"])
    settings, report = context_of("sglang").settings(), _report(model, weights)
    device = torch.device(call.arguments["target_device"])
    # Weights of some other making come while the server runs, to bring experts back.
    is_ours = isinstance(weights, RestartableWeights)
    exchange = exchange_for(report, device, settings) if is_ours else None
    with exchange or nullcontext():
        try:
            result = _load(wrapped, call, settings, report, exchange)
        except Exception as error:
            if transaction:
                _tell(transaction, error)  # the vote comes first, on every rank
            raise
    _note(model, weights, settings, report, device)
    return result


def _load(
    wrapped: Callable[..., Any],
    call: inspect.BoundArguments,
    settings: Settings,
    report: LoadReport,
    exchange: Exchange | None,
) -> Any:
    model, weights = call.arguments["model"], call.arguments["weights"]
    reason = refusal(model, weights, torch.device(call.arguments["target_device"]), settings)
    is_ours = isinstance(weights, RestartableWeights)
    if is_ours and report.phase == "launch" and not has_others(model):
        insist_on_fast_load(reason or unknown_to_fast_load(model), settings)
    if reason:
        report.fall_back(settings.insist(reason) if is_ours else reason)
        return _load_natively(wrapped, call, exchange)
    return _load_by_plan(wrapped, call, settings, report, exchange)


def _note(
    model: Any, weights: Any, settings: Settings, report: LoadReport, device: torch.device
) -> None:
    """Keep and tell what was loaded."""
    if report.model_path:
        history = history_of(model)
        history.path = report.model_path
        history.load_format = load_format(weights.loader)
    report.finish(settings)
    if report.phase == "launch" and settings.multithread_load:
        start_stager(report.rank, settings, known_recordings, pinned=device.type == "cuda")


def _load_natively(
    wrapped: Callable[..., Any], call: inspect.BoundArguments, exchange: Exchange | None
) -> Any:
    """Load as the engine does; in an update, once all ranks agreed to begin."""
    transaction = active_transaction()
    if transaction:
        transaction.begin()
    if exchange:
        exchange.decline("it loads as the engine does")
    return wrapped(*call.args, **call.kwargs)


def _load_by_plan(
    wrapped: Callable[..., Any],
    call: inspect.BoundArguments,
    settings: Settings,
    report: LoadReport,
    exchange: Exchange | None,
) -> Any:
    """Load with lazy tensors; if the loader cannot do with them, load again with real ones."""
    model, weights = call.arguments["model"], call.arguments["weights"]
    planned = PlannedLoad(model, _with_engine_config(settings, weights.loader), report, exchange)
    try:
        with planned.replacing_load_weights():
            result = wrapped(*call.args, **call.kwargs)
    except Exception as error:
        # A damaged file stays damaged, and post-processing must not run twice. Anything else
        # may be a lazy tensor's fault; what is not fails again, with this error as its context.
        if planned.session.is_finished or isinstance(error, (CheckpointError, UpdateRefused)):
            raise
        report.fall_back(settings.insist(str(planned.session.aborted or repr(error))))
        call.arguments["weights"] = weights.restart()
        return _load_natively(wrapped, call, exchange)
    if not report.tensors:
        report.fall_back(settings.insist("it has no safetensors files"))
    return result


def _tell(transaction: Transaction, error: Exception) -> None:
    """Keep the other ranks from beginning, if they have not; all hear of it at the end.

    Raises:
        UpdateRefused: Nothing was written on any rank.
    """
    problem = str(error) or repr(error)
    transaction.begin(problem)
    transaction.fail(problem)


def _load_model(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Pin staging memory while the engine constructs the model."""
    settings = context_of("sglang").settings()
    if settings.multithread_load and not loader_refusal(instance):
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        device = torch.device(call["device_config"].device)
        warm_up(device, _with_engine_config(settings, instance))
    return wrapped(*args, **kwargs)


def _with_engine_config(settings: Settings, loader: Any) -> Settings:
    """What stands in the engine's own configuration counts where our option was not given."""
    fast = wants_fast_load(loader)
    if fast is not None and "fast_load" not in settings.asked:
        settings = replace(settings, fast_load=fast)
    return settings.with_threads(extra_config(loader).get("num_threads"))


def _report(model: torch.nn.Module, weights: Any) -> LoadReport:
    is_known = isinstance(weights, RestartableWeights)
    path, phase = (weights.model_path, weights.phase) if is_known else ("", "")
    return report_of("sglang", path, phase, type(model).__name__)


PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{weights_module.MODULE}:DefaultModelLoader.load_weights_and_postprocess",
        versions=weights_module.VERSIONS,
        wrapper=_load_weights_and_postprocess,
        parameters=("model", "weights", "target_device"),
        why="Every launch and every update from disk goes through here, and knows neither where "
        "its weights come from nor how to start over.",
        how="Arms a load session around `model.load_weights`, waits for its last byte before "
        "post-processing, and repeats the load natively if it cannot be planned.",
        upstream="Nothing of the kind is proposed.",
        drop_when="The engine offers a loader interface that its own `--load-format auto` uses.",
    ),
    Patch(
        target=f"{weights_module.MODULE}:DefaultModelLoader.load_model",
        versions=weights_module.VERSIONS,
        wrapper=_load_model,
        parameters=("model_config", "device_config"),
        why="A first load waits for its pinned memory, though the model was being constructed.",
        how="Starts pinning in the background when the engine starts constructing.",
        upstream="Nothing of the kind is proposed.",
        drop_when="The patch of `load_weights_and_postprocess` goes.",
    ),
    *weights_module.PATCHES,
)
