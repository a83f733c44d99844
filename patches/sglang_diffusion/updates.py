"""``update_weights_from_disk`` of a diffusion pipeline: every module is planned before one is written."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.errors import UpdateRefused
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession, active_session
from weightlift.loading.settings import Settings
from weightlift.loading.transaction import Transaction, active_transaction
from weightlift.patches.planned import report_of
from weightlift.patches.sglang_diffusion.modules import complete, is_apart, loads_itself, take
from weightlift.patches.sglang_diffusion.retrace import Retrace
from weightlift.patches.sglang_diffusion.weights import SHARDED, is_sharded
from weightlift.patches.shadow import shadowed

logger = logging.getLogger("weightlift")

_is_updating: ContextVar[bool] = ContextVar("is_updating", default=False)
"""Whether weightlift updates from disk now; updates from tensors may be of a part of a module."""

_WRONG_CHECKPOINT = (AssertionError, KeyError, ValueError)
"""What the engine's loaders raise where shapes or names are others."""

OLD = "sglang.multimodal_gen.runtime.loader.weights_updater"
NEW = "sglang.multimodal_gen.runtime.post_training.weights_updater"
"""Where the engine's updater is, up to 0.5.13 and from 0.5.14 on."""


def _apply_weights(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, str]:
    """Update all modules in one go; what cannot be planned is updated by the engine."""
    settings, transaction = context_of("sglang").settings(), active_transaction()
    if transaction is None:
        done: tuple[bool, str] = wrapped(*args, **kwargs)
        return done
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    modules: dict[str, torch.nn.Module] = dict(call["modules_to_update"])
    report = report_of("sglang", str(next(iter(call["weights_map"].values()), "")), "update")
    report.architecture = ", ".join(type(module).__name__ for module in modules.values())
    apply = functools.partial(wrapped, *args, **kwargs)
    update = _Update(apply, instance, modules, call["weights_map"], transaction)
    before = _is_updating.set(True)
    try:
        if any(is_sharded(module) for module in modules.values()):
            report.fall_back(SHARDED)
            obstacle = _obstacle(modules, translates=_translates(wrapped))
            result = (False, obstacle) if obstacle else update.agreed(update.by_engine)
        else:
            result = update.agreed(lambda: update.by_plan(settings, report))
    finally:
        _is_updating.reset(before)
    if not result[0]:
        report.plan_note = result[1]
    report.finish(settings)
    return result


def _translates(wrapped: Callable[..., Any]) -> bool:
    """Whether the engine translates names in updates, which it does from 0.5.14 on."""
    return "_iter_module_weight_updates" in wrapped.__globals__


def _obstacle(modules: dict[str, torch.nn.Module], *, translates: bool) -> str:
    """Why the engine cannot update these modules by itself, or ''."""
    fused = [name for name, item in modules.items() if is_apart(item) and loads_itself(item)]
    if translates or not fused:
        return ""
    return (
        f"Nothing is updated: {fused[0]} is sharded or on the host, and this release skips its fused "
        "parameters. Update the others (target_modules), or start with --text-encoder-cpu-offload false."
    )


