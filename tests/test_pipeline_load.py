"""Components of a pipeline that share readers, and the text encoder that is read before it is built."""

from __future__ import annotations

import ctypes
import gc
import json
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from weightlift.loading import landing, placement, pools, readers
from weightlift.loading.errors import CheckpointError, PlanAborted
from weightlift.loading.files import ShardFile
from weightlift.loading.placement import HostPlacer
from weightlift.loading.reader import ReaderPool
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession
from weightlift.loading.settings import Settings
from weightlift.patches.sglang_diffusion import pipeline_load
from weightlift.patches.sglang_diffusion.components import _Component
from weightlift.patches.sglang_diffusion.pipeline_load import PipelineLoad

COMPONENTS = ("vae", "text_encoder", "scheduler", "transformer")
CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline: its transformer is the largest component, its text encoder the second."""
    for component, rows in (("vae", 2), ("text_encoder", 8), ("transformer", 32)):
        (tmp_path / component).mkdir()
        for shard in (1, 2):
            named = {f"{component}.{shard}.{n}": torch.randn(rows, 16) for n in range(3)}
            save_file(named, tmp_path / component / f"model-{shard}.safetensors")
    return tmp_path


@pytest.fixture(params=["auto", "processes"])
def opened(
    request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PipelineLoad]:
    """The load of the pipeline, of which the transformer is on and reads what it will be made of."""
    monkeypatch.setattr(
        pipeline_load, "report_of", lambda engine, path, phase: LoadReport(phase=phase)
    )
    monkeypatch.setattr(pipeline_load, "DEVICES", ("cpu",))
    settings = Settings(num_load_threads=2, readers=request.param)
    server_args = types.SimpleNamespace(text_encoder_cpu_offload=False)
    server_args.pipeline_config = types.SimpleNamespace(text_encoder_precisions=("bf16",))
    with PipelineLoad(COMPONENTS, settings, server_args, by_size=True) as load:
        load.begin(str(folder / "transformer"))
        load.device = CPU
        yield load


def files_of(folder: Path) -> list[str]:
    return [str(file) for file in sorted(folder.glob("*.safetensors"))]


def stored(folder: Path) -> Tensors:
    return {name: value for file in files_of(folder) for name, value in load_file(file).items()}


def loaded(session: LoadSession, folder: Path, then: Callable[[], None] = lambda: None) -> Tensors:
    """What a loader gets that copies everything to memory of its own; ``then`` is done at its end."""
    found = {}
    with session.armed():
        for name, lazy in session.iterate(files_of(folder)):
            found[name] = torch.empty(lazy.shape)
            found[name].copy_(lazy)
        then()
        session.end()
    return found


def are_equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def has_begun(load: PipelineLoad, folder: Path) -> bool:
    """Whether a text encoder is being read before its turn."""
    with load.session_for(str(folder / "text_encoder")) as session:
        begun = bool(session.begun)
        session.flush()
    return begun


def test_a_text_encoder_is_read_behind_the_transformer(
    opened: PipelineLoad, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(*given: Any) -> Any:
        made.append(given)
        return readers.open_readers(*given)

    monkeypatch.setattr(pools, "open_readers", make)
    for component in ("transformer", "text_encoder"):
        opened.begin(str(folder / component))
        opened.device = CPU
        session = opened.session_for(str(folder / component))
        with opened.on(session), session:
            found = loaded(session, folder / component, opened.begin_next)
        assert are_equal(found, stored(folder / component))
        assert session.report.landed == (len(found) if component == "text_encoder" else 0)
        sizes = [Path(file).stat().st_size for file in files_of(folder / component)]
        assert session.report.bytes_read <= sum(sizes), "each byte once"
    assert len(made) == 1, "they share their readers"


def test_a_loader_may_want_some_of_the_files_in_another_order(
    opened: PipelineLoad, folder: Path
) -> None:
    opened.begin_next()
    encoder = folder / "text_encoder"
    save_file({"more": torch.ones(4)}, encoder / "model-3.safetensors")
    with opened.session_for(str(encoder)) as session, session.armed():
        names = []
        for file in reversed(files_of(encoder)[:2]):
            names += [name for name, _ in session.iterate([f"{encoder}//{Path(file).name}"])]
        assert names == [f"text_encoder.{shard}.{n}" for shard in (2, 1) for n in range(3)]
        assert len(session.checkpoints) == 1, "no file was opened twice"
        assert [name for name, _ in session.iterate(files_of(encoder)[2:])] == ["more"]


def test_a_load_waits_for_its_own_bytes_alone(
    opened: PipelineLoad, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if opened._settings.readers == "processes":
        pytest.skip("processes cannot be held up from here")
    may_read, read = threading.Event(), ShardFile.read_into
    were_let: list[bool] = []

    def wait(self: ShardFile, *given: Any) -> Any:
        is_readers = threading.current_thread().name.startswith("weightlift-reader")
        if "text_encoder" in str(self.path) and is_readers:
            were_let.append(may_read.wait(10))
        return read(self, *given)

    monkeypatch.setattr(ShardFile, "read_into", wait)
    session = opened.session_for(str(folder / "transformer"))
    with opened.on(session), session:
        found = loaded(session, folder / "transformer", opened.begin_next)
    assert are_equal(found, stored(folder / "transformer"))
    assert opened._is_busy()
    may_read.set()
    assert has_begun(opened, folder) and were_let and all(were_let)


def _not_on_a_device(load: PipelineLoad, folder: Path, patch: pytest.MonkeyPatch) -> None:
    load.device = None


def _on_the_host(load: PipelineLoad, folder: Path, patch: pytest.MonkeyPatch) -> None:
    load._server_args.text_encoder_cpu_offload = True


def _on_the_host_since_0_5_18(load: PipelineLoad, folder: Path, patch: pytest.MonkeyPatch) -> None:
    load._server_args.should_start_component_on_cpu = "text_encoder".__eq__


def _quantised(load: PipelineLoad, folder: Path, patch: pytest.MonkeyPatch) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))


def _without_room(load: PipelineLoad, folder: Path, patch: pytest.MonkeyPatch) -> None:
    size = sum(value.nbytes for value in stored(folder / "text_encoder").values())
    needed = (
        landing.SPARE_BYTES + size + size // 2
    )  # the loader's memory is of two bytes an element
    patch.setattr(landing, "free_memory", lambda device: needed - 1)


def _without_room_for_float32(load: PipelineLoad, folder: Path, patch: pytest.MonkeyPatch) -> None:
    load._server_args.pipeline_config.text_encoder_precisions = ("fp32",)
    size = sum(value.nbytes for value in stored(folder / "text_encoder").values())
    patch.setattr(landing, "free_memory", lambda device: landing.SPARE_BYTES + 2 * size - 1)


def _elsewhere(load: PipelineLoad, folder: Path, patch: pytest.MonkeyPatch) -> None:
    load._server_args.component_paths = {"text_encoder": "another"}


def _one_of_two_ranks(load: PipelineLoad, folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.distributed, "is_initialized", lambda: True)
    patch.setattr(torch.distributed, "get_world_size", lambda: 2)


def _without_readers(load: PipelineLoad, folder: Path, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no readers")

    with patch.context() as patched:
        patched.setattr(pools, "open_readers", fail)
        load.begin_next()


def _damaged(load: PipelineLoad, folder: Path, patch: pytest.MonkeyPatch) -> None:
    file = folder / "text_encoder" / "model-2.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    load.begin_next()
    file.write_bytes(whole)


OBSTACLES = (
    *(_not_on_a_device, _on_the_host, _on_the_host_since_0_5_18, _quantised, _without_room),
    *(_without_room_for_float32, _elsewhere, _one_of_two_ranks, _without_readers, _damaged),
)


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda item: item.__name__.strip("_"))
def test_what_cannot_be_read_ahead_is_loaded_in_its_turn(
    obstacle: Any, opened: PipelineLoad, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstacle(opened, folder, monkeypatch)
    if obstacle not in (_without_readers, _damaged):
        opened.begin_next()
    session = opened.session_for(str(folder / "text_encoder"))
    assert not session.begun
    with session:
        assert are_equal(loaded(session, folder / "text_encoder"), stored(folder / "text_encoder"))
    assert session.report.landed == 0


def test_no_other_component_is_read_behind_the_transformer(
    opened: PipelineLoad, folder: Path
) -> None:
    opened._to_come = [opened._to_come[-1]] if opened._to_come else []  # a VAE is next
    opened.begin_next()
    assert not has_begun(opened, folder)


def test_there_is_room_for_what_there_is_just_room_for(
    opened: PipelineLoad, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(value.nbytes for value in stored(folder / "text_encoder").values())
    needed = landing.SPARE_BYTES + size + size // 2
    monkeypatch.setattr(landing, "free_memory", lambda device: needed)
    opened.begin_next()
    assert has_begun(opened, folder)


def test_what_was_taken_for_the_next_one_is_let_go_of_when_another_begins(
    opened: PipelineLoad, folder: Path
) -> None:
    opened.begin_next()
    opened.begin(str(folder / "scheduler"))  # has no files, and says nothing of the order
    assert opened._next is not None
    held = [weakref.ref(item) for item in opened._next[1]._copies.landing._memory.values()]
    opened.begin(str(folder / "vae"))
    gc.collect()
    assert opened._next is None and not any(item() is not None for item in held)
    assert not opened._is_busy()


def test_a_loader_without_room_beside_what_was_read_has_it_without(
    opened: PipelineLoad, folder: Path
) -> None:
    opened.begin_next()
    assert opened._next is not None
    held = [weakref.ref(item) for item in opened._next[1]._copies.landing._memory.values()]
    tries = []

    def load() -> torch.nn.Module:
        tries.append(sum(item() is not None for item in held))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("for the test")
        return torch.nn.Linear(2, 2)

    component = _Component(str(folder / "text_encoder"), opened._settings)
    assert isinstance(component.load(load), torch.nn.Linear)
    assert tries == [6, 0]


def test_what_waits_of_a_load_that_is_given_up_is_not_read(
    opened: PipelineLoad, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if opened._settings.readers == "processes":
        pytest.skip("processes cannot be counted from here")
    monkeypatch.setattr(placement, "HOST_WINDOW_BYTES", 1024)
    is_left, place, placed = threading.Event(), HostPlacer.place, []
    wait = ReaderPool.wait

    def place_later(self: HostPlacer, window: Any) -> Any:
        is_left.wait(10)
        placed.append(window)
        return place(self, window)

    def let_go(self: ReaderPool, load: object = None) -> None:
        is_left.set()
        wait(self, load)

    monkeypatch.setattr(HostPlacer, "place", place_later)
    monkeypatch.setattr(ReaderPool, "wait", let_go)
    session = opened.session_for(str(folder / "transformer"))
    with pytest.raises(PlanAborted), session, session.armed():
        for _, lazy in session.iterate(files_of(folder / "transformer")):
            torch.empty(lazy.shape).copy_(lazy)
        session.delivery.hand_on()
        raise PlanAborted("for the test")
    assert len(placed) <= 2, "what both readers had begun, of a dozen"


def test_who_interrupts_a_load_ends_the_readers_that_it_shares(
    opened: PipelineLoad, folder: Path
) -> None:
    session, shared = opened.session_for(str(folder / "transformer")), opened.pools.of(CPU)
    with pytest.raises(KeyboardInterrupt), session, session.armed():
        for _, lazy in session.iterate(files_of(folder / "transformer")):
            torch.empty(lazy.shape).copy_(lazy)
        raise KeyboardInterrupt
    assert shared.failure is not None
    with opened.session_for(str(folder / "vae")) as following:
        assert are_equal(loaded(following, folder / "vae"), stored(folder / "vae"))


def test_nothing_is_written_for_a_load_that_has_ended(
    opened: PipelineLoad, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if opened._settings.readers != "processes":
        pytest.skip("threads write what they read at once")
    monkeypatch.setattr(placement, "HOST_WINDOW_BYTES", 1024)
    move, moved = ctypes.memmove, []

    def move_slowly(*given: Any) -> Any:
        time.sleep(0.05)
        moved.append(given)
        return move(*given)

    monkeypatch.setattr(ctypes, "memmove", move_slowly)
    session = opened.session_for(str(folder / "transformer"))
    with session, session.armed():
        for _, lazy in session.iterate(files_of(folder / "transformer")):
            torch.empty(lazy.shape).copy_(lazy)
        session.delivery.hand_on()
        (pool,) = session.delivery._pools.values()
        while not moved:
            time.sleep(0.01)
        pool._give_up(PlanAborted("for the test"))  # type: ignore[attr-defined]
    ended = len(moved)
    time.sleep(0.3)
    assert len(moved) == ended


def test_what_is_read_ahead_and_never_loaded_is_let_go_of(
    opened: PipelineLoad, folder: Path
) -> None:
    opened.begin_next()
    assert opened._next is not None
    memory = opened._next[1]._copies.landing._memory
    held = [weakref.ref(item) for item in memory.values()]
    assert len(held) == 6
    opened._end_next()
    gc.collect()
    assert not any(item() is not None for item in held)
    with opened.session_for(str(folder / "text_encoder")) as session:
        assert are_equal(loaded(session, folder / "text_encoder"), stored(folder / "text_encoder"))


def test_damage_that_reading_ahead_finds_is_told_and_readers_are_made_anew(
    opened: PipelineLoad, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = folder / "text_encoder" / "model-1.safetensors"
    size = shard.stat().st_size
    whole = shard.read_bytes()
    begin = LoadSession.begin

    def begin_late(self: LoadSession, *given: Any) -> bool:
        checkpoint = self.open(given[0])
        self.begun.update((shard.file.path, shard) for shard in checkpoint.shards)
        with open(shard, "r+b") as file:
            file.truncate(size - 100)  # after its header was read
        return begin(self, *given)

    monkeypatch.setattr(LoadSession, "begin", begin_late)
    opened.begin_next()
    following = opened.session_for(str(folder / "text_encoder"))
    with pytest.raises(CheckpointError, match=r"text_encoder.*model-1"), following:
        loaded(following, folder / "text_encoder")
    shard.write_bytes(whole)
    again = opened.session_for(str(folder / "transformer"))
    with again:
        assert are_equal(loaded(again, folder / "transformer"), stored(folder / "transformer"))


def test_a_load_that_is_given_up_leaves_the_next_one_alone(
    opened: PipelineLoad, folder: Path
) -> None:
    session = opened.session_for(str(folder / "transformer"))
    with pytest.raises(PlanAborted), session, session.armed():
        for _, lazy in session.iterate(files_of(folder / "transformer")):
            torch.empty(lazy.shape).copy_(lazy)
        opened.begin_next()
        raise session.abort(PlanAborted("for the test"))
    following = opened.session_for(str(folder / "text_encoder"))
    with opened.on(following), following:
        found = loaded(following, folder / "text_encoder")
    assert are_equal(found, stored(folder / "text_encoder"))
    assert following.report.landed == len(found)
