"""Whether weightlift is in place here: the start-up hook, the engines, what became of each patch."""

from __future__ import annotations

import importlib
import json
import os
import site
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightlift.compat.engines import Engine, find_engine
from weightlift.compat.patch import Outcome, Result
from weightlift.hooks import bootstrap
from weightlift.patches import INTEGRATIONS, Integration

START_UP_FILES = ("weightlift.pth", "weightlift.start")
PROBE_SECONDS = 180
_MARK = "weightlift-probe:"


@dataclass(frozen=True)
class EngineStatus:
    """One engine: what is installed, and what became of the patches of each module.

    Attributes:
        name: Import name.
        engine: What is installed, or None.
        versions: The range that weightlift was tested with.
        result: Whether it may be patched.
        modules: By module, what became of its patches once it was imported.
    """

    name: str
    engine: Engine | None
    versions: str
    result: Result
    modules: Mapping[str, Result]

    @property
    def is_patched(self) -> bool:
        """Whether every module got its patches; parts that are not installed do not count."""
        outcomes = {result.outcome for result in self.modules.values()}
        return outcomes - {Outcome.NOT_INSTALLED} == {Outcome.APPLIED}


def hook_folder() -> Path | None:
    """The site folder that holds the start-up files, or None if no interpreter will see them."""
    folders = site.getsitepackages()
    if site.ENABLE_USER_SITE:
        folders = [*folders, site.getusersitepackages()]
    for folder in map(Path, folders):
        if all((folder / name).is_file() for name in START_UP_FILES):
            return folder
    return None


def engine_status(integration: Integration) -> EngineStatus:
    """Look at one engine; if it may be patched, import its modules in a process of its own."""
    engine = find_engine(integration.engine)
    result = bootstrap.check(integration, engine)
    modules: dict[str, Result] = {}
    if engine and result.outcome is Outcome.WAITING:
        modules = _probe(integration, engine)
        fine = (Outcome.APPLIED, Outcome.NOT_INSTALLED)
        worst = [item for item in modules.values() if item.outcome not in fine]
        result = worst[0] if worst else Result(Outcome.APPLIED)
    return EngineStatus(integration.engine, engine, integration.versions, result, modules)


def _probe(integration: Integration, engine: Engine) -> dict[str, Result]:
    """The outcomes in a fresh interpreter, which the start-up hook must reach by itself."""
    code = f"from weightlift.hooks.status import report; report({integration.engine!r})"
    try:
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        failed = Result(Outcome.FAILED, f"importing it took more than {PROBE_SECONDS} s")
        return dict.fromkeys(_targets(integration, engine), failed)
    for line in ran.stdout.splitlines():
        if line.startswith(_MARK):
            told = json.loads(line.removeprefix(_MARK))
            return {name: Result(Outcome(kind), detail) for name, (kind, detail) in told.items()}
    last = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
    return dict.fromkeys(_targets(integration, engine), Result(Outcome.FAILED, last))


def _targets(integration: Integration, engine: Engine) -> list[str]:
    return [file.label for file in integration.files(engine)]


def report(name: str) -> None:
    """Import an engine's modules and print what became of their patches; runs in the probe."""
    (integration,) = (item for item in INTEGRATIONS if item.engine == name)
    told: dict[str, tuple[str, str]] = {}
    engine = find_engine(name)
    for file in integration.files(engine) if engine else ():
        module = file.label
        try:
            importlib.import_module(file.target)
        except ModuleNotFoundError as error:
            is_more = file.extra and (error.name or "").partition(".")[0] != name
            outcome = Outcome.NOT_INSTALLED if is_more else Outcome.FAILED
            told[module] = (
                outcome.value,
                f"needs {error.name}, as in {file.extra or 'the engine'}",
            )
            continue
        except Exception as error:  # noqa: BLE001 - the engine's own trouble; told, and the next one is tried
            told[module] = (Outcome.FAILED.value, f"cannot be imported: {error!r}")
            continue
        result = bootstrap.results().get(f"{name} {module}")
        result = result or Result(Outcome.FAILED, "the start-up hook did not run")
        told[module] = (result.outcome.value, result.detail)
    sys.stdout.write(f"\n{_MARK}{json.dumps(told)}\n")
    sys.stdout.flush()
    os._exit(0)  # engines leave threads behind that would keep this process


def statuses() -> list[EngineStatus]:
    """Every engine that weightlift knows."""
    return [engine_status(integration) for integration in INTEGRATIONS]
