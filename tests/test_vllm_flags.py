"""The real command lines and constructors of vLLM and vLLM-Omni take weightlift's options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engines.environment import omni_and_vllm, omni_releases
from engines.runs import Runs, run_cases, run_harness
from packaging.version import Version

ON, OFF = "--enable-multithread-weight-load", "--disable-multithread-weight-load"
THREADS = "--num-weight-load-threads"
COMMAND_LINES = {
    "none": [],
    "threads": [ON, THREADS, "7"],
    "their default": [THREADS, "4"],
    "on": [ON],
    "off": [OFF],
    "on and off": [OFF, ON],
    "no threads": [THREADS, "0"],
}
KEYWORDS: dict[str, dict[str, Any]] = {
    "no keyword": {},
    "threads by keyword": {"num_weight_load_threads": 7},
    "on by keyword": {"enable_multithread_weight_load": True},
    "off by keyword": {"disable_multithread_weight_load": True},
}
SAID: dict[str, dict[str, str]] = {
    "none": {},
    "no keyword": {},
    "on": {"WEIGHTLIFT_MULTITHREAD_LOAD": "1"},
    "on by keyword": {"WEIGHTLIFT_MULTITHREAD_LOAD": "1"},
    "off": {"WEIGHTLIFT_MULTITHREAD_LOAD": "0"},
    "off by keyword": {"WEIGHTLIFT_MULTITHREAD_LOAD": "0"},
    "threads": {"WEIGHTLIFT_MULTITHREAD_LOAD": "1", "WEIGHTLIFT_NUM_LOAD_THREADS": "7"},
    "threads by keyword": {"WEIGHTLIFT_NUM_LOAD_THREADS": "7"},
}

STAGES: dict[str, dict[str, Any]] = {
    "stage of 7": {"enable_multithread_weight_load": True, "num_weight_load_threads": 7},
    "stage off": {"enable_multithread_weight_load": False},
}
COMMANDS = ("vllm", "omni")
ENGINES: dict[str, dict[str, Any]] = {
    "vllm": {},
    "omni": {"omni": True},
    "async omni": {"omni": True, "async": True},  # what `vllm serve --omni` makes
}

pytestmark = pytest.mark.engine


@pytest.fixture(params=omni_releases())
def version(request: pytest.FixtureRequest) -> str:
    """Of vLLM-Omni."""
    found: str = request.param
    return found


def stage_file(version: str, path: Path, settings: dict[str, Any]) -> Path:
    """Of one diffusion stage, in the form of the release."""
    stages = "stage_args" if Version(version) < Version("0.28") else "stages"
    stage = {"stage_id": 0, "stage_type": "diffusion", "runtime": {}}
    written = {stages: [{**stage, "engine_args": {"model_stage": "dit", **settings}}]}
    path.write_text(json.dumps(written))  # which is YAML too
    return path


def run(version: str, folder: Path) -> tuple[Runs, Path]:
    """All cases in one release, and the model they name."""
    model = folder / "model"
    run_harness("omni_harness.py", ["make", "qwenimage", model, 1, 96], *omni_and_vllm("0.30.0"))
    cases: list[dict[str, Any]] = []
    for engine, case in ENGINES.items():
        for name, argv in COMMAND_LINES.items() if engine in COMMANDS else ():
            cases.append({**case, "name": f"{engine} {name}", "argv": [str(model), *argv]})
        for name, keywords in KEYWORDS.items():
            given = {"model": str(model), **keywords}
            cases.append({**case, "name": f"{engine} {name}", "keywords": given})
    for name, settings in STAGES.items():
        file = stage_file(version, folder / f"{name}.yaml", settings)
        cases.append({"name": name, "stages": str(file)})
    return run_cases("flags_harness.py", cases, folder, *omni_and_vllm(version)), model


def test_options_reach_what_loads(version: str, tmp_path: Path) -> None:
    runs, model = run(version, tmp_path)
    for engine in ENGINES:
        for name in KEYWORDS:
            (told,) = runs.told[f"{engine} {name}"]
            assert told.get("environ") == SAID[name], told
            assert told["after"] == {}, "it holds for that engine alone"
    for engine in COMMANDS:
        for name in COMMAND_LINES.keys() & SAID.keys():
            (told,) = runs.told[f"{engine} {name}"]
            assert told.get("environ") == SAID[name], told
            assert told["left_over"] == [], "the engine would find what it does not know"
        assert "error" in runs.told[f"{engine} no threads"][0]
    (told,) = runs.told["omni on and off"]
    has_own_flags = version not in ("0.14.0", "0.16.0")
    assert ("contradict" in told.get("error", "")) == has_own_flags
    # What is inherited is what the loader goes by, in a process that was told nothing else.
    load = {"kind": "qwenimage", "model": str(model)}
    loads = [
        {**load, "name": name, "env": runs.told[f"omni {name}"][0]["environ"]}
        for name in ("none", "threads", "on", "off")
    ]
    for name in STAGES:
        (told,) = runs.told[name]
        assert bool(told["fields"]) == has_own_flags, "else in the environment"
        loads.append({**load, "name": name, "env": told["environ"], "fields": told["fields"]})
    (tmp_path / "loads").mkdir()
    loaded = run_cases("omni_harness.py", loads, tmp_path / "loads", *omni_and_vllm(version))
    assert len({str(loaded.hashes(name)) for name in loaded.told}) == 1
    reports = dict(zip(loaded.told, loaded.reports, strict=True))
    modes = {name: report["mode"] for name, report in reports.items()}
    assert {name for name, mode in modes.items() if mode == "stock"} == {"off", "stage off"}
    assert reports["threads"]["threads"] == reports["stage of 7"]["threads"] == 7
