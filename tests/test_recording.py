"""What is taken down of a load, when it holds for another, and what is staged for it."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightlift.loading import stager
from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.control import Control, Staged
from weightlift.loading.errors import CheckpointError, UpdateRefused
from weightlift.loading.parameters import Parameters
from weightlift.loading.planner import Planner
from weightlift.loading.recording import Ledger, Recording
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession, NamedWeights
from weightlift.loading.settings import Settings
from weightlift.loading.stage import Stage
from weightlift.loading.stager import Stager
from weightlift.loading.transaction import Transaction
from weightlift.loading.wanted import wanted_ranges
from weightlift.patches.sglang.server import stage

Model = dict[str, torch.Tensor]


def checkpoint(folder: Path, **tensors: torch.Tensor) -> list[str]:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return [str(folder / "model.safetensors")]


def numbers(first: float) -> torch.Tensor:
    return torch.arange(first, first + 32, dtype=torch.float32).view(4, 8)


def load(
    files: list[str],
    model: Model,
    loader: object = None,
    recording: Recording | None = None,
    gate: list[str] | None = None,
) -> tuple[Planner, Recording | None]:
    """Load with a loader that copies by name, or another; what was planned and recorded."""
    planner = Planner(Parameters(model), recording=recording)
    before_write = None if gate is None else lambda: gate.append("opened")
    settings, report = Settings(num_load_threads=2), LoadReport()
    session = LoadSession(settings, report, planner.ledger, planner.weights, before_write)
    with session, torch.no_grad():
        with session.armed():
            (loader or copy_by_name)(model, session.guard(session.iterate(files)))  # type: ignore[operator]
        session.flush()
    return planner, planner.recorded(None)[0]


def copy_by_name(model: Model, weights: NamedWeights) -> None:
    for name, weight in weights:
        model[name].copy_(weight)


def test_a_recording_is_replayed_without_the_loader(tmp_path: Path) -> None:
    model = {"a": torch.zeros(4, 8), "b": torch.zeros(8)}
    first = checkpoint(tmp_path / "1", a=numbers(0), b=torch.ones(8))
    second = checkpoint(tmp_path / "2", a=numbers(9), b=torch.zeros(8))
    _, recording = load(first, model)
    planner, again = load(second, model, lambda model, weights: list(weights), recording)
    assert planner.plan == "replay" and again is recording
    assert model["a"].equal(numbers(9)) and not model["b"].any()


def test_a_recording_holds_for_its_own_tensors_and_parameters_alone(tmp_path: Path) -> None:
    model = {"a": torch.zeros(4, 8), "b": torch.zeros(8)}
    files = checkpoint(tmp_path / "1", a=numbers(0), b=torch.ones(8))
    _, recording = load(files, model)
    assert recording is not None
    geometry = Parameters(model).geometry()
    for name, tensors in {
        "another dtype": {"a": numbers(0).bfloat16(), "b": torch.ones(8)},
        "another shape": {"a": numbers(0), "b": torch.ones(9)},
        "one more": {"a": numbers(0), "b": torch.ones(8), "c": torch.ones(8)},
        "one less": {"a": numbers(0)},
    }.items():
        with Checkpoint.open(checkpoint(tmp_path / name, **tensors)) as other:
            assert recording.misfit(other, geometry, ""), name
    twice = [*checkpoint(tmp_path / "3", a=numbers(0)), *checkpoint(tmp_path / "4", a=numbers(0))]
    with Checkpoint.open(twice) as other:
        assert "twice" in recording.misfit(other, geometry, "")
    with Checkpoint.open(files) as same:
        assert not recording.misfit(same, geometry, "")
        assert "ranks" in recording.misfit(same, geometry, "rank 1 of 2")
        moved = Parameters({**model, "b": torch.zeros(8)}).geometry()
        assert "parameters" in recording.misfit(same, moved, "")


def test_what_a_loader_works_on_is_not_replayed(tmp_path: Path) -> None:
    """It wipes the parameter with the first of two halves: their order is the engine's."""
    files = checkpoint(tmp_path / "1", a=numbers(0), b=numbers(50))
    model = {"both": torch.ones(12, 8)}

    def wipe_first(model: Model, weights: NamedWeights) -> None:
        for name, weight in weights:
            if name == "a":
                model["both"].zero_()
            model["both"].narrow(0, 0 if name == "a" else 4, 4).copy_(weight)

    planner, recording = load(files, model, wipe_first)
    assert recording is None
    assert planner.ledger.blamed.keys() == {"a", "b"}


