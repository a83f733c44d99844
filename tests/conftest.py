from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engines.diffusion_harness import NAMES
from engines.environment import diffusion_and_sglang
from engines.runs import run_harness
from safetensors.torch import save_file

from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession
from weightlift.loading.settings import Settings

SaveCheckpoint = Callable[..., list[str]]
OpenSession = Callable[..., LoadSession]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here; scripts/gpu runs this on one")
    return torch.device(request.param)


@pytest.fixture
def save(tmp_path: Path) -> SaveCheckpoint:
    """Write one shard for each dict of tensors; returns their paths."""

    def save(*shards: dict[str, torch.Tensor]) -> list[str]:
        paths = [tmp_path / f"model-{number:05d}.safetensors" for number, _ in enumerate(shards)]
        for path, tensors in zip(paths, shards, strict=True):
            save_file(tensors, path)
        return [str(path) for path in paths]

    return save


@pytest.fixture(params=["auto", "processes"])
def open_session(request: pytest.FixtureRequest) -> OpenSession:
    """Sessions with two readers of either kind."""

    def open_session(staging_mib: int = 256, *, all_wait: bool = False) -> LoadSession:
        settings = Settings(num_load_threads=2, staging_mib=staging_mib, readers=request.param)
        return LoadSession(settings, LoadReport(), all_wait=all_wait)

    return open_session


@pytest.fixture
def one_thread_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where this user, or the container, has all threads but one that it may have."""
    start, started = threading.Thread.start, list[threading.Thread]()

    def start_one(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)


@pytest.fixture(scope="session")
def wan_pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two diffusion pipelines, and the second once more with a damaged text encoder."""
    folder = tmp_path_factory.mktemp("updates")
    arguments: list[object] = []
    for place, seed in (("first", 1), ("second", 2), ("damaged", 2)):
        arguments += ["wan", folder / place / NAMES["wan"], seed, 64]
    run_harness("diffusion_checkpoints.py", arguments, *diffusion_and_sglang("0.5.23"))
    shard = max((folder / "damaged").rglob("text_encoder/*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 100)
    return folder


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """No test may leave a reader thread or an open shard behind."""
    yield
    if _open_shards():
        gc.collect()  # iterators that a test did not exhaust
    idle = "weightlift-idle"  # ends the processes that are kept for the next load
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if "weightlift" in name and name != idle]
    assert not _open_shards(), "shards are still open"


def _open_shards() -> list[str]:
    links = (Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return [target for link in links if (target := _target(link)).endswith(".safetensors")]


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:  # the descriptor of the listing itself
        return ""
