"""What a load moved, and moving it again from other files: the same, or not at all."""

from __future__ import annotations

import threading
import weakref
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


def worked(target: Model, weights: dict[str, Any]) -> None:
    copies(target, weights)
    target["rows"].copy_(weights["rows"] * 2)


def zeroed(target: Model, weights: dict[str, Any]) -> None:
    target["rows"].zero_()
    copies(target, weights)


def elsewhere(target: Model, weights: dict[str, Any]) -> None:
    copies(target, weights)
    torch.zeros(6, 8).copy_(weights["rows"])


def by_a_thread(target: Model, weights: dict[str, Any]) -> None:
    thread = threading.Thread(target=copies, args=(target, weights))
    thread.start()
    thread.join()
    copies(target, weights)


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
        (elsewhere, "no parameter"),
        (twice, "one place"),
        (from_another, "copy_"),
        (by_a_thread, "threads of its own"),
    ],
    ids=["worked", "zeroed", "elsewhere", "twice", "from another", "by a thread"],
)
def test_a_loader_that_did_anything_else_leaves_no_trace(
    tmp_path: Path, loader: Loader, reason: str
) -> None:
    trace, why = load(model(), checkpoint(tmp_path / "a", 1), loader)
    assert trace is None and reason in why


def test_what_is_done_to_memory_that_parameters_share_is_seen(tmp_path: Path) -> None:
    whole = torch.zeros(96)
    target = {**model(), "rows": whole[:48].view(6, 8), "columns": whole[48:80].view(4, 8)}

    def loader(target: Model, weights: dict[str, Any]) -> None:
        copies(target, weights)
        whole.mul_(2)

    trace, why = load(target, checkpoint(tmp_path / "a", 1), loader)
    assert trace is None and "mul_" in why


def test_checkpoints_of_several_models_are_followed_together(tmp_path: Path) -> None:
    before = [checkpoint(tmp_path / name, seed) for seed, name in enumerate("ab")]
    after = [checkpoint(tmp_path / name, seed) for seed, name in enumerate("cd", 7)]
    targets = [model(), model()]
    named = {
        f"{n}.{name}": item for n, target in enumerate(targets) for name, item in target.items()
    }
    tracer = Tracer(Parameters(named))
    with LoadSession(Settings(), LoadReport(), tracer, all_wait=True) as session, torch.no_grad():
        with session.armed():
            for target, files in zip(targets, before, strict=True):
                copies(target, dict(session.iterate(files)))
        session.flush()
        trace, why = tracer.trace([each for each, _ in session.checkpoints])
    assert trace is not None, why
    with LoadSession(Settings(), LoadReport(), all_wait=True) as session:
        opened = [session.open(files) for files in after]
        assert trace.holds_for(opened, Parameters(named))
        trace.follow(session, opened, Parameters(named))
        session.flush()
    for target, files in zip(targets, after, strict=True):
        expected = model()
        load(expected, files, copies)
        assert all(torch.equal(target[name], expected[name]) for name in expected)


def test_a_trace_and_what_took_it_down_hold_no_parameter(tmp_path: Path) -> None:
    target = model()
    tracer = Tracer(Parameters(target))
    alive = weakref.ref(target["rows"].untyped_storage())
    with LoadSession(Settings(), LoadReport(), tracer, all_wait=True) as session, torch.no_grad():
        with session.armed():
            copies(target, dict(session.iterate(checkpoint(tmp_path / "a", 1))))
        session.flush()
        trace, _ = tracer.trace([each for each, _ in session.checkpoints])
    tracer.clear()
    del target, session
    assert trace is not None and alive() is None


def test_memory_is_written_to_once_that_is_allowed(tmp_path: Path) -> None:
    target, allowed = model(), []

    def vote() -> None:
        assert not target["rows"].any()
        allowed.append(True)

    tracer = Tracer(Parameters(target))
    with LoadSession(Settings(), LoadReport(), tracer, before_write=vote) as session:
        with session.armed(), torch.no_grad():
            next(iter(session.iterate(checkpoint(tmp_path / "a", 1))))
            assert not target["rows"].sum() and not allowed, "it is looked at"
            target["rows"].fill_(7)
    assert allowed == [True]


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
