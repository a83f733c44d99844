"""The real SGLang Diffusion updates its pipelines from disk: as stock does, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines.diffusion_harness import NAMES
from engines.environment import diffusion_and_sglang, diffusion_releases
from engines.runs import run_cases

ASKED = {"WEIGHTLIFT_PARALLEL_MODULE_LOAD": "1"}
RELEASES = [version for version in diffusion_releases() if version not in ("0.5.7", "0.5.8.post1")]
"""Those that have updates; and 0.5.10 and before need flags on a CPU."""
SILENT = ("0.5.9", "0.5.10.post1", "0.5.11", "0.5.12.post1", "0.5.13.post1")
"""Those that skip parameters whose names they do not translate."""
RESIDENT = ["--text-encoder-cpu-offload", "false", "--dit-cpu-offload", "false"]

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("version", RELEASES)
def test_an_update_is_as_stock_or_leaves_the_weights_before(
    version: str, wan_pipelines: Path, tmp_path: Path
) -> None:
    paths = {
        place: str(wan_pipelines / place / NAMES["wan"]) for place in ("first", "second", "damaged")
    }
    there_and_back = [{"path": paths[place]} for place in ("second", "first")]
    failing: list[dict[str, Any]] = [
        {"path": paths["damaged"]},
        {"path": paths["second"], "unreadable": "text_encoder"},
        {"path": paths["damaged"], "early": True},
    ]
    case: dict[str, Any] = {"model": paths["first"], "flags": RESIDENT}
    cases = [
        {**case, "name": "stock", "stock": True, "updates": there_and_back},
        {**case, "name": "ours", "env": ASKED, "updates": there_and_back},
        {**case, "name": "failing", "env": ASKED, "updates": [*failing, *there_and_back]},
    ]
    engine = diffusion_and_sglang(version)
    runs = run_cases("diffusion_harness.py", cases, tmp_path, *engine)
    (stock,), (ours,), (failed,) = (runs.told[name] for name in ("stock", "ours", "failing"))
    assert "error" not in stock, stock["trace"]
    launched = stock["components"]
    *failures, _, _ = failed["updates"]
    assert [update["done"] for update in failures] == [False] * 3
    for update in failures:
        assert update["components"] == launched, "the weights before are in place"
    later = [update["components"] for update in failed["updates"][3:]]
    if version in SILENT:
        for update in (*ours["updates"], *failed["updates"][3:]):
            assert not update["done"] and "does not translate their names" in update["message"]
            assert update["components"] == launched
        return
    assert [update["done"] for update in ours["updates"]] == [True, True]
    assert [update["components"] for update in ours["updates"]] == [
        update["components"] for update in stock["updates"]
    ]
    assert later == [update["components"] for update in stock["updates"]]
    assert stock["updates"][0]["components"] != launched
    assert "truncated" in failed["updates"][0]["message"]
    assert "injected" in failed["updates"][1]["message"]
    updates = [report for report in runs.reports if report["phase"] == "update"]
    assert [report["mode"] for report in updates] == ["weightlift"] * 7
