"""The example configurations for training launchers, read by the launchers' own classes."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import environment
from engines.cases import PLANNED, Case, run_cases
from engines.checkpoints import make_checkpoint

from weightlift.hooks.options import settings

pytestmark = pytest.mark.engine

EXAMPLES = environment.TOP / "docs/launchers"
PARSER = Path(__file__).with_name("launcher_configs.py")


@pytest.fixture(scope="module")
def packages() -> Path:
    return environment.launchers(Path(sys.executable))


def parsed(packages: Path, *arguments: str) -> dict[str, Any]:
    """What a launcher makes of its configuration."""
    ran = subprocess.run(
        [sys.executable, str(PARSER), *arguments],
        env={**os.environ, "PYTHONPATH": str(packages), "WEIGHTLIFT": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    (line,) = [text for text in ran.stdout.splitlines() if text.startswith("FOUND ")] or [
        ran.stderr
    ]
    found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    return found


def command_of(example: str) -> list[str]:
    text = "".join(
        line for line in (EXAMPLES / example).read_text().splitlines(True) if line[0] != "#"
    )
    return shlex.split(text.replace("\\\n", " "))


def test_areal_passes_its_switch_and_our_variables(packages: Path) -> None:
    found = parsed(packages, "areal", str(EXAMPLES / "areal.yaml"))
    given = settings(found["env"])
    assert (given.fast_load, given.stage_gib, given.stage_watch) == (True, 20, "/shared/weights")
    assert all(isinstance(value, str) for value in found["env"].values())
    command = found["command"]
    command = command if isinstance(command, list) else shlex.split(command)
    extra = json.loads(command[command.index("--model-loader-extra-config") + 1])
    assert extra == {"enable_multithread_load": True}


def test_verl_passes_the_engines_arguments_and_our_variables(packages: Path) -> None:
    command = command_of("verl.sh")
    found = parsed(packages, "verl", *command[command.index("verl.trainer.main_ppo") + 1 :])
    assert settings(found["env"]).num_load_threads == 8
    assert all(isinstance(value, str) for value in found["env"].values())
    extra = json.loads(found["arguments"]["model_loader_extra_config"])
    assert extra == {"enable_multithread_load": True, "enable_fast_load": True}
    assert found["load_format"] == "auto"


def test_slime_passes_the_engines_flags_and_our_variables(tmp_path: Path) -> None:
    command = command_of("slime.sh")
    (runtime,) = [item for item in command if item.startswith("--runtime-env-json=")]
    environ = json.loads(runtime.partition("=")[2])["env_vars"]
    given = settings(environ)
    assert (given.stage_gib, given.stage_watch) == (20, "/shared/weights")
    flags = [
        part
        for flag, value in itertools.pairwise(command)
        if flag.startswith("--sglang-")
        for part in (flag.replace("--sglang-", "--"), value)
    ]
    model = make_checkpoint(tmp_path / "model", "qwen3", 0, layers=6)
    case = Case("slime", model, (model,), args=tuple(flags), env={"WEIGHTLIFT_STAGE_GIB": "0"})
    (outcome,) = run_cases("0.5.17", [case], [PLANNED]).values()
    assert outcome.each("plan") == ["fast", "fast"], outcome.output[-2000:]
