"""Reading past the page cache: the same bytes, where it is worth it, and errors as ever."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from weightlift.loading import residency
from weightlift.loading.benchmark import prepare_cache
from weightlift.loading.buffers import memory_of
from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.errors import CheckpointError
from weightlift.loading.files import ShardFile
from weightlift.loading.pages import PAGE
from weightlift.loading.report import LoadReport
from weightlift.loading.settings import Settings
from weightlift.loading.staging import page_aligned
from weightlift.loading.state_dict import load_into


@pytest.fixture
def shard(save: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """Tensors of odd sizes, so that hardly any starts or ends on a page."""
    sizes = (1, 3, 4095, 4096, 4097, 70_001, 3 << 20)
    tensors = {f"t{size}": torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes}
    (path,) = save(tensors)
    return Path(path), tensors


def load(
    path: Path, tensors: dict[str, torch.Tensor], device: torch.device, **settings: Any
) -> LoadReport:
    """Load, and see that every byte is right."""
    targets = {name: torch.zeros_like(tensor, device=device) for name, tensor in tensors.items()}
    report = load_into(targets, path, Settings(num_load_threads=2, **settings))
    for name, tensor in tensors.items():
        assert torch.equal(targets[name].cpu(), tensor), name
    return report


def must_bypass(path: Path) -> None:
    """Skip where the filesystem of the tests cannot do it."""
    if not residency.can_bypass_cache(path.stat().st_dev):
        pytest.skip("the tests' folder is on no filesystem that is read directly")


def test_what_is_not_cached_is_read_directly(shard: Any, device: torch.device) -> None:
    path, tensors = shard
    must_bypass(path)
    prepare_cache(path, "cold")
    report = load(path, tensors, device)
    data = sum(len(tensor) for tensor in tensors.values())
    assert data <= report.bytes_direct <= data + 2 * PAGE
    with Checkpoint.from_path(path) as checkpoint:
        cached = checkpoint.shards[0].file.cached_bytes()
    assert cached < path.stat().st_size / 2, "the page cache was filled all the same"


def test_what_is_cached_is_read_from_the_cache(shard: Any, device: torch.device) -> None:
    path, tensors = shard
    prepare_cache(path, "warm")
    assert load(path, tensors, device).bytes_direct == 0


def test_the_user_has_the_last_word(shard: Any, device: torch.device) -> None:
    path, tensors = shard
    must_bypass(path)
    prepare_cache(path, "warm")
    assert load(path, tensors, device, direct_io="on").bytes_direct > 0
    prepare_cache(path, "cold")
    assert load(path, tensors, device, direct_io="off").bytes_direct == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strided_and_cast_targets(save: Any, device: torch.device, dtype: torch.dtype) -> None:
    weight = torch.randn(513, 257)
    (path,) = save({"w": weight})
    target = torch.zeros(257, 513, dtype=dtype, device=device).t()
    load_into({"w": target}, path, Settings(direct_io="on"))
    assert torch.equal(target.cpu(), weight.to(dtype))


def test_a_filesystem_that_cannot_is_read_through_the_cache(
    shard: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = shard
    refuse = os.O_DIRECTORY  # opening a file with this fails, as O_DIRECT does on such filesystems
    monkeypatch.setattr(os, "O_DIRECT", refuse)
    assert load(path, tensors, device, direct_io="on").bytes_direct == 0


def test_reads_that_fail_directly_are_tried_through_the_cache(shard: Any) -> None:
    path, _ = shard
    must_bypass(path)
    file = ShardFile.open(str(path))
    file.direct_io = "on"
    memory = page_aligned(8 * PAGE)
    room = memory_of(memory)[1:]  # no address that the disk's driver takes
    begins = file.fetch(100, 200, room)
    assert bytes(room[begins : begins + 100]) == path.read_bytes()[100:200]
    assert not file.is_direct(100, 200), "it is not tried again"
    file.close()


def test_a_file_that_shrank_is_named(shard: Any) -> None:
    path, _ = shard
    must_bypass(path)
    file = ShardFile.open(str(path))
    file.direct_io = "on"
    os.truncate(path, 100_000)
    memory = page_aligned(2 << 20)
    with pytest.raises(CheckpointError, match=r"model-00000\.safetensors: it ends at byte 100000"):
        file.fetch(50_000, 500_000, memory_of(memory))
    file.close()


def test_which_stretches_are_cached(shard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "STRETCH", 4 * PAGE)
    path, _ = shard
    must_bypass(path)
    prepare_cache(path, "cold")
    descriptor, size = os.open(path, os.O_RDONLY), path.stat().st_size
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no pages but those that are read
    os.pread(descriptor, 4 * PAGE, 0)
    with contextlib.closing(residency.PageCache(descriptor, size)) as cache:
        assert not cache.is_cold(0, 4 * PAGE)
        assert cache.is_cold(4 * PAGE, 4 * PAGE + 1)
        assert cache.is_cold(0, size), "one stretch is not all"
        assert 0 < cache.cached_bytes() < size
        os.pread(descriptor, size, 0)
        assert cache.is_cold(4 * PAGE, 4 * PAGE + 1), "a verdict stands until the file is closed"
    with contextlib.closing(residency.PageCache(descriptor, size)) as cache:
        assert not cache.is_cold(0, size)
    os.close(descriptor)
