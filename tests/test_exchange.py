"""Ranks that share the reading of a checkpoint: the same bytes, each read once, and no one hangs.

The ranks are processes here and talk by Gloo; on GPUs by NCCL, which ``scripts/gpu`` runs.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from weightlift.loading import shared_plan
from weightlift.loading.errors import CheckpointError
from weightlift.loading.exchange import Exchange
from weightlift.loading.files import ShardFile
from weightlift.loading.group import TorchGroup
from weightlift.loading.parameters import Parameters
from weightlift.loading.planner import Planner
from weightlift.loading.recording import Recording
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession
from weightlift.loading.settings import Settings

RANKS = 3
ROUND = 192 << 10
CPU = torch.device("cpu")


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Two files: what every rank wants, what ranks want slices of, and more than a round."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    contents: list[dict[str, torch.Tensor]] = [
        {"column": weight(96, 1000), "row": weight(400, 996), "norm": weight(4001)},
        {
            "all": weight(333, 1001),
            "scale": weight(1),
            "cast": weight(300, 300, dtype=torch.float32),
            "vector": weight(300_001),
        },
    ]
    for number, tensors in enumerate(contents):
        save_file(tensors, tmp_path / f"model-{number}.safetensors")
    return [str(path) for path in sorted(tmp_path.glob("*.safetensors"))]


def wanted(name: str, weight: torch.Tensor, rank: int) -> torch.Tensor:
    """What tensor parallelism gives a rank."""
    if name == "column":
        return weight.narrow(0, rank * 32, 32)
    if name == "row":
        return weight.narrow(1, rank * 332, 332)
    return weight


def load(
    shards: list[str], rank: int, group: TorchGroup, opened: list[str] | None = None
) -> LoadReport:
    """Load this rank's slices, and compare them with safetensors'."""
    report = LoadReport(rank=rank)
    stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    expected = {name: wanted(name, tensor, rank) for name, tensor in stored.items()}
    dtype = torch.bfloat16
    targets = {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in expected.items()}
    with Exchange(group, CPU, report, is_forced=False) as exchange:
        settings = Settings(num_load_threads=2)
        with LoadSession(settings, report, exchange=exchange) as session, session.armed():
            for name, lazy in session.guard(session.iterate(opened or shards)):
                targets[name].copy_(wanted(name, lazy, rank))
    for name, tensor in expected.items():
        assert torch.equal(targets[name], tensor.to(dtype)), name
    return report


def one_rank(rank: int, act: Callable[..., Any], folder: str, shards: list[str]) -> None:
    """The body of a rank's process: writes what ``act`` returns, or its error, to a file."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    shared_plan.ROUND_BYTES = ROUND
    group = TorchGroup(rank, RANKS, dist.group.WORLD, dist.group.WORLD)
    try:
        told = dataclasses.asdict(act(shards, rank, group))
    except CheckpointError as error:
        told = {"error": str(error)}
    except Exception:  # noqa: BLE001 - the test shows it
        told = {"bug": traceback.format_exc()}
    Path(folder, f"told-{rank}").write_text(json.dumps(told, default=str))
    dist.destroy_process_group()


