"""Page-locked memory for models that stay on the host: what moves there, and what is made ahead."""

from __future__ import annotations

import gc
import mmap
from collections import Counter
from concurrent.futures import Future

import pytest
import torch

from weightlift.loading import host_blocks, host_supply
from weightlift.loading.host_blocks import make_block
from weightlift.loading.host_parameters import move_parameters
from weightlift.loading.host_supply import HostSupply, Supplied
from weightlift.loading.pages import are_untouched
from weightlift.loading.staging import page_aligned

LARGE = 40 << 20


def new_memory() -> torch.Tensor:
    """Memory as an allocator gives it: its note before the first byte, and pages that nobody touched."""
    memory = mmap.mmap(-1, LARGE + 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[0] = 1
    return torch.frombuffer(memory, dtype=torch.uint8, offset=64, count=LARGE)


class Encoder(torch.nn.Module):
    """A model on the host with what parameters can be like."""

    def __init__(self) -> None:
        super().__init__()
        self.written = torch.nn.Parameter(torch.randn(300, 7))
        self.low = torch.nn.Parameter(torch.randn(11).bfloat16(), requires_grad=False)
        self.tied = self.low
        self.scalar = torch.nn.Parameter(torch.tensor(3.0))
        self.nothing = torch.nn.Parameter(torch.empty(0, 5))
        self.gaps = torch.nn.Parameter(torch.randn(4, 6).t())
        both = torch.randn(8)
        self.first = torch.nn.Parameter(both[:4])
        self.second = torch.nn.Parameter(both[4:])
        self.seen = torch.nn.Parameter(torch.randn(6))
        self.register_buffer("view", self.seen.data[2:])
        self.shared = torch.nn.Parameter(torch.randn(3).share_memory_())  # type: ignore[no-untyped-call]
        self.new = torch.nn.Parameter(new_memory(), requires_grad=False)
        self.register_buffer("buffer", torch.randn(5))


STAY = {"nothing", "gaps", "first", "second", "seen", "shared"}


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: item.detach().clone() for name, item in model.state_dict().items()}


