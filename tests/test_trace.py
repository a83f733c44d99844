"""What a load moved, and moving it again from other files: the same, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightlift.loading.parameters import Parameters
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession
from weightlift.loading.settings import Settings
from weightlift.loading.trace import Trace, Tracer

Model = dict[str, torch.Tensor]
Loader = Callable[[Model, dict[str, Any]], None]

SHAPES = {"rows": (6, 8), "columns": (4, 16), "one": (2, 8), "other": (3, 8), "norm": (5,)}


def checkpoint(folder: Path, seed: int, **more: torch.Tensor) -> list[str]:
    """Two shards of random tensors."""
    torch.manual_seed(seed)
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()} | more
    names = sorted(weights)
    folder.mkdir()
    paths = []
    for number, part in enumerate((names[:2], names[2:])):
        paths.append(str(folder / f"model-{number}.safetensors"))
        save_file({name: weights[name] for name in part}, paths[-1])
    return paths


def model() -> Model:
    sizes = {"rows": (6, 8), "columns": (4, 8), "joined": (5, 8), "norm": (5,)}
    found = {name: torch.zeros(size) for name, size in sizes.items()}
    return found | {"cast": torch.zeros(6, 8, dtype=torch.bfloat16)}


def copies(target: Model, weights: dict[str, Any]) -> None:
    """Whole tensors, columns of one, two that are joined, and a cast."""
    target["rows"].copy_(weights["rows"])
    target["cast"].copy_(weights["rows"])
    target["columns"].copy_(weights["columns"].narrow(1, 8, 8))
    target["joined"].copy_(torch.cat([weights["one"], weights["other"]]))
    target["norm"].copy_(weights["norm"])


def load(target: Model, files: list[str], loader: Loader) -> tuple[Trace | None, str]:
    """By a loader that the session watches."""
    tracer = Tracer(Parameters(target))
    with LoadSession(Settings(), LoadReport(), tracer, all_wait=True) as session, torch.no_grad():
        with session.armed():
            loader(target, dict(session.iterate(files)))
        session.flush()
        return tracer.trace([each for each, _ in session.checkpoints])


def follow(trace: Trace, target: Model, files: list[str]) -> LoadReport | None:
    """Without any loader, if the trace holds."""
    with LoadSession(Settings(), LoadReport(), all_wait=True) as session:
        checkpoints, parameters = [session.open(files)], Parameters(target)
        if not trace.holds_for(checkpoints, parameters):
            return None
        trace.follow(session, checkpoints, parameters)
        session.flush()
    return session.report


def test_what_a_loader_copied_is_copied_again_from_other_files(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path / "a", 1), checkpoint(tmp_path / "b", 2)
    target, expected = model(), model()
    trace, why = load(target, first, copies)
    assert trace is not None, why
    load(expected, second, copies)
    report = follow(trace, target, second)
    assert report is not None and report.replayed == 6 and report.planned == 0
    assert {name: value.tolist() for name, value in target.items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    assert report.tensors == len(SHAPES)


def worked(target: Model, weights: dict[str, Any]) -> None:
    copies(target, weights)
    target["rows"].copy_(weights["rows"] * 2)


def zeroed(target: Model, weights: dict[str, Any]) -> None:
    target["rows"].zero_()
    copies(target, weights)


def elsewhere(target: Model, weights: dict[str, Any]) -> None:
    copies(target, weights)
    torch.zeros(6, 8).copy_(weights["rows"])


def twice(target: Model, weights: dict[str, Any]) -> None:
    copies(target, weights)
    target["rows"][:2].copy_(weights["one"])


def from_another(target: Model, weights: dict[str, Any]) -> None:
    copies(target, weights)
    target["columns"].copy_(target["rows"][:4])


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (worked, "data was worked with"),
        (zeroed, "zero_"),
        (elsewhere, "no parameter's"),
        (twice, "one place"),
        (from_another, "copy_"),
    ],
    ids=["worked", "zeroed", "elsewhere", "twice", "from another"],
)
def test_a_loader_that_did_anything_else_leaves_no_trace(
    tmp_path: Path, loader: Loader, reason: str
) -> None:
    trace, why = load(model(), checkpoint(tmp_path / "a", 1), loader)
    assert trace is None and reason in why


def test_other_headers_or_other_memory_are_not_followed(tmp_path: Path) -> None:
    target, first = model(), checkpoint(tmp_path / "a", 1)
    trace, _ = load(target, first, copies)
    assert trace is not None
    more = checkpoint(tmp_path / "b", 2, extra=torch.zeros(3))
    assert follow(trace, target, more) is None, "one tensor more"
    assert follow(trace, target, first[:1]) is None, "one shard less"
    assert follow(trace, {**target, "rows": torch.zeros(6, 8)}, first) is None
    assert follow(trace, {**target, "more": torch.zeros(6, 8)}, first) is None
    assert follow(trace, target, checkpoint(tmp_path / "c", 3)) is not None
