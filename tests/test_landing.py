"""What is read before a loader asks for it becomes what the loader asks for, and nothing else does."""

from __future__ import annotations

import os
import random
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_session import COPIES, Loader

from weightlift.loading import delivery, landing, later, placement
from weightlift.loading.errors import CheckpointError, PlanAborted
from weightlift.loading.lazy import LazyTensor
from weightlift.loading.leftovers import adopt_lazy
from weightlift.loading.pools import Pools
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession
from weightlift.loading.settings import Settings

FLOAT = torch.float32


def bits(tensor: torch.Tensor) -> list[int]:
    """The bytes of a tensor."""
    found: list[int] = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).tolist()
    return found


def parameter_of(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As engines make one of a model on the meta device: moved, memory made, copied."""
    moved = weight.to(device)
    memory = torch.empty_like(torch.empty(weight.shape, device="meta"), device=device, dtype=FLOAT)
    parameter = torch.nn.Parameter(memory, requires_grad=False)
    parameter.data.copy_(moved)
    return parameter.data


def header_bytes(files: list[str]) -> int:
    """Bytes of the files before their tensors."""
    return sum(8 + int.from_bytes(Path(file).read_bytes()[:8], "little") for file in files)


@pytest.mark.parametrize("loader", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("tiny_windows", [False, True], ids=["windows", "tiny windows"])
def test_whatever_a_loader_does_it_gets_the_same_result(
    loader: Loader,
    tiny_windows: bool,
    device: torch.device,
    save: Any,
    open_session: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tiny_windows:
        monkeypatch.setattr(placement, "HOST_WINDOW_BYTES", 256)
        monkeypatch.setattr(placement, "CUDA_WINDOW_BYTES", 256)
    weight = torch.randn(48, 40)
    expected = torch.zeros(96, 80, device=device)
    actual = expected.clone()
    loader(expected, weight.clone())
    files = save({"weight": weight})
    with open_session(all_wait=True) as session, session.armed():
        session.begin(files, device, FLOAT)
        for _, lazy in session.guard(session.iterate(files)):
            assert type(lazy) is LazyTensor and lazy.source.landed is not None
            loader(actual, lazy)
    assert bits(actual) == bits(expected)


def test_memory_that_a_loader_makes_is_what_was_read(
    device: torch.device, save: Any, open_session: Any
) -> None:
    weights = {f"w{number}": torch.randn(64, 9) for number in range(20)} | {"b": torch.randn(7)}
    files = save(weights)
    with open_session(all_wait=True) as session, session.armed():
        session.begin(files, device, FLOAT)
        found = {name: parameter_of(lazy, device) for name, lazy in session.iterate(files)}
        session.end()
    assert all(bits(found[name]) == bits(weight) for name, weight in weights.items())
    report = session.report
    assert (report.landed, report.planned) == (21, 21)
    assert report.bytes_needed == report.bytes_read - header_bytes(files)


def test_parameters_made_of_lazy_tensors_are_what_was_read(
    device: torch.device, save: Any, open_session: Any
) -> None:
    weights = {"weight": torch.randn(64, 9), "bias": torch.randn(64)}
    files = save(weights)
    model = torch.nn.Linear(9, 64, device="meta")
    with open_session(all_wait=True) as session, session.armed():
        session.begin(files, device, FLOAT)
        found = {name: lazy.to(device) for name, lazy in session.iterate(files)}
        model.load_state_dict(found, assign=True)
        adopt_lazy(model)
        session.flush()
        session.finish(model)
    assert session.report.landed == 2
    assert all(bits(value) == bits(weights[name]) for name, value in model.named_parameters())


def test_a_parameter_made_of_joined_tensors_is_made_of_what_was_read(
    device: torch.device, save: Any, open_session: Any
) -> None:
    weights = {f"w{number}": torch.randn(8, 9) for number in range(3)}
    files = save(weights)
    model = torch.nn.Linear(9, 24, bias=False, device="meta")
    with open_session(all_wait=True) as session, session.armed():
        session.begin(files, device, FLOAT)
        joined = torch.cat([lazy for _, lazy in session.iterate(files)]).to(device)
        model.load_state_dict({"weight": joined}, assign=True)
        adopt_lazy(model)
        session.flush()
        session.finish(model)
    assert bits(model.weight) == bits(torch.cat([weights[name] for name in sorted(weights)]))
    assert session.report.bytes_read == header_bytes(files) + 3 * 8 * 9 * 4


def swapped(first: torch.Tensor, second: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
    """Memory made after one was moved gets the other; the one goes elsewhere."""
    moved = first.to(device)
    memory = torch.empty_like(torch.empty(first.shape, device="meta"), device=device)
    memory.copy_(second)
    other = torch.zeros(first.shape, device=device)
    other.copy_(moved)
    return [memory, other]


def swapped_back(first: Any, second: Any, device: torch.device) -> list[torch.Tensor]:
    """What memory was made for comes to it after another did."""
    moved = first.to(device)
    memory = torch.empty_like(torch.empty(first.shape, device="meta"), device=device)
    memory.copy_(second)
    memory.copy_(moved)
    return [memory]


def zeroed_before(first: Any, second: Any, device: torch.device) -> list[torch.Tensor]:
    """Memory is written to before the copy."""
    moved = first.to(device)
    memory = torch.empty_like(torch.empty(first.shape, device="meta"), device=device)
    memory.zero_()
    memory.copy_(moved)
    return [memory]


def zeroed_after(first: Any, second: Any, device: torch.device) -> list[torch.Tensor]:
    """Memory is written to after the copy."""
    memory = parameter_of(first, device)
    memory[:2].zero_()
    return [memory]


def overwritten(first: Any, second: Any, device: torch.device) -> list[torch.Tensor]:
    """Part of another comes to it after the copy."""
    memory = parameter_of(first, device)
    memory[3:5].copy_(second[3:5])
    return [memory]


def part_alone(first: Any, second: Any, device: torch.device) -> list[torch.Tensor]:
    """A part of what memory was made for comes to it."""
    moved = first.to(device)
    memory = torch.empty_like(torch.empty(first.shape, device="meta"), device=device)
    memory.copy_(moved[:1].expand(first.shape))
    return [memory]


def tied(first: Any, second: Any, device: torch.device) -> list[torch.Tensor]:
    """One tensor becomes two parameters."""
    one, two = parameter_of(first, device), parameter_of(first, device)
    assert one.untyped_storage().data_ptr() != two.untyped_storage().data_ptr()
    two[:1].zero_()
    return [one, two]


def written_source(first: Any, second: Any, device: torch.device) -> list[torch.Tensor]:
    """The tensor itself is written to."""
    first[:1].zero_()
    return [parameter_of(first, device)]


def fused(first: Any, second: Any, device: torch.device) -> list[torch.Tensor]:
    """Two become one parameter, and one of them another."""
    return [parameter_of(torch.cat([first, second]), device), parameter_of(second, device)]


def half(first: Any, second: Any, device: torch.device) -> list[torch.Tensor]:
    """Memory of another dtype is made."""
    moved = first.to(device, torch.float16)
    memory = torch.empty_like(
        torch.empty(first.shape, device="meta"), device=device, dtype=torch.float16
    )
    memory.copy_(moved)
    return [memory]


def waiting_then_overwritten(first: Any, second: Any, device: torch.device) -> list[torch.Tensor]:
    """A copy that waits for what it copies, then one from the file to the same place, then a look."""
    memory = torch.zeros(first.shape, device=device)
    memory.copy_(first)
    memory[2:6].copy_(second[2:6].half().to(device))
    memory[4:5].copy_(second.view(torch.int32)[4:5].view(torch.float32))
    return [memory, memory.sum()]


MIXED: tuple[Callable[..., list[torch.Tensor]], ...] = (
    *(swapped, swapped_back, zeroed_before, zeroed_after, overwritten, part_alone, tied),
    *(fused, half, waiting_then_overwritten),
)


@pytest.mark.parametrize(
    "sequence", [*MIXED, written_source], ids=lambda sequence: sequence.__name__
)
def test_memory_that_was_given_holds_what_the_loader_put_there(
    sequence: Callable[..., list[torch.Tensor]], device: torch.device, save: Any, open_session: Any
) -> None:
    one, two = torch.randn(16, 9), torch.randn(16, 9)
    expected = sequence(one.clone(), two.clone(), device)
    files = save({"one": one, "two": two})
    with open_session(all_wait=True) as session, session.armed():
        session.begin(files, device, FLOAT)
        lazy = dict(session.iterate(files))
        found = sequence(lazy["one"], lazy["two"], device)
        session.end()
    assert [bits(item) for item in found] == [bits(item) for item in expected]


@pytest.mark.parametrize("seed", range(20))
def test_any_mixture_of_such_sequences(
    seed: int,
    device: torch.device,
    save: Any,
    open_session: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr(later, "LATER_BYTES", chance.choice([0, 2000, 1 << 30]))
    weights = {f"w{number:02d}": torch.randn(16, 9) for number in range(40)}
    files = save(weights)
    pairs = [tuple(chance.sample(sorted(weights), 2)) for _ in range(60)]
    sequences = [chance.choice(MIXED) for _ in pairs]

    def run(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        made = [
            item
            for sequence, (first, second) in zip(sequences, pairs, strict=True)
            for item in sequence(tensors[first], tensors[second], device)
        ]
        return [item.detach() for item in made]

    expected = run({name: weight.clone() for name, weight in weights.items()})
    with open_session(all_wait=True) as session, session.armed():
        session.begin(files, device, FLOAT)
        found = run(dict(session.iterate(files)))
        session.end()
    assert [bits(item) for item in found] == [bits(item) for item in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_stored_otherwise_is_cast_on_its_way(
    dtype: torch.dtype, device: torch.device, save: Any, open_session: Any
) -> None:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.float8_e4m3fn)
    weights = {str(kind): torch.randn(16, 9).mul(9).to(kind) for kind in kinds}
    files = save(weights)

    def parameters(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Of each one cast as it is moved, and one cast as it is copied."""
        made = []
        for _, weight in sorted(tensors.items()):
            for moved in (weight.to(device, dtype), weight.to(device)):
                like = torch.empty(weight.shape, device="meta")
                made.append(torch.empty_like(like, device=device, dtype=dtype))
                made[-1].copy_(moved)
        return made

    expected = parameters(weights)
    with open_session(all_wait=True) as session, session.armed():
        session.begin(files, device, dtype)
        found = parameters(dict(session.iterate(files)))
        session.end()
    assert session.report.landed == 3
    assert [bits(item) for item in found] == [bits(item) for item in expected]


def test_what_was_cast_is_of_use_for_what_is_made_of_it(
    device: torch.device, save: Any, open_session: Any
) -> None:
    weights = {"a": torch.randn(16, 9), "b": torch.randn(5, 9)}
    files = save(weights)

    def parameters(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Of both together, and of a part of one whose bits are looked at in another way."""
        joined = torch.cat([tensors["a"], tensors["b"]]).to(device, torch.bfloat16)
        fused = torch.zeros(21, 9, dtype=torch.bfloat16, device=device)
        fused.copy_(joined)
        cut = torch.zeros(2, 9, dtype=torch.bfloat16, device=device)
        cut.copy_(tensors["a"].view(torch.int32)[3:5].view(torch.float32))
        return [fused, cut]

    expected = parameters(weights)
    with open_session(all_wait=True) as session, session.armed():
        session.begin(files, device, torch.bfloat16)
        found = parameters(dict(session.iterate(files)))
        session.end()
    assert [bits(item) for item in found] == [bits(item) for item in expected]
    again = 2 * 9 * 4  # what was cut, for it had been given up
    assert session.report.bytes_read == header_bytes(files) + 21 * 9 * 4 + again


def test_wrong_guesses_are_given_up_by_and_by(
    device: torch.device, save: Any, open_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landing, "LATER_BYTES", 3 * 16 * 9 * 2)
    weights = {f"w{number}": torch.randn(16, 9) for number in range(12)}
    files = save(weights)
    with open_session(all_wait=True) as session, session.armed():
        session.begin(files, device, torch.bfloat16)
        gone = [weakref.ref(memory) for memory in session._copies.landing._memory.values()]
        found = {name: parameter_of(lazy, device) for name, lazy in session.iterate(files)}
        assert sum(memory() is None for memory in gone) >= 8
        session.end()
    assert session.report.landed == 0
    assert all(bits(found[name]) == bits(weight) for name, weight in weights.items())


def test_other_threads_get_no_memory_that_waits(save: Any, open_session: Any) -> None:
    weight, cpu = torch.randn(7), torch.device("cpu")
    files = save({"weight": weight})
    with open_session(all_wait=True) as session, session.armed(), ThreadPoolExecutor(1) as pool:
        session.begin(files, cpu, FLOAT)
        ((_, lazy),) = session.iterate(files)
        moved = lazy.to(cpu)
        memory = torch.empty_like(torch.empty(7, device="meta"), device=cpu)
        pool.submit(memory.copy_, moved).result()
        assert bits(pool.submit(lambda: memory * 1).result()) == bits(weight)


def test_memory_is_like_what_it_is_asked_to_be_like(save: Any, open_session: Any) -> None:
    class Own(torch.Tensor):
        pass

    cpu = torch.device("cpu")
    files = save({"weight": torch.randn(16, 9)})
    with open_session(all_wait=True) as session, session.armed():
        session.begin(files, cpu, FLOAT)
        ((_, lazy),) = session.iterate(files)
        half = lazy.to(cpu, torch.bfloat16)
        assert torch.empty_like(half, device=cpu).dtype == torch.bfloat16
        assert type(torch.empty_like(torch.zeros(16, 9).as_subclass(Own), device=cpu)) is Own
        assert torch.empty_like(torch.zeros(16, 9), device=None).shape == (16, 9)
        with torch.inference_mode():
            assert torch.empty_like(torch.zeros(16, 9), device=cpu).is_inference()


def test_all_is_handed_on_at_once(save: Any, open_session: Any) -> None:
    files = save({"weight": torch.randn(16, 9)})
    with open_session(all_wait=True) as session, session.armed():
        assert session.begin(files, torch.device("cpu"), FLOAT)
        until = time.monotonic() + 30
        while session._bytes_read() < os.path.getsize(files[0]) and time.monotonic() < until:
            time.sleep(0.001)
        assert session._bytes_read() == os.path.getsize(files[0])


def test_what_hinders_reading_leaves_the_load_to_the_engine(
    save: Any, open_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no readers")

    monkeypatch.setattr(delivery, "open_readers", fail)
    files = save({"weight": torch.randn(16, 9)})
    with open_session() as session, session.armed():
        with pytest.raises(PlanAborted, match="no readers"):
            session.begin(files, torch.device("cpu"), FLOAT)
        assert session.aborted is not None


def test_nothing_is_begun_without_room(
    save: Any, open_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landing, "free_memory", lambda device: landing.SPARE_BYTES + 500)
    weight = torch.randn(16, 9)
    files = save({"weight": weight})
    cpu = torch.device("cpu")
    with open_session(all_wait=True) as session, session.armed():
        session.begin(files, cpu, FLOAT)
        assert session.delivery.is_idle
        found = [parameter_of(lazy, cpu) for _, lazy in session.iterate(files)]
        session.end()
    assert session.report.landed == 0 and bits(found[0]) == bits(weight)


def test_what_is_never_asked_for_is_freed(save: Any, open_session: Any) -> None:
    files = save({"weight": torch.randn(16, 9)})
    session: LoadSession
    with open_session(all_wait=True) as session, session.armed():
        session.begin(files, torch.device("cpu"), FLOAT)
        (memory,) = session._copies.landing._memory.values()
        gone = weakref.ref(memory)
        del memory
    assert gone() is None


def test_who_keeps_lazy_tensors_keeps_no_memory(save: Any, open_session: Any) -> None:
    files = save({"weight": torch.randn(16, 9)})
    with open_session(all_wait=True) as session, session.armed():
        session.begin(files, torch.device("cpu"), FLOAT)
        ((_, lazy),) = session.iterate(files)
        gone = weakref.ref(lazy.source.landed)
    assert gone() is None and lazy.source.landed is None


def test_a_file_cut_short_meanwhile_is_an_error(save: Any, open_session: Any) -> None:
    (file,) = save({"weight": torch.randn(64, 9)})
    with (
        open_session(all_wait=True) as session,
        session.armed(),
        pytest.raises(CheckpointError, match="truncated while read"),
    ):
        session.open([file])
        with open(file, "r+b") as opened:
            opened.truncate(500)
        session._copies.landing.begin(session.checkpoints[0][0], torch.device("cpu"), FLOAT)
        session.flush()


@pytest.mark.parametrize("times", range(5))
def test_loads_that_share_readers_wait_for_their_own_bytes(
    device: torch.device, save: Any, times: int
) -> None:
    names = [f"w{number:02d}" for number in range(8)]
    files = save(*({name: torch.randn(1024, 1024) for name in names} for _ in range(2)))
    first_file, second_file = files
    settings = Settings(num_load_threads=2, readers="processes")
    with Pools(settings) as pools, ExitStack() as opened:
        first, second = (
            opened.enter_context(LoadSession(settings, LoadReport(), pools=pools, all_wait=True))
            for _ in range(2)
        )
        with first.armed():
            found = {}
            for name, lazy in first.iterate([first_file]):
                found[name] = torch.empty(lazy.shape, device=device)
                found[name].copy_(lazy)
            first.delivery.hand_on()
            assert second.begin([second_file], device, None)
            first.end()
        for name, expected in load_file(first_file).items():
            assert torch.equal(found[name].cpu(), expected)
        with second.armed():
            for name, lazy in second.guard(second.iterate([second_file])):
                found[name].copy_(lazy)
        for name, expected in load_file(second_file).items():
            assert torch.equal(found[name].cpu(), expected)
        assert second.report.landed == len(names)
