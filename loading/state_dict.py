"""Loading without an engine: a checkpoint into tensors that are there, or into new ones."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.errors import CheckpointError
from weightlift.loading.fill import fill
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession
from weightlift.loading.settings import Settings
from weightlift.loading.uncollected import uncollected


def load_into(
    targets: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    settings: Settings | None = None,
) -> LoadReport:
    """Fill tensors in place from the checkpoint's tensors of the same names.

    Names and shapes are checked before the first byte is written.

    Args:
        targets: Tensors on the CPU or on CUDA devices, of the stored shapes; another dtype is
            cast to. Tensors of the checkpoint that are not named here are not read.
        path: A directory of safetensors files, or one file.
        settings: Threads, memory and the report's file; chosen if left out.

    Raises:
        CheckpointError: A file is damaged, a target is not in the checkpoint, or shapes differ.
        ValueError: A target is on the meta device.
        UnsupportedCheckpoint: A dtype that this torch does not have.
    """
    settings = settings or Settings()
    report = LoadReport(phase="load", model_path=os.fspath(path))
    with LoadSession(settings, report) as session, torch.no_grad(), uncollected():
        checkpoint = session.hold(Checkpoint.from_path(path))
        _check(checkpoint, targets, os.fspath(path))
        fill(session, checkpoint, targets)
    report.finish(settings)
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
        settings: Threads, memory and the report's file; chosen if left out.

    Raises:
        CheckpointError: A file is missing or damaged.
        UnsupportedCheckpoint: A dtype that this torch does not have.
    """
    with Checkpoint.from_path(path) as checkpoint:
        tensors = {
            entry.name: torch.empty(entry.shape, dtype=entry.dtype, device=device)
            for entry in checkpoint.entries()
        }
    load_into(tensors, path, settings)
    return tensors


def _check(checkpoint: Checkpoint, targets: Mapping[str, torch.Tensor], path: str) -> None:
    """Every target is in the checkpoint, with its shape."""
    found = checkpoint.locate()
    for name, target in targets.items():
        if target.is_meta:
            raise ValueError(f"the target {name!r} is on the meta device and can hold no data")
        if name not in found:
            remedy = "Leave it out of the targets, or load another checkpoint."
            raise CheckpointError(path, "it is not in the checkpoint", tensor=name, remedy=remedy)
        file, entry = found[name]
        if entry.shape != tuple(target.shape):
            problem = f"its shape is {entry.shape}, the target's {tuple(target.shape)}"
            remedy = "Load another checkpoint."
            raise CheckpointError(file.path, problem, tensor=name, remedy=remedy)
