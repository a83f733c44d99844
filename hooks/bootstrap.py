"""Finds the engines of this process and has each module patched as soon as it is imported."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import threading
from dataclasses import dataclass, field
from types import ModuleType

import wrapt

from weightlift.compat.context import Context, provide
from weightlift.compat.engines import Engine, find_engine
from weightlift.compat.patch import Handle, Outcome, Patch, Result, put_on, take_off
from weightlift.hooks import options
from weightlift.hooks.startup import is_off
from weightlift.patches import INTEGRATIONS, Integration, PatchFile

logger = logging.getLogger("weightlift")


@dataclass
class _State:
    results: dict[str, Result] = field(default_factory=dict)
    handles: list[Handle] = field(default_factory=list)
    hooked: set[str] = field(default_factory=set)
    is_installed: bool = False


_state = _State()
_lock = threading.RLock()


def install() -> None:
    """Patch the installed engines, now or when they are imported. Once is enough, twice does no harm.

    Called by the start-up hook and by the engines' plugin entry points. An engine that is not
    supported stays stock, and one log line says so.
    """
    with _lock:
        if _state.is_installed:
            return
        _state.is_installed = True  # a module that is imported already is patched right away
        try:
            for integration in INTEGRATIONS:
                _install(integration)
        except BaseException:
            uninstall()
            raise


def uninstall() -> None:
    """Take every patch off; modules imported later stay stock until :func:`install`."""
    with _lock:
        take_off(_state.handles)
        _state.handles.clear()
        _state.results.clear()
        _state.is_installed = False


def results() -> dict[str, Result]:
    """What became of each patched module so far, by ``engine`` or ``engine module``."""
    return dict(_state.results)


def check(integration: Integration, engine: Engine | None) -> Result:
    """Whether this integration may patch this engine: WAITING if so."""
    if engine is None:
        return Result(Outcome.NOT_INSTALLED)
    if is_off():
        return Result(Outcome.DISABLED, f"WEIGHTLIFT={os.environ['WEIGHTLIFT']}")
    try:
        untested = options.settings().untested_versions
    except options.OptionError:
        untested = False  # the load will raise it, where the user is told
    if integration.selected_version(engine, untested=untested):
        return Result(Outcome.WAITING)
    return Result(
        Outcome.VERSION,
        f"{engine.name} {engine.version or 'of unknown version'} is not in the tested range "
        f"{integration.versions}; WEIGHTLIFT_UNTESTED_VERSIONS=1 patches it all the same",
    )


def _install(integration: Integration) -> None:
    engine = find_engine(integration.engine)
    result = check(integration, engine)
    _state.results[integration.engine] = result
    if engine is None or result.outcome is not Outcome.WAITING:
        if engine is not None:
            logger.warning("weightlift: %s runs stock: %s", engine.name, result.detail)
        return
    provide(Context(engine, options.OPTIONS, options.settings))
    for file in integration.files(engine):
        module = file.target
        key = f"{engine.name} {file.label}"
        _state.results[key] = Result(Outcome.WAITING, "not imported yet")
        hook = functools.partial(_patch, integration, engine, file, key)
        imported = sys.modules.get(module)
        if imported and not getattr(imported.__spec__, "_initializing", False):
            hook(imported)
        elif key not in _state.hooked:
            _state.hooked.add(key)
            wrapt.register_post_import_hook(hook, module)


def _log_with(name: str) -> None:
    """Have lines of ours stand where this logger's do, unless ours or the root's have a place already."""
    if name and not logger.hasHandlers():
        logger.parent = logging.getLogger(name)  # as vLLM-Omni does for its own
        logger.setLevel(logger.level)  # has it find out anew which levels are on


def _patch(
    integration: Integration, engine: Engine, file: PatchFile, key: str, module: ModuleType
) -> None:
    """Runs when a target module has been imported. An error here fails the engine's import.

    Raises:
        RuntimeError: The patches do not fit, and the user asked for what they do.
    """
    with _lock:
        if not _state.is_installed:
            return
        _log_with(integration.logger)
        try:
            version = integration.selected_version(engine, untested=True)
            assert version, "the newest version stands in for those that are not known"
            patches: tuple[Patch, ...] = importlib.import_module(file.source).PATCHES
            mine = [patch for patch in patches if patch.module == module.__name__]
            fitting = [patch for patch in mine if patch.fits(version)]
            result, handles = put_on(fitting, module)
        except Exception as error:
            logger.exception("weightlift: cannot patch %s; the engine stays stock", module.__name__)
            result, handles = Result(Outcome.FAILED, repr(error)), []
        _state.results[key] = result
        _state.handles += handles
    if result.outcome is Outcome.APPLIED:
        return
    problem = f"{module.__name__} stays stock: {result.detail}"
    if options.insists_on(file.switch):
        asked = file.switch.replace("_", " ")
        raise RuntimeError(f"{asked} was asked for and cannot be had: {problem}")
    logger.warning("weightlift: %s", problem)