def test_parameters_move_and_stay_what_they_are(device: torch.device) -> None:
    model = Encoder()
    model.new.data.fill_(7)
    before, objects = values(model), dict(model.named_parameters())
    places = {name: item.data_ptr() for name, item in objects.items()}
    moved = move_parameters(model, torch.empty(0, device=device).device, 2)
    assert moved >= LARGE
    now = dict(model.named_parameters())
    assert all(now[name] is item for name, item in objects.items())
    assert {name for name in now if now[name].data_ptr() == places[name]} == STAY
    after = values(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.tied is model.low and not model.low.requires_grad
    locked = {name for name, item in now.items() if item.is_pinned()}
    assert locked == (now.keys() - STAY if device.type == "cuda" else set())


def test_what_was_never_written_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model, copied = Encoder(), list[int]()
    copy = torch.Tensor.copy_

    def counted(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        copied.append(self.nbytes)
        return copy(self, other)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    move_parameters(model, torch.device("cpu"), 1)
    assert len(copied) == 5 and max(copied) == 300 * 7 * 4, "of the new one, less than two pages"
    other = Encoder()
    other.new.data[LARGE // 2] = 5
    move_parameters(other, torch.device("cpu"), 1)
    assert max(copied) == LARGE and other.new[LARGE // 2] == 5


@pytest.mark.parametrize("nbytes", [1, 4096, 5000, (2 << 20) - 1, 2 << 20])
def test_memory_starts_on_a_page(nbytes: int) -> None:
    memory = page_aligned(nbytes)
    assert memory.numel() == nbytes and memory.data_ptr() % 4096 == 0
    memory.fill_(1)


def test_one_touched_page_tells() -> None:
    memory = make_block(LARGE, torch.device("cpu"))
    assert are_untouched(memory.data_ptr(), LARGE)
    memory[LARGE - 1] = 1
    assert not are_untouched(memory.data_ptr(), LARGE)


def test_it_is_unlocked_when_the_model_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = watch_locks(monkeypatch)
    model = Encoder()
    move_parameters(model, torch.device("cuda", 0), 2)
    kept, value = model.written, model.written.detach().clone()
    assert len(locked) == 1
    del model
    gc.collect()
    assert not locked
    assert torch.equal(kept, value)  # whoever has a parameter keeps its memory


@pytest.mark.parametrize("what", ["memory", "lock"])
def test_without_memory_a_model_is_left_in_working_order(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = watch_locks(monkeypatch)
    monkeypatch.setattr(host_blocks, "BLOCK_BYTES", 4096)
    lock, make = vars(host_blocks)["register"], page_aligned

    def only_small(nbytes: int) -> torch.Tensor:
        if nbytes > LARGE:
            raise OSError("full")
        return make(nbytes)

    if what == "memory":
        monkeypatch.setattr(host_blocks, "page_aligned", only_small)
    else:
        monkeypatch.setattr(
            host_blocks, "register", lambda block: len(block) <= LARGE and lock(block)
        )
    model = Encoder()
    model.last = torch.nn.Parameter(torch.empty(LARGE + 1, dtype=torch.uint8), requires_grad=False)
    model.beyond = torch.nn.Parameter(torch.randn(1500))
    before = values(model)
    with pytest.raises(OSError, match="full|cannot be page-locked"):
        move_parameters(model, torch.device("cuda", 0), 4)
    after = values(model)
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - {"new", "last"})
    places = {item.untyped_storage().data_ptr() for item in model.parameters()}
    assert locked and locked <= places, "what no parameter got is not page-locked"
    del model
    gc.collect()
    assert not locked


def watch_locks(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The addresses that are page-locked, as if there were a device."""
    locked: set[int] = set()

    def register(block: torch.Tensor) -> bool:
        locked.add(block.data_ptr())
        return True

    monkeypatch.setattr(host_blocks, "register", register)
    monkeypatch.setattr(host_blocks, "unregister", lambda block: locked.remove(block.data_ptr()))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return locked


def test_a_supply_makes_ahead_what_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: Counter[int] = Counter()
    make = HostSupply._make

    def counted(self: HostSupply, nbytes: int) -> Future[torch.Tensor]:
        begun[nbytes] += 1
        return make(self, nbytes)

    locked = watch_locks(monkeypatch)
    monkeypatch.setattr(HostSupply, "_make", counted)
    with HostSupply(torch.device("cuda", 0), 3, most=5) as supply:
        pieces = [supply.take(1000), supply.take(5000), supply.take(5000)]
        assert begun == {1000: 1, 5000: 2 + 1}, "as many ahead as were asked for again"
        pieces += [supply.take(5000) for _ in range(3)]
        assert begun == {1000: 1, 5000: 5}, "no more than there can be"
        pieces += [supply.take(7000), supply.take(7000)]
        assert begun[7000] == 2 + 1
        monkeypatch.setattr(host_supply, "AHEAD_BYTES", 10_000)
        pieces += [supply.take(9000) for _ in range(3)]
        assert begun[9000] == 3 + 1, "no more bytes than that ahead"
    assert locked == {piece.data_ptr() for piece in pieces}, "what nobody took is free"
    assert [piece.numel() for piece in pieces] == [1000] + [5000] * 5 + [7000] * 2 + [9000] * 3
    supply.release()
    assert not locked
    pieces[0].fill_(1)  # whoever still has a piece keeps it


def test_page_locked_tensors_come_from_the_supply(device: torch.device) -> None:
    where = torch.empty(0, device=device).device
    with HostSupply(where, 2, most=4) as supply, Supplied(supply):
        flat = torch.empty(1000, dtype=torch.bfloat16, pin_memory=True)
        turned = torch.empty_strided(size=(3, 4), stride=(1, 3), dtype=torch.int8, pin_memory=True)
        other = torch.empty(10)
    assert flat.untyped_storage().nbytes() == 2000 and flat.dtype == torch.bfloat16
    assert turned.stride() == (1, 3) and turned.untyped_storage().nbytes() == 12
    assert other.dtype == torch.get_default_dtype()
    assert flat.is_pinned() == turned.is_pinned() == (device.type == "cuda")
    supply.release()
    assert not flat.is_pinned()


def test_what_a_supply_has_not_torch_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def fail(nbytes: int) -> torch.Tensor:
        asked.append(nbytes)
        raise OSError("full")

    monkeypatch.setattr(host_supply, "page_aligned", fail)
    with HostSupply(torch.device("cpu"), 1, most=2) as supply, Supplied(supply):
        for _ in range(2):
            if torch.cuda.is_available():
                assert torch.empty(10, pin_memory=True).is_pinned()
            else:
                with pytest.raises(RuntimeError, match="pin_memory"):
                    torch.empty(10, pin_memory=True)
    assert asked == [40] and caplog.text.count("no page-locked memory of 40 B (full)") == 1