class _Update:
    """One update of several modules, as the engine would do it.

    Args:
        apply: Its ``_apply_weights``, with what that takes.
        updater: Its updater.
        modules: What is updated.
        folders: Where the files of each are.
        transaction: Of all ranks.
    """

    def __init__(
        self,
        apply: Callable[[], tuple[bool, str]],
        updater: Any,
        modules: dict[str, torch.nn.Module],
        folders: dict[str, str],
        transaction: Transaction,
    ) -> None:
        self._apply = apply
        self._updater = updater
        self._modules = modules
        self._folders = folders
        self._transaction = transaction

    def agreed(self, write: Callable[[], tuple[bool, str]]) -> tuple[bool, str]:
        """Write, and have the weights before again if this rank or another could not."""
        try:
            is_done, message = write()
        except UpdateRefused as refused:
            reason = str(refused).rstrip(".")
            return False, f"Nothing is updated: {reason}. The weights before are in place."
        except Exception as error:  # noqa: BLE001 - told as the engine tells its own
            is_done, message = False, _rolled_back(error)
        self._transaction.end("" if is_done else message)
        if not self._transaction.failure:
            return is_done, message
        message = message if not is_done else _rolled_back(self._transaction.failure)
        logger.error("weightlift: %s", message)
        if self._transaction.may_have_written:
            self._updater._rollback(list(self._modules))
        return False, message

    def by_engine(self) -> tuple[bool, str]:
        """Let the engine update, once all ranks can.

        Raises:
            UpdateRefused: One cannot.
        """
        self._transaction.begin()
        return self._applied()

    def by_plan(self, settings: Settings, report: LoadReport) -> tuple[bool, str]:
        """Plan, then write.

        Raises:
            UpdateRefused: A rank cannot. Nothing was written.
        """
        # Nothing is written before the first flush: what is wrong is found while all is in place
        begin = self._transaction.begin
        retrace = Retrace(self._modules, self._folders)
        session = LoadSession(settings, report, retrace.tracer, before_write=begin, all_wait=True)
        is_planned, message = False, ""
        try:
            with session:
                followed = retrace.follow(session)
                report.plan = "full" if followed is None else "replay"
                if followed is not None:
                    is_planned, message = True, followed
                else:
                    with session.armed():
                        is_planned, message = self._applied()
                if is_planned:
                    session.finish(torch.nn.ModuleList(self._modules.values()))
                    retrace.note(session, message)
                    self._transaction.is_planned = True
        except Exception:
            if session.aborted is None:
                raise
        finally:
            retrace.clear()
        if session.aborted is None and (is_planned or report.plan_note):
            return is_planned, message
        # Perhaps it is for the lazy tensors; what is not fails again.
        begin()
        report.fall_back(str(session.aborted or message))
        logger.warning("weightlift: updated again by the engine: %s", report.fallback_reason)
        return self._applied()

    def _applied(self) -> tuple[bool, str]:
        """What the engine does, but for its roll-back: all ranks roll back together, or none."""
        with shadowed(self._updater, "_rollback", _leave_alone):
            return self._apply()


def _rolled_back(failure: object) -> str:
    reason = (str(failure) or repr(failure)).rstrip(".")
    return f"Failed to update weights: {reason}. All modules rolled back to original weights."


def _leave_alone(original: Callable[..., Any], updated_modules: list[str]) -> None:
    """In place of the engine's roll-back."""


def _load_into_module(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """In an update from disk, have a module take weights as at launch where the engine skips some."""
    module, weights = args
    if not _is_updating.get():
        return wrapped(*args, **kwargs)
    if _translates(wrapped) and (is_apart(module) or not loads_itself(module)):
        return wrapped(*args, **kwargs)
    restore = wrapped.__globals__.get("restore_weight_snapshot")  # from 0.5.20 on
    # Parameters that were moved while the pipeline ran may be written to in no other mode.
    is_inference = any(parameter.is_inference() for parameter in module.parameters())
    try:
        with torch.inference_mode() if is_inference else torch.no_grad():
            if is_apart(module):
                return wrapped(module, complete(module, weights))
            if restore is not None:
                restore(module)
            return take(module, weights)
    except _WRONG_CHECKPOINT as error:
        session = active_session()
        if session is not None:
            session.report.plan_note = repr(error)
        raise


def _records(module: str, versions: str) -> Patch:
    return Patch(
        target=f"{module}:WeightsUpdater._apply_weights",
        versions=versions,
        wrapper=_apply_weights,
        parameters=("modules_to_update", "weights_map"),
        why="Modules are updated one after the other, tensor by tensor from pageable memory, and one "
        "that fails has the whole checkpoint before read again.",
        how="With `--enable-parallel-module-load` all modules are planned, then written in one go. What "
        "is wrong with a checkpoint is found before a byte is written. One of the same headers as that "
        "before moves what that moved, unplanned.",
        upstream="Nothing is proposed.",
        drop_when="The engine's own updates read at the speed of the hardware.",
    )


PATCHES: tuple[Patch, ...] = (
    _records(OLD, ">=0.5.9,<0.5.14"),
    _records(NEW, ">=0.5.14,<0.5.24"),
    *(
        Patch(
            target=f"{module}:_load_weights_into_module",
            versions=versions,
            wrapper=_load_into_module,
            parameters=("module", "weights_iter"),
            why="Tensors are skipped, and success is reported: fused parameters of text encoders stay "
            "as they were, and up to 0.5.13 most of a transformer, whose names are not translated.",
            how="With `--enable-parallel-module-load` such modules take weights as they do at launch. A "
            "parameter without a tensor is an error, before anything is written.",
            upstream="From 0.5.14 on names are translated, and what is skipped is logged.",
            drop_when="Updates fill all that a launch fills.",
        )
        for module, versions in ((OLD, ">=0.5.9,<0.5.14"), (NEW, ">=0.5.14,<0.5.24"))
    ),
)
