"""Loading without an engine: a checkpoint into tensors that are there, or into new ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from weightlift.loading.checkpoint import Checkpoint, shard_paths
from weightlift.loading.errors import CheckpointError
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession
from weightlift.loading.settings import Settings


def load_into(
    targets: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    settings: Settings | None = None,
) -> LoadReport:
    """Fill tensors in place from the checkpoint's tensors of the same names.

    Args:
        targets: Tensors on the CPU or on CUDA devices, of the stored shapes; another dtype is
            cast to. Tensors of the checkpoint that are not named here are not read.
        path: A directory of safetensors files, or one file.
        settings: Threads and memory; chosen if left out.

    Raises:
        CheckpointError: A file is damaged, a target is not in the checkpoint, or shapes differ.
    """
    report = LoadReport(phase="load", model_path=os.fspath(path))
    missing = set(targets)
    with LoadSession(settings or Settings(), report) as session:
        files = [os.fspath(file) for file in shard_paths(Path(path))]
        for name, weight in session.guard(session.iterate(files)):
            if name not in missing:
                continue
            missing.remove(name)
            _check_shape(weight, targets[name])
            with torch.no_grad():
                targets[name].copy_(weight)
    if missing:
        remedy = "Leave it out of the targets, or load another checkpoint."
        raise CheckpointError(
            os.fspath(path), "it is not in the checkpoint", tensor=min(missing), remedy=remedy
        )
    report.finish("")
    return report


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    settings: Settings | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint on one device, by name.

    Args:
        path: A directory of safetensors files, or one file.
        device: The CPU or a CUDA device.
        settings: Threads and memory; chosen if left out.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    with Checkpoint.from_path(path) as checkpoint:
        tensors = {
            entry.name: torch.empty(entry.shape, dtype=entry.dtype, device=device)
            for entry in checkpoint.entries()
        }
    load_into(tensors, path, settings)
    return tensors


def _check_shape(weight: torch.Tensor, target: torch.Tensor) -> None:
    if weight.shape != target.shape:
        problem = f"its shape is {tuple(weight.shape)}, the target's {tuple(target.shape)}"
        raise CheckpointError(repr(weight), problem, remedy="Load another checkpoint.")
