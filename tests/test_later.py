"""Copies that a loader makes of what is still being read, against the same made at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from weightlift.loading import later

ROWS, COLUMNS, PLACES = 6, 4, 3
Weights = Iterator[tuple[str, torch.Tensor]]
Made = list[torch.Tensor]


def made(device: torch.device, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """What a loader fills, and what it copies that to."""
    new = torch.empty(ROWS, COLUMNS, device=device)
    new.copy_(next(weights)[1])
    return new, torch.zeros(ROWS, COLUMNS, device=device)


def is_filled(kept: torch.Tensor) -> bool:
    """Whether anything was copied to it, asked without the guard, which would see to that."""
    with torch._C.DisableTorchFunction():
        return bool(kept.any())


def _written_over(new: torch.Tensor, kept: torch.Tensor, weights: Weights) -> Made:
    kept.copy_(new)
    new.copy_(next(weights)[1])
    return [new, kept]


def _copied_to_twice(new: torch.Tensor, kept: torch.Tensor, weights: Weights) -> Made:
    kept.copy_(new)
    kept[:2].copy_(next(weights)[1][:2])
    return [kept]


def _let_go_of(new: torch.Tensor, kept: torch.Tensor, weights: Weights) -> Made:
    kept.copy_(new)
    shape, device = new.shape, new.device
    del new
    return [kept, torch.empty(shape, device=device).copy_(next(weights)[1])]


def _worked_with(new: torch.Tensor, kept: torch.Tensor, weights: Weights) -> Made:
    kept.copy_(new)
    kept.mul_(2)
    return [kept, kept.sum(), new.sum()]


def _on_to_a_third(new: torch.Tensor, kept: torch.Tensor, weights: Weights) -> Made:
    third = torch.empty_like(kept)
    kept.copy_(new)
    third.copy_(kept)
    new.zero_()
    return [kept, third]


def _into_a_part(new: torch.Tensor, kept: torch.Tensor, weights: Weights) -> Made:
    kept[1:3].copy_(new[3:5])
    kept.t()[:, 4:].copy_(new.t()[:, :2])
    return [kept]


def _within_itself(new: torch.Tensor, kept: torch.Tensor, weights: Weights) -> Made:
    new[:2].copy_(new[2:4])
    new[4:].copy_(new[:2])
    return [new]


def _broadcast(new: torch.Tensor, kept: torch.Tensor, weights: Weights) -> Made:
    kept.copy_(new[1])
    return [kept]


def _cast(new: torch.Tensor, kept: torch.Tensor, weights: Weights) -> Made:
    half = torch.empty(ROWS, COLUMNS, dtype=torch.float16, device=new.device)
    half.copy_(new)
    kept.copy_(half)
    return [half, kept]


def _of_a_parameter(new: torch.Tensor, kept: torch.Tensor, weights: Weights) -> Made:
    parameter = torch.nn.Parameter(kept)
    parameter.data.copy_(torch.nn.Parameter(new))
    with torch.no_grad():
        parameter[:1].copy_(new[1:2])
    return [parameter.detach()]


def _with_gradients(new: torch.Tensor, kept: torch.Tensor, weights: Weights) -> Made:
    source = torch.nn.Parameter(new)
    kept.copy_(source)
    torch.autograd.backward(kept.sum())
    assert source.grad is not None
    return [kept.detach(), source.grad]


LOADERS: dict[str, Callable[[torch.Tensor, torch.Tensor, Weights], Made]] = {
    loader.__name__.strip("_").replace("_", " "): loader
    for loader in (
        *(_written_over, _copied_to_twice, _let_go_of, _worked_with, _on_to_a_third, _into_a_part),
        *(_within_itself, _broadcast, _cast, _of_a_parameter, _with_gradients),
    )
}


def two_weights() -> dict[str, torch.Tensor]:
    return {name: torch.randn(ROWS, COLUMNS) for name in ("a", "b")}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS.keys())
def test_a_loader_gets_the_same_result(
    loader: Any, device: torch.device, save: Any, open_session: Any
) -> None:
    files = save(two_weights())
    stock = iter(sorted(load_file(files[0]).items()))
    expected = [item.clone() for item in loader(*made(device, stock), stock)]
    with open_session() as session:
        with session.armed():
            weights = session.iterate(files)
            actual = loader(*made(device, weights), weights)
            weights.close()
        session.end()
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("is_taken", [False, True], ids=["a view", "a parameter"])
def test_a_copy_of_what_is_read_waits_until_it_is_looked_at(
    is_taken: bool, device: torch.device, save: Any, open_session: Any
) -> None:
    files = save(two_weights())
    with open_session() as session, session.armed():
        weights = session.iterate(files)
        new, kept = made(device, weights)
        (torch.nn.Parameter(kept).data if is_taken else kept[:]).copy_(new)
        assert not is_filled(kept)
        assert torch.equal(kept, load_file(files[0])["a"].to(device)), "who looks finds it there"
        weights.close()


def test_it_does_not_wait_where_memory_is_short(
    device: torch.device, save: Any, open_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(later, "free_memory", lambda device: later.LATER_BYTES)
    files = save(two_weights())
    with open_session() as session, session.armed():
        weights = session.iterate(files)
        new, kept = made(device, weights)
        kept.copy_(new)
        assert is_filled(kept)
        weights.close()


def test_what_waits_is_bounded(
    save: Any, open_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(later, "LATER_BYTES", 3 * ROWS * COLUMNS * 4)
    files = save({f"w{number}": torch.ones(ROWS, COLUMNS) for number in range(9)})
    kept, held = torch.zeros(9, ROWS, COLUMNS), []
    with open_session() as session, session.armed():
        for number, (_, weight) in enumerate(session.guard(session.iterate(files))):
            new = torch.empty(ROWS, COLUMNS)
            new.copy_(weight)
            kept[number].copy_(new)
            held.append(weakref.ref(new.untyped_storage()))
            del new
            gc.collect()
            assert sum(item() is not None for item in held) <= 3
    assert kept.all()


Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["read", "copy", "part", "write", "look", "new"]),
        st.integers(0, PLACES - 1),
        st.integers(0, PLACES - 1),
    ),
    max_size=12,
)


def carried_out(steps: list[Step], weights: Weights) -> Made:
    """Tensors after these steps, and what was seen of them on the way."""
    places = [torch.zeros(ROWS, COLUMNS) for _ in range(PLACES)]
    seen = []
    for step, one, other in steps:
        if step == "read":
            places[one].copy_(next(weights)[1])
        elif step == "copy" and one != other:
            places[one].copy_(places[other])
        elif step == "part":
            places[one][:2].copy_(places[other][4:])
        elif step == "write":
            places[one].add_(1)
        elif step == "look":
            seen.append(places[one].sum())
        elif step == "new":
            places[one] = torch.zeros(ROWS, COLUMNS)
    return [*places, *seen]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_whatever_is_done_in_whatever_order(
    save: Any, open_session: Any, steps: list[Step]
) -> None:
    files = save(
        {f"w{number:02d}": torch.full((ROWS, COLUMNS), number + 1.0) for number in range(12)}
    )
    expected = carried_out(steps, iter(sorted(load_file(files[0]).items())))
    with open_session() as session:
        with session.armed():
            weights = session.iterate(files)
            actual = carried_out(steps, weights)
            weights.close()
        session.end()
    assert all(map(torch.equal, actual, expected))
