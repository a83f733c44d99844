"""The real vLLM-Omni loads transformers: stock and weightlift leave the same bytes everywhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from engines.environment import diffusion_and_sglang, omni_and_vllm, omni_releases
from engines.runs import Runs, run_cases, run_harness

KINDS = ("qwenimage", "wan")
ASKED = {"WEIGHTLIFT_MULTITHREAD_LOAD": "1"}
WIDTH = 12_000
"""Of Wan's layers where the checkpoint must be larger than the memory for bytes in flight."""

pytestmark = pytest.mark.engine


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each kind, a wide one and a damaged one."""
    folder = tmp_path_factory.mktemp("pipelines")
    whole = ["qwen", folder / "whole/Qwen-Image", 1, 64]
    run_harness("diffusion_checkpoints.py", whole, *diffusion_and_sglang("0.5.23"))
    made: list[object] = []
    for kind, name, width in (
        ("qwenimage", "qwenimage", 96),
        ("wan", "wan", 96),
        ("wan", "wide", WIDTH),
    ):
        made += [kind, folder / name, 1, width]
    run_harness("omni_harness.py", ["make", *made], *omni_and_vllm("0.30.0"))
    shutil.copytree(folder / "qwenimage", folder / "broken")
    shard = max((folder / "broken/transformer").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 100)
    return folder


def cases_of(pipelines: Path) -> list[dict[str, Any]]:
    """What is loaded."""
    cases: list[dict[str, Any]] = []
    for kind in KINDS:
        for size in (1, 2):
            case = {"kind": kind, "model": str(pipelines / kind), "tp": size}
            cases += [
                {**case, "name": f"{kind} {size} stock", "stock": True},
                {**case, "name": f"{kind} {size}", "env": ASKED},
            ]
    wide = {"kind": "wan", "model": str(pipelines / "wide")}
    image = {"kind": "qwenimage", "model": str(pipelines / "qwenimage")}
    whole = {"kind": "whole", "model": str(pipelines / "whole/Qwen-Image")}
    little = {**ASKED, "WEIGHTLIFT_STAGING_MIB": "16"}
    return [
        *cases,
        {**wide, "name": "wide stock", "stock": True},
        {**wide, "name": "collected", "collect": True, "env": little},
        {**whole, "name": "whole stock", "stock": True},
        {**whole, "name": "whole", "cold": True},
        {**image, "name": "processes", "env": {**ASKED, "WEIGHTLIFT_READERS": "processes"}},
        {**image, "name": "off", "env": {"WEIGHTLIFT_MULTITHREAD_LOAD": "0"}},
        {**image, "name": "not asked"},
        {**image, "model": str(pipelines / "broken"), "name": "broken", "env": ASKED},
    ]


def nbytes(folder: Path) -> int:
    """Of all shards."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@pytest.fixture(params=omni_releases())
def runs(request: pytest.FixtureRequest, pipelines: Path, tmp_path: Path) -> Runs:
    """All cases in one release."""
    cases = cases_of(pipelines)
    return run_cases("omni_harness.py", cases, tmp_path, *omni_and_vllm(request.param))


def test_stock_and_weightlift_leave_the_same(runs: Runs, pipelines: Path) -> None:
    for kind in KINDS:
        for size in (1, 2):
            stock, planned = runs.hashes(f"{kind} {size} stock"), runs.hashes(f"{kind} {size}")
            assert planned == stock and len(planned) == size, f"{kind} on {size} ranks"
    for case in ("processes", "off", "not asked"):
        assert runs.hashes(case) == runs.hashes("qwenimage 1 stock"), case
    # Weightlift did it: each kind on one rank and on two, and the four cases more that load.
    assert "weightlift: launch of" in runs.output, "in the engine's log"
    planned_loads = [report for report in runs.reports if report["mode"] == "weightlift"]
    assert len(planned_loads) == 2 * 3 + 4
    for report in planned_loads:
        assert (report["engine"], report["phase"]) == ("vllm_omni", "launch")
        assert report["planned"] > 0 and report["threads"] > 0 and not report["fallback_reason"]
    # Its own pipeline, with components that it loads by from_pretrained, which are read ahead.
    assert runs.hashes("whole") == runs.hashes("whole stock")
    (whole,) = runs.told["whole"]
    assert whole["ahead"] == whole["cold"]
    # A pipeline that collects the stream needs no more memory than any other.
    assert nbytes(pipelines / "wide") > 16 << 20
    assert runs.hashes("collected") == runs.hashes("wide stock")
    # A damaged file is named.
    assert ".safetensors" in runs.error("broken") and "truncated" in runs.error("broken")
