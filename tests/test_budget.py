"""How much of a host a process takes: its share of cores and memory, and less in a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import weightlift
from weightlift.loading import budget, memory, readers, stage
from weightlift.loading.crew_spec import CrewSpec
from weightlift.loading.crews import Crews
from weightlift.loading.readers import crew_for
from weightlift.loading.settings import Settings

CUDA = torch.device("cuda")
GIB = 1 << 30


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host of 64 cores; its cgroup's folder."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(budget, "CGROUP", tmp_path)
    return tmp_path


def test_a_host_without_limits(host: Path) -> None:
    assert (budget.usable_cores(), budget.memory_limit()) == (64, None)
    assert budget.reader_count() == budget.MOST_READERS
    assert crew_for(CUDA, Settings()).readers == budget.MOST_READERS


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "800000", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({"cpu.max": "garbage"}, 64),
    ],
)
def test_cores_of_a_container(host: Path, files: dict[str, str], cores: int) -> None:
    for name, text in files.items():
        (host / name).parent.mkdir(exist_ok=True)
        (host / name).write_text(f"{text}\n")
    assert budget.usable_cores() == cores


def test_ranks_share_the_cores(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ranks, count in ((4, 12), (8, 8), (64, 2)):
        for module in (budget, readers):
            monkeypatch.setattr(module, "ranks_here", lambda ranks=ranks: ranks)
        assert budget.reader_count() == count
        assert crew_for(CUDA, Settings(num_load_threads=5)).readers == 5
        assert crew_for(CUDA, Settings()).slots == max(readers.FEWEST_SLOTS, count * 4 // 12)
    monkeypatch.setattr(readers, "ranks_here", lambda: 1)
    assert crew_for(CUDA, Settings(num_load_threads=12)).slots == 8


def test_staging_in_a_small_container(host: Path) -> None:
    (host / "memory.max").write_text(f"{GIB}\n")
    few = crew_for(CUDA, Settings())
    assert few.slots * few.window_bytes <= GIB // budget.MEMORY_SHARE
    asked = Settings(staging_mib=256, asked=frozenset({"staging_mib"}))
    assert crew_for(CUDA, asked).readers == budget.MOST_READERS
    (host / "memory.max").write_text("max\n")
    assert budget.memory_limit() is None


def test_release_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    crews = Crews()
    monkeypatch.setattr(memory, "crews", crews)
    crew = crews.take(CrewSpec(2, 3, 1 << 20))
    nbytes = crew.ring.memory.numel()
    crews.give(crew)
    monkeypatch.setattr(stage, "_stage", None)
    stage.make_stage(1000, pinned=False)
    assert weightlift.release() == nbytes
    assert crew.ring.memory.numel() == 0
    assert weightlift.release() == 0
