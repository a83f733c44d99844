"""``update_weights_from_disk``: on all ranks or on none, and never a mixture in silence."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.control import Control
from weightlift.loading.transaction import Transaction, within
from weightlift.patches.sglang.history import history_of
from weightlift.patches.sglang.sharing import parallel_state

logger = logging.getLogger("weightlift")

RUNNER = "sglang.srt.model_executor.model_runner"
UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater"

_FORMATS = ("auto", "safetensors", "pt", "fastsafetensors")
"""Formats of ``DefaultModelLoader``; the loaders of others load in ways of their own."""

OLD_WEIGHTS = "The old weights are still in place."


def _update_weights_from_disk(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, str]:
    """Update in two phases; if it fails after all, bring the old weights back.

    Raises:
        RuntimeError: They cannot be had, and there is no server to say so in our place.
    """
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    if not _is_joint(call):
        done: tuple[bool, str] = wrapped(*args, **kwargs)
        return done
    model, is_draft = _model(instance), _is_draft(instance)
    before = history_of(model)
    path, load_format = before.path, before.load_format
    config_path = instance.model_config.model_path
    transaction = Transaction(_vote, is_whole=not is_draft)
    with within(transaction):
        is_updated, message = _tried(wrapped, *args, **kwargs)
        transaction.end("" if is_updated else message)
    control = Control.inherited()
    if not transaction.failure:
        if control is not None:
            control.mark_whole(id(model))
        return is_updated, message
    instance.model_config.model_path = config_path
    which = " of the draft model" if is_draft else ""
    failure = f"Failed to update weights{which}: {transaction.failure}."
    logger.error("weightlift: %s", failure)
    if control is not None and _stages() > 1:
        control.mark_broken(id(model), f"{failure} Other pipeline stages may have been updated.")
    if not transaction.may_have_written:
        return False, f"{failure} {OLD_WEIGHTS}"
    call.arguments.update(model_path=path, load_format=load_format)
    problem = _bring_back(wrapped, call, path)
    if not problem:
        return False, f"{failure} The weights of {path} were loaded again."
    before.path = ""
    failure = (
        f"{failure} The weights before could not be loaded again ({problem}), so this server holds "
        "parts of two checkpoints. Update it from a whole one, or restart it."
    )
    if control is None:
        raise RuntimeError(failure)
    control.mark_broken(id(model), failure)
    return False, failure


def _is_joint(call: inspect.BoundArguments) -> bool:
    """Whether every rank of the group gets this update, and from a loader that we know."""
    load_format = call.arguments["load_format"]
    elastic = sys.modules.get("sglang.srt.elastic_ep.elastic_ep")
    return (
        context_of("sglang").settings().multithread_load
        and str(getattr(load_format, "value", load_format)) in _FORMATS
        # Ranks that lost experts read some, or all, by themselves.
        and call.arguments.get("weight_name_filter") is None
        and (elastic is None or elastic.ElasticEPStateManager.instance() is None)
    )


def _bring_back(wrapped: Callable[..., Any], call: inspect.BoundArguments, path: str) -> str:
    """Load the checkpoint before, on every rank; why that failed on any, or ''."""
    again = Transaction(_vote)
    with within(again):
        is_back, message = False, "they are not those of a checkpoint"
        if path:
            is_back, message = _tried(wrapped, *call.args, **call.kwargs)
        again.end("" if is_back else message)
    return again.failure


def _update_otherwise(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Note that the weights are no longer those of the checkpoint that was loaded last."""
    history_of(_model(instance)).path = ""
    return wrapped(*args, **kwargs)


def _model(instance: Any) -> torch.nn.Module:
    """The model of a ``ModelRunner``, or of its ``WeightUpdater``."""
    found: torch.nn.Module = instance.model if hasattr(instance, "model") else instance.get_model()
    return found


def _is_draft(instance: Any) -> bool:
    runner = instance.get_model_runner() if hasattr(instance, "get_model_runner") else instance
    return bool(getattr(runner, "is_draft_worker", False))


def _tried(wrapped: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """What the engine's update returns; an error becomes a message, for other ranks wait."""
    try:
        done: tuple[bool, str] = wrapped(*args, **kwargs)
        return done
    except Exception as error:
        logger.exception("weightlift: the update failed")
        return False, f"{type(error).__name__}: {error}" if str(error) else repr(error)


def _group() -> Any:
    """The ranks that get every update together: the engine's tensor-parallel group."""
    return parallel_state().get_tp_group()


def _stages() -> int:
    """Pipeline stages. They get an update one after the other, so they cannot vote together."""
    found: int = parallel_state().get_pp_group().world_size
    return found


def _vote(problem: str) -> list[str]:
    """This rank's problem and those of the others of its group."""
    group = _group()
    if group.world_size == 1:
        return [problem]
    problems = [""] * group.world_size
    torch.distributed.all_gather_object(problems, problem, group=group.cpu_group)
    return problems


_NOTES: dict[str, Any] = {
    "wrapper": _update_weights_from_disk,
    "parameters": ("model_path", "load_format"),
    "why": "Nothing is checked before parameters are written; a rank that fails alone is not "
    "noticed; and the rollback reads the new checkpoint once more.",
    "how": "The ranks agree to begin once each has checked its files and made its plan, and agree "
    "on the end. After a failure the checkpoint before is loaded again, if anything was written.",
    "upstream": "sgl-project/sglang#30749 and #30761 name the rollback; both are closed.",
    "drop_when": "The engine checks before it writes, on every rank, and rolls back.",
}

_OTHERWISE: dict[str, Any] = {
    "wrapper": _update_otherwise,
    "parameters": (),
    "why": "Weights that a trainer sent are in no checkpoint, so none can bring them back.",
    "how": "Forgets the checkpoint that was loaded last.",
    "upstream": "Nothing of the kind is proposed.",
    "drop_when": "The patch of `update_weights_from_disk` goes.",
}


def _otherwise(owner: str, method: str, versions: str) -> Patch:
    return Patch(target=f"{owner}.{method}", versions=versions, **_OTHERWISE)


PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{RUNNER}:ModelRunner.update_weights_from_disk",
        versions=">=0.4.9.post2,<0.5.16",
        **_NOTES,
    ),
    Patch(
        target=f"{UPDATER}:WeightUpdater.update_weights_from_disk",
        versions=">=0.5.16,<0.5.24",
        **_NOTES,
    ),
    _otherwise(f"{RUNNER}:ModelRunner", "update_weights_from_tensor", ">=0.4.9.post2,<0.5.16"),
    _otherwise(f"{RUNNER}:ModelRunner", "update_weights_from_distributed", ">=0.4.9.post2,<0.5.16"),
    _otherwise(f"{RUNNER}:ModelRunner", "update_weights_from_ipc", ">=0.5.4,<0.5.16"),
    _otherwise(f"{UPDATER}:WeightUpdater", "update_weights_from_tensor", ">=0.5.16,<0.5.24"),
    _otherwise(f"{UPDATER}:WeightUpdater", "update_weights_from_distributed", ">=0.5.16,<0.5.21"),
    _otherwise(f"{UPDATER}:WeightUpdater", "load_weights_from_distributed", ">=0.5.21,<0.5.24"),
    _otherwise(f"{UPDATER}:WeightUpdater", "update_weights_from_ipc", ">=0.5.16,<0.5.24"),
)
