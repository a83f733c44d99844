"""``update_weights_from_disk``: on all ranks or on none, and never a mixture in silence."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.control import Control
from weightlift.loading.transaction import Transaction, within
from weightlift.patches.sglang.history import history_of

logger = logging.getLogger("weightlift")

RUNNER = "sglang.srt.model_executor.model_runner"
UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater"

OLD_WEIGHTS = "The old weights are still in place."


def _update_weights_from_disk(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, str]:
    """Update in two phases; if it fails after all, bring the old weights back.

    Raises:
        RuntimeError: They cannot be had, and there is no server to say so in our place.
    """
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    # A part of the experts, after ranks were lost: not all ranks take part.
    is_partial = call.arguments.get("weight_name_filter") is not None
    if is_partial or not context_of("sglang").settings().multithread_load:
        done: tuple[bool, str] = wrapped(*args, **kwargs)
        return done
    model = instance.model if hasattr(instance, "model") else instance.get_model()
    before = history_of(model)
    path, load_format = before.path, before.load_format
    config_path = instance.model_config.model_path
    transaction = Transaction(_vote)
    with within(transaction):
        is_updated, message = _tried(wrapped, *args, **kwargs)
        transaction.end("" if is_updated else message)
    control = Control.inherited()
    if not transaction.failure:
        if control is not None:
            control.mark_whole()
        return is_updated, message
    instance.model_config.model_path = config_path
    failure = f"Failed to update weights: {transaction.failure}."
    logger.error("weightlift: %s", failure)
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
    control.mark_broken(failure)
    return False, failure


def _bring_back(wrapped: Callable[..., Any], call: inspect.BoundArguments, path: str) -> str:
    """Load the checkpoint before, on every rank; why that failed on any, or ''."""
    again = Transaction(_vote)
    problem = "they are of no checkpoint"
    if path:
        is_back, message = _tried(wrapped, *call.args, **call.kwargs)
        problem = "" if is_back else message
    again.end(problem)
    return again.failure


def _tried(wrapped: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """What the engine's update returns; an error becomes a message, for other ranks wait."""
    try:
        done: tuple[bool, str] = wrapped(*args, **kwargs)
        return done
    except Exception as error:
        logger.exception("weightlift: the update failed")
        return False, f"{type(error).__name__}: {error}"


def _group() -> Any:
    """The ranks that get every update together: the engine's tensor-parallel group."""
    from sglang.srt.distributed import parallel_state

    return parallel_state.get_tp_group()


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
)
