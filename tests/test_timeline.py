"""When what was read, as JSON and as pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightlift.loading import timeline
from weightlift.loading.report import LoadReport
from weightlift.loading.settings import Settings
from weightlift.loading.state_dict import load_into

NAMES = ("one $x_1$ <b>.safetensors", "two.safetensors")


@pytest.fixture(autouse=True)
def no_loads_before() -> Iterator[None]:
    """Each test begins as a process does."""
    timeline._loads.clear()
    timeline._origin.clear()
    yield
    timeline._loads.clear()
    timeline._origin.clear()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards, one with a name that means something to TeX and to HTML."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in NAMES:
        save_file({name: torch.ones(64, 64)}, folder / name)
    return folder


def load(checkpoint: Path, file: Path) -> None:
    """One load with a timeline."""
    targets = {name: torch.zeros(64, 64) for name in NAMES}
    load_into(targets, checkpoint, settings=Settings(load_timeline=str(file)))
    assert all(bool((target == 1).all()) for target in targets.values())


def test_json_has_every_load_with_its_shards_in_order(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    for _ in range(2):
        load(checkpoint, file)
    first, second = json.loads(file.read_text())["loads"]
    assert first["from"] == 0 and first["until"] <= second["from"]
    for told in (first, second):
        assert {shard["file"] for shard in told["shards"]} == set(NAMES)
        assert told["bytes"] == sum(shard["bytes"] for shard in told["shards"])
        times = [told[key] for key in ("from", "read_from", "read_until", "until")]
        assert times == sorted(times)


def test_pictures_can_be_looked_at(checkpoint: Path, tmp_path: Path) -> None:
    png, page = tmp_path / "timeline.png", tmp_path / "timeline.html"
    for file in (png, page):
        load(checkpoint, file)
        assert not file.exists(), "the next load need not wait for it"
        timeline.draw()
    assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "<svg" in text and "two.safetensors" in text and "<b>" not in text
    assert "$x_1$" in text, "a name is not taken for a formula"


def test_a_load_by_the_engine_is_in_it_with_the_reason(tmp_path: Path) -> None:
    report = LoadReport(phase="launch", architecture="Model", rank=1)
    report.fall_back("it is <quantised>")
    report.finish(Settings(load_timeline=str(tmp_path / "timeline.html")))
    timeline.draw()
    text = (tmp_path / "timeline-rank1.html").read_text()
    assert "launch of Model" in text and "it is &lt;quantised&gt;" in text


def test_one_that_cannot_be_written_fails_no_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    LoadReport().finish(Settings(load_timeline=str(tmp_path / "no/such/folder.json")))
    assert "cannot write the timeline" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_loads_of_a_long_life_are_not_all_kept(tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    for number in range(timeline.MOST_LOADS + 3):
        LoadReport(phase=str(number)).finish(Settings(load_timeline=str(file)))
    loads = json.loads(file.read_text())["loads"]
    assert len(loads) == timeline.MOST_LOADS and loads[0]["load"].startswith("3 ")