def test_work_after_the_last_tensor_is_not_replayed(tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "1", a=numbers(0), b=numbers(50))
    model = {"a": torch.zeros(4, 8), "b": torch.zeros(4, 8)}

    def double(model: Model, weights: NamedWeights) -> None:
        copy_by_name(model, weights)
        model["a"].mul_(2)

    planner, recording = load(files, model, double)
    assert recording is None and "mul_" in planner.ledger.after_all
    assert model["a"].equal(numbers(0) * 2)


@pytest.mark.parametrize(
    "write",
    [
        lambda target, weight: target.copy_(weight * 2),
        lambda target, weight: target.add_(1),
        lambda target, weight: target.__setitem__(0, torch.ones(8)),
    ],
    ids=["of what was made of a tensor", "in place", "by index"],
)
def test_no_write_comes_before_the_gate(write: object, tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "1", a=numbers(1))
    model = {"a": torch.zeros(4, 8)}
    seen: list[bool] = []

    def loader(model: Model, weights: NamedWeights) -> None:
        for _, weight in weights:
            write(model["a"], weight)  # type: ignore[operator]

    class Gate(list[str]):
        def append(self, item: str) -> None:
            super().append(item)
            with torch._C.DisableTorchFunction():
                seen.append(bool(model["a"].any()))

    load(files, model, loader, gate=Gate())
    assert seen == [False] and model["a"].any()


def test_a_gate_that_stays_shut_keeps_the_old_weights(tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "1", a=numbers(1), b=torch.ones(8))
    model = {"a": torch.zeros(4, 8), "b": torch.zeros(8)}

    class Shut(list[str]):
        def append(self, item: str) -> None:
            raise UpdateRefused("rank 1 cannot")

    with pytest.raises(UpdateRefused):
        load(files, model, gate=Shut())
    assert not model["a"].any() and not model["b"].any()


def test_all_ranks_hear_of_a_problem_once() -> None:
    votes: list[str] = []

    def vote(problem: str) -> list[str]:
        votes.append(problem)
        return [problem, "" if len(votes) == 1 else "the disk failed"]

    transaction = Transaction(vote)
    transaction.begin()
    transaction.begin()
    transaction.end()
    assert votes == ["", ""]
    assert transaction.failure == "rank 1: the disk failed" and transaction.may_have_written


def test_a_group_that_cannot_vote_does_not_begin() -> None:
    def vote(problem: str) -> list[str]:
        raise RuntimeError("Connection closed by peer")

    transaction = Transaction(vote)
    with pytest.raises(UpdateRefused, match="one may be gone"):
        transaction.begin()
    assert not transaction.may_have_written


def staged(stage: Stage, files: list[str], recording: Recording) -> int:
    with Checkpoint.open(files) as opened:
        return stage.fill(opened, wanted_ranges([recording], opened), 2)


def recording_of(files: list[str], model: Model) -> Recording:
    _, recording = load(files, model)
    assert recording is not None
    return recording


