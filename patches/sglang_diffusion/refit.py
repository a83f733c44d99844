"""Updates of pipelines of 0.5.7 and 0.5.8, which have no ``update_weights_from_disk`` of their own."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

from weightlift.compat.context import context_of
from weightlift.loading.errors import WeightliftError
from weightlift.loading.read_ahead import shards_in
from weightlift.loading.session import LoadSession
from weightlift.loading.transaction import Transaction
from weightlift.patches import SGLANG_DIFFUSION
from weightlift.patches.planned import report_of
from weightlift.patches.sglang_diffusion.agreement import voter
from weightlift.patches.sglang_diffusion.modules import is_apart, take

logger = logging.getLogger("weightlift")

Modules = dict[str, torch.nn.Module]

_origins: weakref.WeakKeyDictionary[torch.nn.Module, Path] = weakref.WeakKeyDictionary()
"""Where the weights of modules that were updated came from; of others, from the pipeline's path."""


def update(pipeline: Any, path: Path, names: Iterable[str] | None) -> tuple[bool, str]:
    """Update modules in place, each as its weights came at launch: all of them on all ranks, or none.

    Every rank calls this, and they agree.

    Args:
        pipeline: The engine's, loaded.
        path: The checkpoint, with a folder for each module.
        names: Of the modules; None for all.

    Returns:
        Whether it was done, and what to say of it.

    Raises:
        WeightliftError: Reading failed half way, and the weights before cannot be read again; or this
            is a release before 0.5.7, or weightlift is off.
    """
    _check_release()
    items = pipeline.modules.items()
    modules: Modules = {name: item for name, item in items if isinstance(item, torch.nn.Module)}
    wanted = list(modules) if names is None else list(names)
    problem, transaction = _obstacle(path, modules, wanted), Transaction(voter())
    if problem:
        transaction.end(problem)
        return False, f"{problem}. The weights before are in place."
    chosen = {name: modules[name] for name in wanted}
    folders = {name: path / name for name in wanted}
    failure, was_written = _apply(chosen, folders, transaction.begin)
    transaction.end("" if failure is None else str(failure) or repr(failure))
    if transaction.failure:
        if was_written:
            _roll_back(pipeline, chosen, transaction.failure)
        return False, f"the update failed: {transaction.failure}. The weights before are in place."
    for name, module in chosen.items():
        _origins[module] = folders[name]
        if hasattr(module, "reset_teacache_state"):
            module.reset_teacache_state()  # type: ignore[operator]
    return True, f"{len(chosen)} modules are updated: {', '.join(chosen)}."


def _check_release() -> None:
    try:
        version = context_of("sglang").engine.version
    except KeyError:
        raise WeightliftError(
            "weightlift is off in this process: WEIGHTLIFT=1, and import sglang before the update"
        ) from None
    if version not in SpecifierSet(SGLANG_DIFFUSION, prereleases=True):
        raise WeightliftError(
            f"pipelines of SGLang Diffusion {version} cannot be updated: upgrade to 0.5.7 or newer"
        )


def _obstacle(path: Path, modules: Modules, wanted: Iterable[str]) -> str:
    """Why these modules cannot be updated from there, or ''."""
    for name in wanted:
        if name not in modules:
            return f"there is no module {name!r}, but {', '.join(sorted(modules))}"
        if not shards_in(path / name):
            return f"{path / name} has no safetensors files for {name}"
        if is_apart(modules[name]):
            return (
                f"{name} is sharded or on the host layer by layer; start with "
                "--text-encoder-cpu-offload false and --dit-layerwise-offload false"
            )
    return ""


def _apply(
    modules: Modules, folders: dict[str, Path], before_write: Callable[[], None]
) -> tuple[Exception | None, bool]:
    """Plan all, then write; returns what failed, if something did, and whether anything was written."""
    settings = context_of("sglang").settings()
    parents = sorted({str(folder.parent) for folder in folders.values()})
    report = report_of("sglang", ", ".join(parents), "update")
    report.architecture = ", ".join(type(module).__name__ for module in modules.values())
    # Nothing is written before the first flush: what is wrong with any module is found before that.
    session = LoadSession(settings, report, before_write=before_write, all_wait=True)
    failure = None
    try:
        with session:
            with session.armed(), torch.no_grad():
                for name, module in modules.items():
                    take(module, session.iterate(map(str, shards_in(folders[name]))))
            session.finish(torch.nn.ModuleList(modules.values()))
    except Exception as error:  # noqa: BLE001 - told to the caller, as later releases do
        failure = error
        report.plan_note = str(error)
        logger.error("weightlift: an update from %s failed: %s", report.model_path, error)
    report.finish(settings)
    return failure, not session.delivery.is_gated


def _roll_back(pipeline: Any, modules: Modules, failure: str) -> None:
    """Read the weights before again.

    Raises:
        WeightliftError: They cannot be read.
    """
    launched = getattr(getattr(pipeline, "server_args", None), "model_paths", {})
    folders = {
        name: _origins.get(module) or Path(launched.get(name) or Path(pipeline.model_path, name))
        for name, module in modules.items()
    }
    again, _ = _apply(modules, folders, lambda: None)
    if again is not None:
        raise WeightliftError(
            f"the update failed ({failure}), and so did reading the weights before ({again}): the "
            "pipeline holds parts of two checkpoints. Update it from a whole one, or restart it."
        ) from again
