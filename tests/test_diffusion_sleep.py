"""The real SGLang Diffusion sleeps and wakes up: the same weights, the same video."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from engines.diffusion_harness import NAMES
from engines.environment import diffusion_and_sglang, diffusion_releases
from engines.runs import run_cases, run_harness

ASKED = {"WEIGHTLIFT_PARALLEL_MODULE_LOAD": "1"}
WITHOUT = ("0.5.7", "0.5.8", "0.5.9", "0.5.10", "0.5.11", "0.5.12", "0.5.13", "0.5.14")
RELEASES = [version for version in diffusion_releases() if not version.startswith(WITHOUT)]
RESIDENT = ["--text-encoder-cpu-offload", "false", "--dit-cpu-offload", "false"]

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("version", RELEASES)
def test_a_pipeline_wakes_up_as_it_was(version: str, tmp_path: Path) -> None:
    first, second = (tmp_path / place / NAMES["wan"] for place in ("first", "second"))
    engine = diffusion_and_sglang("0.5.23")
    for seed, folder in enumerate((first, second), 1):
        run_harness("diffusion_checkpoints.py", ["wan", folder, seed], *engine)
    case: dict[str, Any] = {"model": str(first), "flags": RESIDENT, "generate": True}
    sleeps = [{"fails": True}, {}, {}, {"update": str(second)}, {"update": str(first)}]
    cases = [
        {**case, "name": "stock", "stock": True},
        {**case, "name": "ours", "env": ASKED, "sleeps": sleeps},
    ]
    runs = run_cases("diffusion_harness.py", cases, tmp_path, *diffusion_and_sglang(version))
    (stock,), (ours,) = (runs.told[name] for name in ("stock", "ours"))
    failed, *slept = ours["sleeps"]
    assert re.search("sleeping needs .* of host memory", failed["asleep"]["error"])
    assert failed["kept"] and failed["awake"]["message"] == "already awake"
    for told in slept:
        assert told["kept"] and told["stayed"] == 0
        assert told["asleep"]["success"] and told["asleep"]["sleeping"]
        assert told["awake"]["success"] and not told["awake"]["sleeping"]
    assert slept[2]["components"] != slept[1]["components"] == slept[3]["components"]
    assert slept[0]["components"] == stock["components"]
    assert ours["video"] == stock["video"]
    copied = [
        int(float(text)) for text in re.findall(r"asleep: .*?, (\S+) \S*B copied", runs.output)
    ]
    assert [number > 0 for number in copied] == [True, False, True, True]