def on_all_ranks(
    act: Callable[..., LoadReport], shards: list[str], tmp_path: Path
) -> list[dict[str, Any]]:
    """What each rank's report says, or what went wrong there."""
    context = multiprocessing.get_context("spawn")
    arguments = (act, str(tmp_path), shards)
    ranks = [context.Process(target=one_rank, args=(rank, *arguments)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
        process.close()
    told = [json.loads(Path(tmp_path, f"told-{rank}").read_text()) for rank in range(RANKS)]
    bugs = [item["bug"] for item in told if "bug" in item]
    assert not bugs, bugs[0]
    return told


def size(shards: list[str]) -> int:
    return sum(os.path.getsize(shard) for shard in shards)


def test_every_byte_is_read_once(shards: list[str], tmp_path: Path) -> None:
    reports = on_all_ranks(load, shards, tmp_path)
    read = sum(report["bytes_read"] for report in reports)
    headers = 2 * 1024 * RANKS
    small = 2 * (4001 + 1 + 300_001) * (RANKS - 1)  # read at once, by each
    assert read <= size(shards) + headers + small
    for report in reports:
        assert report["exchanged"] > 0
        assert "read once by 3 ranks" in report["exchange_note"]


def replaying(shards: list[str], rank: int, group: TorchGroup) -> LoadReport:
    """The same checkpoint twice, then one whose tensors lie elsewhere in the files, twice."""
    moved = []
    for shard in shards:
        moved.append(f"{shard.removesuffix('.safetensors')}-moved.safetensors")
        if rank == 0:
            stored = {name: tensor + 1 for name, tensor in load_file(shard).items()}
            save_file(stored, moved[-1], {"note": "a longer header"})
    dist.barrier()
    stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    targets = {
        name: torch.zeros(wanted(name, tensor, rank).shape, dtype=torch.bfloat16)
        for name, tensor in stored.items()
    }
    recording: Recording | None = None
    followed = []
    for files in (shards, shards, moved, moved):
        report = LoadReport(rank=rank)
        planner = Planner(Parameters(targets), recording=recording)
        with Exchange(group, CPU, report) as exchange:
            settings = Settings(num_load_threads=2)
            with LoadSession(
                settings, report, planner.ledger, planner.weights, lambda: None, exchange
            ) as session:
                with session.armed():
                    for name, lazy in session.guard(session.iterate(files)):
                        targets[name].copy_(wanted(name, lazy, rank))
        followed.append(recording is not None and exchange.plan is recording.shared)
        recording, why = planner.recorded(None)
        assert recording is not None, why
        recording = dataclasses.replace(recording, shared=exchange.plan)
        for file in files:
            for name, tensor in load_file(file).items():
                expected = wanted(name, tensor, rank).to(torch.bfloat16)
                assert torch.equal(targets[name], expected), (name, file)
    assert followed == [False, True, False, True]
    return report


def test_a_plan_is_followed_again_for_the_headers_that_it_was_made_for(
    shards: list[str], tmp_path: Path
) -> None:
    for report in on_all_ranks(replaying, shards, tmp_path):
        assert report["replayed"] == 7 and report["exchanged"] > 0


def declining(shards: list[str], rank: int, group: TorchGroup) -> LoadReport:
    if rank != 1:
        return load(shards, rank, group)
    with Exchange(group, CPU, LoadReport()) as exchange:
        exchange.decline("it has its own ways")
    return LoadReport()


def test_a_rank_that_declines_has_all_read_alone(shards: list[str], tmp_path: Path) -> None:
    first, _, last = on_all_ranks(declining, shards, tmp_path)
    for report in (first, last):
        assert report["exchange_note"] == "rank 1: it has its own ways"
        assert report["exchanged"] == 0


def failing_early(shards: list[str], rank: int, group: TorchGroup) -> LoadReport:
    return load(shards, rank, group, shards if rank else [f"{shards[0]}.gone"])


def test_a_rank_that_fails_before_holds_up_no_one(shards: list[str], tmp_path: Path) -> None:
    failed, *others = on_all_ranks(failing_early, shards, tmp_path)
    assert "cannot open it" in failed["error"]
    for report in others:
        assert report["exchange_note"] == "rank 0: its load came to an end before"


def elsewhere(shards: list[str], rank: int, group: TorchGroup) -> LoadReport:
    """One rank has a copy of the checkpoint, as on another host."""
    if rank == 2:
        shards = [str(Path(shard).rename(f"{shard}.safetensors")) for shard in shards]
        for shard in shards:
            save_file(load_file(shard), shard.removesuffix(".safetensors"))
        shards = [shard.removesuffix(".safetensors") for shard in shards]
        dist.barrier()
    else:
        dist.barrier()
        shards = [f"{shard}.safetensors" for shard in shards]
    return load(shards, rank, group)


def test_ranks_that_see_other_files_read_alone(shards: list[str], tmp_path: Path) -> None:
    for report in on_all_ranks(elsewhere, shards, tmp_path):
        assert report["exchange_note"] == "the ranks do not see the same files"


def failing_midway(shards: list[str], rank: int, group: TorchGroup) -> LoadReport:
    if rank == 1:
        read = ShardFile.read_into

        def fail(file: ShardFile, offset: int, buffers: Any) -> None:
            if threading.current_thread().name.startswith("weightlift-reader"):
                raise CheckpointError(file.path, f"reading byte {offset} failed")
            read(file, offset, buffers)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ShardFile, "read_into", fail)
            return load(shards, rank, group)
    return load(shards, rank, group)


def test_a_rank_that_cannot_read_fails_on_all(shards: list[str], tmp_path: Path) -> None:
    first, second, third = on_all_ranks(failing_midway, shards, tmp_path)
    assert "reading byte" in second["error"]
    for told in (first, third):
        assert "rank 1 could not read its part" in told["error"]
        assert "reading byte" in told["error"]
