"""The pinned ring: who takes a slot gets one, also where pinning failed or two loads share it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from weightlift.loading import staging
from weightlift.loading.staging import PinnedRing


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The slots that are made; pageable here, for pinning needs a CUDA driver."""
    slots: list[torch.Tensor] = []

    def pinned(nbytes: int) -> torch.Tensor:
        slots.append(torch.empty(nbytes, dtype=torch.uint8))
        return slots[-1]

    monkeypatch.setattr(staging, "pinned", pinned)
    return slots


def test_slots_are_kept_and_handed_around(made: list[torch.Tensor]) -> None:
    ring = PinnedRing()
    for _ in range(3):
        ring.reserve(2)
        taken = [ring.take(64), ring.take(64)]
        for slot in taken:
            ring.give(slot)
        ring.reserve(-2)
    assert len(made) == 2


def test_two_loads_at_once_each_get_what_they_reserved(made: list[torch.Tensor]) -> None:
    ring = PinnedRing()
    ring.reserve(2)
    first = [ring.take(64), ring.take(64)]
    ring.reserve(2)
    second = [ring.take(64), ring.take(64)]
    assert len({slot.data_ptr() for slot in first + second}) == 4 == len(made)


def test_what_was_filled_ahead_is_taken(made: list[torch.Tensor]) -> None:
    ring = PinnedRing()
    ring.fill(3, 64)
    ring.reserve(3)
    for _ in range(3):
        ring.take(64)
    assert len(made) == 3


def test_a_pin_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even by somebody who was waiting for the one that failed."""
    entered, fail = threading.Event(), threading.Event()
    calls = []

    def pinned(nbytes: int) -> torch.Tensor:
        calls.append(nbytes)
        if len(calls) == 1:
            entered.set()
            fail.wait()
            raise OSError("no memory")
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(staging, "pinned", pinned)
    ring = PinnedRing()
    ring.reserve(1)
    with ThreadPoolExecutor(2) as pool:
        filling = pool.submit(ring.fill, 1, 64)
        entered.wait()
        taking = pool.submit(ring.take, 64)
        fail.set()
        with pytest.raises(OSError, match="no memory"):
            filling.result()
        assert taking.result().numel() == 64
