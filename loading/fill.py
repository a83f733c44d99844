"""A checkpoint into tensors of its own shapes: no engine, no slices, nothing to trace."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import torch

from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.parameters import span
from weightlift.loading.plain import is_plain
from weightlift.loading.session import LoadSession
from weightlift.loading.transfer import Run, Transfer, row_major


def fill(session: LoadSession, checkpoint: Checkpoint, targets: Mapping[str, torch.Tensor]) -> None:
    """Fill tensors from those of their names, which have their shapes; all in place on return.

    Of a name that stands in several shards the last one counts, as in engines.

    Args:
        session: The load.
        checkpoint: Its open shards.
        targets: Tensors by name, on the CPU or on CUDA devices, of any dtype and strides.

    Raises:
        CheckpointError: A shard could not be read.
    """
    are_apart, last = _are_apart(targets.values()), checkpoint.locate()
    report, rest = session.report, set()
    for shard in checkpoint.shards:
        runs: dict[torch.device, list[Run | Transfer]] = {}
        for name, entry in shard.tensors.items():
            target = targets.get(name)
            if target is None or not entry.nbytes or last[name][0] is not shard.file:
                continue
            if not is_plain(target, entry.shape):
                rest.add(name)
                continue
            report.planned += 1
            report.bytes_needed += entry.nbytes
            memory = target.detach() if target.requires_grad else target
            if are_apart and memory.dtype == entry.dtype and memory.is_contiguous():
                run = Run(entry.offset, entry.offset + entry.nbytes, memory, 0)
                runs.setdefault(memory.device, []).append(run)
            else:
                where = shard.file, entry.offset, entry.dtype
                session.delivery.add(Transfer(*where, entry.shape, row_major(entry.shape), memory))
        for work in runs.values():
            memories = [run.memory for run in work if isinstance(run, Run)]
            session.delivery.add_disjoint(shard.file, work, memories)
    for name, weight in session.lazies(checkpoint, rest):  # the last one, last
        targets[name].copy_(weight)
    report.tensors = len(targets)
    session.flush()


def _are_apart(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no two tensors share memory, going by their first and last elements."""
    spans = sorted([_addresses(tensor) for tensor in tensors if tensor.numel()])
    return all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def _addresses(tensor: torch.Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + (span(tensor) if tensor.layout is torch.strided else 0)
