"""Models leave the device and come back as they were, and only what changed is copied."""

from __future__ import annotations

import gc
import hashlib
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weightlift
from weightlift.loading import host_blocks, sleep
from weightlift.loading.digests import CHUNK_BYTES, Digests, changed
from weightlift.loading.errors import WeightliftError
from weightlift.loading.host_blocks import BLOCK_BYTES, HostBlocks
from weightlift.loading.host_supply import PART_BYTES, HostSupply
from weightlift.loading.sleep import Sleeper
from weightlift.loading.storages import storages_of


class Model(torch.nn.Module):
    """Tied weights, views of one memory, other strides, buffers, an empty and a scalar one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Parameter:
            value = torch.randn(shape, generator=generator).to(device, dtype)
            return torch.nn.Parameter(value, requires_grad=False)

        self.large = make(3 * CHUNK_BYTES // 4, dtype=torch.float32)
        self.embedding = make(7, 5)
        self.head = self.embedding
        self.tied = torch.nn.Parameter(self.embedding.data, requires_grad=False)
        both = torch.randn(4, 6, generator=generator).to(device)
        self.first = torch.nn.Parameter(both[:2], requires_grad=False)
        self.rest = torch.nn.Parameter(both[1:, ::2], requires_grad=False)
        self.conv = torch.nn.Parameter(
            make(2, 3, 2, 2, 2).data.to(memory_format=torch.channels_last_3d), requires_grad=False
        )
        self.scale = make()
        self.empty = make(0)
        with torch.inference_mode():
            self.inferred = make(3, 2)
        self.register_buffer("odd", torch.arange(7, dtype=torch.uint8, device=device))
        self.register_buffer("step", torch.tensor(5, device=device), persistent=False)


def facts(model: torch.nn.Module) -> dict[str, tuple[object, ...]]:
    """Of each weight and buffer: what it is, how it lies, what it holds."""
    found: dict[str, tuple[object, ...]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    for name, tensor in named:
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        layout = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        found[name] = (
            id(tensor),
            type(tensor),
            *layout[:3],
            tensor.is_inference(),
            hashlib.sha256(content).hexdigest(),
        )
    return found


def ties(model: torch.nn.Module) -> set[frozenset[str]]:
    """The names that share memory."""
    by_memory: dict[int, set[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        by_memory.setdefault(tensor.untyped_storage().data_ptr(), set()).add(name)
    return {frozenset(names) for names in by_memory.values()}


@pytest.fixture
def model(device: torch.device) -> Model:
    return Model(device)


@pytest.fixture
def sleeper(device: torch.device) -> Sleeper:
    return Sleeper(device.type)


def places(model: torch.nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in model.parameters() if tensor.numel()}


def test_a_model_comes_back_as_it_was(model: Model, sleeper: Sleeper, device: torch.device) -> None:
    before, tied, random = facts(model), ties(model), torch.get_rng_state()
    was_at = places(model)
    nbytes = sum(storage.memory.numel() for storage in storages_of({"": model}, device.type))
    asleep = sleeper.sleep({"model": model})
    assert sleeper.is_asleep
    assert (asleep.nbytes, asleep.copied) == (nbytes, nbytes)
    assert {tensor.device.type for tensor in model.parameters() if tensor.numel()} == {"cpu"}
    assert not places(model) & was_at
    assert facts(model) == before
    assert sleeper.sleep({"model": model}).nbytes == 0, "it sleeps already"
    awake = sleeper.wake_up()
    assert not sleeper.is_asleep
    assert (awake.nbytes, awake.copied) == (nbytes, nbytes)
    assert {tensor.device.type for tensor in model.parameters()} == {device.type}
    assert (facts(model), ties(model)) == (before, tied)
    assert sleeper.wake_up().nbytes == 0, "it is awake already"
    assert torch.equal(torch.get_rng_state(), random)
    assert sleeper.release() > 0


def test_a_conjugated_view_stays_where_it_is(sleeper: Sleeper, device: torch.device) -> None:
    wave = torch.polar(torch.ones(3), torch.arange(3.0)).to(device)
    model = torch.nn.Linear(2, 2, device=device)
    model.register_buffer("wave", wave.conj())
    sleeper.sleep({"model": model})
    sleeper.wake_up()
    stayed = model.get_buffer("wave")
    assert stayed.is_conj() and torch.equal(stayed, wave.conj())


def test_digests_are_tried_again_when_the_device_is_full(
    model: Model, sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests_of, calls = Digests.of, []

    def full_at_first(self: Digests, memory: torch.Tensor) -> torch.Tensor:
        calls.append(memory)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("no memory on the device")
        return digests_of(self, memory)

    before = facts(model)
    monkeypatch.setattr(Digests, "of", full_at_first)
    sleeper.sleep({"model": model})
    sleeper.wake_up()
    assert facts(model) == before


@pytest.mark.gpu
def test_the_memory_of_the_device_is_free_meanwhile() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here; scripts/gpu runs this on one")
    model, sleeper = Model(torch.device("cuda")), Sleeper()
    before = torch.cuda.memory_allocated()
    asleep = sleeper.sleep({"model": model})
    assert all(tensor.is_pinned() for tensor in model.parameters() if tensor.numel())
    assert torch.cuda.memory_allocated() <= before - asleep.nbytes
    sleeper.wake_up()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    sleeper.release()


def test_only_what_changed_is_copied_again(model: Model, sleeper: Sleeper) -> None:
    def sleep_and_wake() -> int:
        before = facts(model)
        copied = sleeper.sleep({"model": model}).copied
        sleeper.wake_up()
        assert facts(model) == before
        return copied

    assert sleep_and_wake() > 3 * CHUNK_BYTES
    assert sleep_and_wake() == 0
    model.large.data[CHUNK_BYTES // 4 + 7] += 1  # which leaves no trace in torch's versions
    assert sleep_and_wake() == CHUNK_BYTES
    model.large.neg_()
    assert sleep_and_wake() == 3 * CHUNK_BYTES
    model.rest.data[0, 0] = 77
    assert sleep_and_wake() == model.rest.untyped_storage().nbytes()
    sleeper.release()


def test_what_is_written_to_a_sleeping_model_counts(model: Model, sleeper: Sleeper) -> None:
    value = model.large[0].item()
    sleeper.sleep({"model": model})
    model.large.data[0] = 123.0
    sleeper.wake_up()
    assert model.large[0].item() == 123.0
    model.large.data[0] = value  # as before the first sleep, of which the host's copy knows nothing
    assert sleeper.sleep({"model": model}).copied == CHUNK_BYTES
    assert model.large[0].item() == value
    model.scale.data = torch.tensor(7.0)
    sleeper.wake_up()
    assert model.scale.item() == 7.0, "what was given other memory keeps it"
    sleeper.release()


def test_other_models_get_other_memory(
    model: Model, sleeper: Sleeper, device: torch.device
) -> None:
    other = Model(device)
    sleeper.sleep({"model": model})
    sleeper.wake_up()
    before = [facts(model), facts(other)]
    both = sleeper.sleep({"model": model, "other": other})
    assert both.copied == both.nbytes > 6 * CHUNK_BYTES
    sleeper.wake_up()
    assert [facts(model), facts(other)] == before
    sleeper.release()


def test_without_host_memory_nothing_moves(
    model: Model, sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, was_at = facts(model), places(model)
    with monkeypatch.context() as patched:
        patched.setattr(sleep, "available_memory", lambda: 1000)
        with pytest.raises(WeightliftError, match=r"MB of host memory .* still on the device"):
            sleeper.sleep({"model": model})

    def fail(nbytes: int) -> torch.Tensor:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(host_blocks, "page_aligned", fail)
        with pytest.raises(OSError, match="Cannot allocate"):
            sleeper.sleep({"model": model})
    assert not sleeper.is_asleep
    assert (facts(model), places(model)) == (before, was_at)
    assert sleeper.sleep({"model": model}).copied > 0
    sleeper.wake_up()
    sleeper.release()


def test_without_device_memory_all_sleep_on(
    model: Model, sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = facts(model)
    sleeper.sleep({"model": model})
    was_at = places(model)

    def fail(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(Digests, "of", fail)
        with pytest.raises(WeightliftError, match="then wake up again"):
            sleeper.wake_up()
    assert sleeper.is_asleep
    assert (facts(model), places(model)) == (before, was_at)
    assert sleeper.release() == 0, "weights are in it"
    sleeper.wake_up()
    assert facts(model) == before
    sleeper.release()


def test_releasing_all_frees_what_is_kept(model: Model, sleeper: Sleeper) -> None:
    sleeper.sleep({"model": model})
    sleeper.wake_up()
    assert weightlift.release() >= 3 * CHUNK_BYTES
    assert sleeper.release() == 0
    assert sleeper.sleep({"model": model}).copied > 0, "it starts anew"
    sleeper.wake_up()
    sleeper.release()


@settings(max_examples=50, deadline=None)
@given(
    nbytes=st.integers(1, 2 * CHUNK_BYTES + 9),
    seed=st.integers(0, 1 << 30),
    data=st.data(),
)
def test_digests_tell_which_chunks_differ(nbytes: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
    digests = Digests()
    before = digests.of(memory)
    flips = data.draw(st.lists(st.integers(0, nbytes - 1), max_size=3, unique=True))
    for place in flips:
        memory[place] ^= data.draw(st.integers(1, 255))
    told = {
        start // CHUNK_BYTES
        for part in changed(before, digests.of(memory))
        for start in range(part.start, part.stop, CHUNK_BYTES)
    }
    assert told == {place // CHUNK_BYTES for place in flips}


def test_sign_flips_do_not_cancel() -> None:
    digests, memory = Digests(), torch.randn(4096).view(torch.uint8)
    before = digests.of(memory)
    memory.view(torch.float32).neg_()
    assert changed(before, digests.of(memory)) == [slice(0, CHUNK_BYTES)]


def test_blocks_hold_pieces_apart(device: torch.device) -> None:
    sizes = [1, 513, BLOCK_BYTES - 1024, 5, BLOCK_BYTES + 1, 512]
    blocks = HostBlocks(sizes, torch.empty(0, device=device).device, 2)
    pieces = list(blocks.pieces())
    assert [piece.numel() for piece in pieces] == sizes
    assert all(piece.data_ptr() % 512 == 0 for piece in pieces)
    spans = sorted((piece.data_ptr(), piece.data_ptr() + piece.numel()) for piece in pieces)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    assert sum(sizes) <= blocks.nbytes <= sum(sizes) + 512 * len(sizes)
    assert blocks.release() == blocks.nbytes


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Addresses of blocks that are page-locked for a device, of which none is needed."""
    found: set[int] = set()

    def register(block: torch.Tensor) -> bool:
        found.add(block.data_ptr())
        return True

    monkeypatch.setattr(host_blocks, "register", register)
    monkeypatch.setattr(host_blocks, "unregister", lambda block: found.remove(block.data_ptr()))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return found


def test_no_block_stays_locked_where_no_more_threads_can_be_started(
    registered: set[int], one_thread_more: None
) -> None:
    blocks = HostBlocks([BLOCK_BYTES] * 4, torch.device("cuda", 0), 4)
    with pytest.raises(OSError, match="no thread can be started"):
        next(blocks.pieces())
    assert not registered


def test_no_piece_of_a_supply_stays_locked_where_no_more_threads_can_be_started(
    registered: set[int], one_thread_more: None
) -> None:
    with HostSupply(torch.device("cuda", 0), 3, most=2) as supply:
        with pytest.raises(OSError, match="no thread can be started"):
            supply.take(PART_BYTES)
        until = time.monotonic() + 20
        while not registered:  # by the one thread, to which it was given all the same
            assert time.monotonic() < until
            time.sleep(0.001)
    assert not registered


def test_blocks_that_are_dropped_are_unregistered(registered: set[int]) -> None:
    blocks = HostBlocks([1000, BLOCK_BYTES], torch.device("cuda", 0), 2)
    pieces = list(blocks.pieces())
    assert len(registered) == 2
    del blocks
    gc.collect()
    assert not registered, "or the device could not use these addresses any more"
    pieces[0].fill_(1)  # whoever still has a piece keeps it