def test_staging_waits_for_an_update_that_reads_from_it(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "1", a=numbers(0))
    second = checkpoint(tmp_path / "2", a=numbers(50))
    recording = recording_of(first, {"a": torch.zeros(4, 8)})
    stage = Stage(1 << 20, pinned=False)
    assert staged(stage, first, recording) == numbers(0).nbytes
    with Checkpoint.open(first) as opened, stage.lent_to(opened):
        other = threading.Thread(target=staged, args=(stage, second, recording))
        other.start()
        other.join(0.2)
        assert other.is_alive()
        file, entry = opened.locate()["a"]
        view = file.staged_view(entry.offset, entry.offset + entry.nbytes)
        assert view is not None and view.view(torch.float32).view(4, 8).equal(numbers(0))
    other.join()
    with Checkpoint.open(second) as opened, stage.lent_to(opened):
        assert opened.shards[0].file.staged is not None
    stage.close()


def test_staged_bytes_of_a_rewritten_file_do_not_count(tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "1", a=numbers(0))
    recording = recording_of(files, {"a": torch.zeros(4, 8)})
    stage = Stage(1 << 20, pinned=False)
    staged(stage, files, recording)
    os.utime(files[0], ns=(1, 1))
    with Checkpoint.open(files) as opened, stage.lent_to(opened):
        assert opened.shards[0].file.staged is None


def test_staging_keeps_to_its_memory(tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "1", a=numbers(0))
    recording = recording_of(files, {"a": torch.zeros(4, 8)})
    assert staged(Stage(64, pinned=False), files, recording) == 64


def test_a_shard_that_cannot_be_staged_says_so(tmp_path: Path) -> None:
    files = checkpoint(tmp_path / "1", a=numbers(0))
    recording = recording_of(files, {"a": torch.zeros(4, 8)})
    with Checkpoint.open(files) as opened:
        os.truncate(files[0], 100)
        wanted = wanted_ranges([recording], opened)
        with pytest.raises(CheckpointError, match="truncated while read"):
            Stage(1 << 20, pinned=False).fill(opened, wanted, 2)


def test_control_keeps_each_models_word(tmp_path: Path) -> None:
    control = Control(tmp_path)
    assert control.request() is None and not control.broken()
    assert control.ask_to_stage("/a") == 1 and control.ask_to_stage("/b") == 2
    assert control.request() == (2, "/b")
    control.answer(Staged(0, 2, "/b", 10, 0.1))
    assert control.wait_for(2, 0.1) == [Staged(0, 2, "/b", 10, 0.1)]
    control.mark_broken(1, "half of it")
    control.mark_whole(2)
    assert control.broken() == "half of it"
    control.mark_whole(1)
    assert not control.broken()


def test_requests_that_come_at_once_have_numbers_of_their_own(tmp_path: Path) -> None:
    control = Control(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(control.ask_to_stage, map(str, range(200))))
    assert sorted(numbers) == list(range(1, 201))


def test_who_asked_hears_that_another_checkpoint_was_staged_instead(tmp_path: Path) -> None:
    control = Control(tmp_path)
    control.answer(Staged(0))

    def answer() -> None:
        while control.request() is None:
            time.sleep(0.001)
        control.ask_to_stage("/b")
        control.answer(Staged(0, 2, "/b", 10, 0.1))

    rank = threading.Thread(target=answer)
    rank.start()
    told = stage(control, "/a", wait=True, timeout=60)
    rank.join()
    assert not told["success"] and "rank 0 staged /b instead" in told["message"]


def test_whoever_stages_goes_on_whatever_goes_wrong_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[None] = []

    def look(*_: object, **__: object) -> None:
        looks.append(None)
        if len(looks) == 3:
            raise KeyboardInterrupt  # or it would go on for ever
        raise ValueError("a header that nobody thought of")

    monkeypatch.setattr(Stager, "_look", look)
    monkeypatch.setattr(stager, "LOOK_SECONDS", 0.001)
    with pytest.raises(KeyboardInterrupt):
        Stager(0, Stage(0, pinned=False), Settings(), list)._work()
    assert len(looks) == 3


def test_a_ledger_knows_no_tensor_that_was_not_offered() -> None:
    assert Ledger(Parameters({})).recipe("gone") is None
