"""The real SGLang Diffusion sleeps and wakes up: the same weights, the same video."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from engines.diffusion_harness import NAMES
from engines.environment import diffusion_and_sglang, diffusion_releases
from engines.runs import run_cases

ASKED = {"WEIGHTLIFT_PARALLEL_MODULE_LOAD": "1"}
WITHOUT = ("0.5.7", "0.5.8", "0.5.9", "0.5.10", "0.5.11", "0.5.12", "0.5.13", "0.5.14")
RELEASES = [version for version in diffusion_releases() if not version.startswith(WITHOUT)]
if not os.environ.get("WEIGHTLIFT_TEST_MORE"):
    RELEASES = RELEASES[-1:]
RESIDENT = ["--text-encoder-cpu-offload", "false", "--dit-cpu-offload", "false"]

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("version", RELEASES)
def test_a_pipeline_wakes_up_as_it_was(version: str, wan_pipelines: Path, tmp_path: Path) -> None:
    first, second = (wan_pipelines / place / NAMES["wan"] for place in ("first", "second"))
    sleeps = [{"fails": True}, {}, {}, {"update": str(second)}, {"update": str(first)}]
    case: dict[str, Any] = {"model": str(first), "flags": RESIDENT, "generate": True}
    cases = [{**case, "name": "asleep", "env": ASKED, "sleeps": sleeps}]
    runs = run_cases("diffusion_harness.py", cases, tmp_path, *diffusion_and_sglang(version))
    (told,) = runs.told["asleep"]
    failed, *slept = told["sleeps"]
    assert re.search("sleeping needs .* of host memory", failed["asleep"]["error"])
    assert failed["kept"] and failed["awake"]["message"] == "already awake"
    for once in slept:
        assert once["kept"] and once["stayed"] == 0
        assert once["asleep"]["success"] and once["asleep"]["sleeping"]
        assert once["awake"]["success"] and not once["awake"]["sleeping"]
    assert slept[2]["components"] != slept[1]["components"] == slept[3]["components"]
    assert told["video"] == told["video before"]
    copied = [
        int(float(text)) for text in re.findall(r"asleep: .*?, (\S+) \S*B copied", runs.output)
    ]
    assert [number > 0 for number in copied] == [True, False, True, True]
