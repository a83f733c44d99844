"""Rounds, and what a rank takes from them: whatever the slices, every byte lands where it belongs."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.placement import source_view
from weightlift.loading.plan import Window, gathered
from weightlift.loading.rounds import ALIGNMENT, Round, assign, cut
from weightlift.loading.steps import Storages, steps
from weightlift.loading.transfer import Run, Transfer, row_major

SIZES = st.integers(1, 40)
SHAPES = st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=12)
DTYPES = st.sampled_from([torch.uint8, torch.bfloat16, torch.float32])


def transfers(
    checkpoint: Checkpoint, data: st.DataObject, targets: dict[str, torch.Tensor]
) -> tuple[list[Transfer], list[tuple[int, int, int]]]:
    """A slice of each tensor into a target of its own, and which: dimension, start, length."""
    work, slices = [], []
    (shard,) = checkpoint.shards
    for name, entry in shard.tensors.items():
        dimension = data.draw(st.integers(0, 1))
        start = data.draw(st.integers(0, entry.shape[dimension] - 1))
        length = data.draw(st.integers(1, entry.shape[dimension] - start))
        shape = list(entry.shape)
        shape[dimension] = length
        stride = row_major(entry.shape)
        offset = entry.offset + start * stride[dimension] * entry.dtype.itemsize
        target = torch.zeros(shape, dtype=data.draw(st.sampled_from([entry.dtype, torch.float32])))
        targets[name] = target
        transfer = Transfer(shard.file, offset, entry.dtype, tuple(shape), stride, target)
        work.append(transfer.in_file_order())
        slices.append((dimension, start, length))
    return work, slices


@settings(deadline=None, max_examples=60)
@given(SHAPES, DTYPES, st.integers(64, 4000), st.data())
def test_every_slice_lands_where_it_belongs(
    shapes: list[tuple[int, int]], dtype: torch.dtype, most: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        stored = {f"t{number}": torch.randn(shape).to(dtype) for number, shape in enumerate(shapes)}
        save_file(stored, path)
        stored, content = load_file(path), path.read_bytes()
        with Checkpoint.open([path]) as checkpoint:
            targets: dict[str, torch.Tensor] = {}
            work, slices = transfers(checkpoint, data, targets)
            rounds = cut(checkpoint.shards, most)
            pieces = [piece for transfer in work for piece in transfer.split(8 << 20)]
            outside = assign(rounds, pieces)
            run_rounds(rounds, content)
            for window in gathered(checkpoint.shards[0].file, outside, 8 << 20):
                place(window, content)
            names = list(checkpoint.shards[0].tensors)
        for name, (dimension, start, length) in zip(names, slices, strict=True):
            expected = stored[name].narrow(dimension, start, length).to(targets[name].dtype)
            assert torch.equal(targets[name], expected), name


def run_rounds(rounds: list[Round], content: bytes) -> None:
    """What the ring and the pipeline do, for one round after the other."""
    before = 0
    for shared in rounds:
        assert shared.start >= before
        before = shared.stop
        row = torch.zeros(-(-shared.span // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8)
        row[: shared.span] = torch.frombuffer(
            bytearray(content[shared.start : shared.stop]), dtype=torch.uint8
        )
        storages: Storages = {}
        for step in steps(shared.pieces, shared.start, storages):
            step.parameter(storages).copy_(step.elements(row))


def place(window: Window, content: bytes) -> None:
    data = torch.frombuffer(bytearray(content[window.start : window.stop]), dtype=torch.uint8)
    for piece in window.pieces:
        piece.target.copy_(source_view(data, window, piece))


def test_ranks_share_a_round_without_gaps() -> None:
    for span in (1, 4095, 4096, 100_000, 256 << 20):
        for size in (1, 2, 3, 8):
            shared = Round(0, 1000, 1000 + span)
            parts = [shared.part(rank, size) for rank in range(size)]
            assert parts[0][0] == shared.start and parts[-1][1] == shared.stop
            for (_, stop), (start, _) in itertools.pairwise(parts):
                assert stop == start


def test_experts_at_even_distances_are_one_copy() -> None:
    fused = torch.zeros(8, 6, 4, dtype=torch.bfloat16)
    memory = fused.view(-1).view(torch.uint8)
    expert, distance = 6 * 4 * 2, 1000
    runs = [
        Run(64 + n * distance, 64 + n * distance + expert, memory, n * expert) for n in range(8)
    ]
    storages: Storages = {}
    (step,) = steps(runs, 64, storages)
    assert step.source.shape == (8, expert // step.source.dtype.itemsize)
    data = torch.randint(0, 256, (8000,), dtype=torch.uint8)
    step.parameter(storages).copy_(step.elements(data))
    for number in range(8):
        part = data[number * distance : number * distance + expert]
        assert torch.equal(fused[number].view(-1).view(torch.uint8), part)
    assert len(steps([*runs[:3], *runs[4:]], 64, {})) == 2, "the gap is left out"
