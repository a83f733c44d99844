"""What loaders do with weights, against the same done with the real tensors."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from weightlift.loading import placement
from weightlift.loading.errors import CheckpointError, PlanAborted
from weightlift.loading.lazy import LazyTensor
from weightlift.loading.leftovers import find_lazy
from weightlift.loading.reader import ReaderPool
from weightlift.loading.session import LoadSession, active_session

Loader = Callable[[torch.Tensor, torch.Tensor], object]


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.cpu().contiguous().view(torch.uint8), right.cpu().contiguous().view(torch.uint8)
    )


def _setitem(target: torch.Tensor, key: Any, weight: torch.Tensor) -> torch.Tensor:
    target[key] = weight
    return target


# Each copies from a [48, 40] weight into a [96, 80] target. The comment says who does so.
COPIES: dict[str, Loader] = {
    "whole": lambda t, w: t[:48, :40].copy_(w),
    "merged column": lambda t, w: t.narrow(0, 48, 24).narrow(1, 0, 40).copy_(w.narrow(0, 24, 24)),
    "row parallel": lambda t, w: t[:48, 40:60].copy_(w.narrow(1, 20, 20)),
    "transposed": lambda t, w: t[:40, :48].copy_(w.t()),
    "setitem": lambda t, w: _setitem(t, (slice(0, 48), slice(0, 40)), w),
    "setitem broadcast": lambda t, w: _setitem(t, slice(0, 4), w[0].repeat(2)),
    "select": lambda t, w: t[3, :40].copy_(w[5]),
    "chunk": lambda t, w: t[:24, :40].copy_(w.chunk(2)[1]),
    "split": lambda t, w: t[:16, :40].copy_(torch.split(w, [16, 32])[0]),
    "unbind": lambda t, w: t[0, :40].copy_(w.unbind()[7]),
    "view": lambda t, w: t[:40, :48].copy_(w.view(40, 48)),
    "reshape to 3-D": lambda t, w: t[:48, :40].view(4, 12, 40).copy_(w.reshape(4, 12, 40)),
    "permute": lambda t, w: t[:48, :40].copy_(w.view(4, 12, 40).permute(1, 0, 2).reshape(48, 40)),
    "expand": lambda t, w: t[:48, :40].copy_(w[0:1].expand(48, 40)),
    "broadcast": lambda t, w: t[:48, :40].copy_(w[2]),
    "to another dtype": lambda t, w: t[:48, :40].copy_(w.to(torch.float64)),
    "contiguous": lambda t, w: t[:40, :48].copy_(w.t().contiguous()),
    "cat": lambda t, w: t[:96, :40].copy_(torch.cat([w, w])),
    "arithmetic": lambda t, w: t[:48, :40].copy_(w * 2 + 1),
    "item": lambda t, w: t[:1, :1].fill_(w[0, 0].item()),
    "write to the source": lambda t, w: (w[:3].zero_(), t[:48, :40].copy_(w)),
    "add to the source": lambda t, w: (w.__iadd__(1), t[:48, :40].copy_(w)),
    "to a device": lambda t, w: t[:48, :40].copy_(w.to(t.device)),
    "detach": lambda t, w: t[:48, :40].copy_(w.data.detach()),
    "empty": lambda t, w: t[:0, :40].copy_(w[:0]),
    "same place twice": lambda t, w: (t[:48, :40].copy_(w), t[:24, :40].copy_(w[24:])),
    "pad, then fill": lambda t, w: (t.fill_(7), t[:48, :40].copy_(w), t[48:].zero_()),
    "fill, then overwrite": lambda t, w: (t[:48, :40].copy_(w), t[:2].zero_()),
    "read back": lambda t, w: (t[:48, :40].copy_(w), t[48:, :40].copy_(t[:48, :40] * 3)),
    "composed": lambda t, w: (t[:48, :40].copy_(w), t.copy_(-torch.exp(t.float()))),
    "copy of a copy": lambda t, w: (t[:48, :40].copy_(w), t[48:, 40:].copy_(t[:48, :40])),
    "list key": lambda t, w: _setitem(t, ([0, 2], slice(0, 40)), w[:2].to(t)),
    "index key": lambda t, w: _setitem(t, (torch.tensor([4, 1]), slice(0, 40)), w[:2].to(t)),
    "mask key": lambda t, w: _setitem(t, t == 0, w[0, 0]),
    "True as a key": lambda t, w: _setitem(t, (True, slice(0, 48), slice(0, 40)), w.to(t)),
    "leading ones": lambda t, w: _setitem(t, (slice(0, 48), slice(0, 40)), w[None, None]),
    "fancy read of the source": lambda t, w: t[:2, :40].copy_(w[[3, 1]]),
    "mask read of the source": lambda t, w: t[:48, 0].copy_(w[:, 0][[True] * 48]),
    "fancy read back": lambda t, w: (t[:48, :40].copy_(w), t[48:50].copy_(t[[1, 2]])),
    "fancy overwrite": lambda t, w: (
        t[:48, :40].copy_(w),
        _setitem(t, (torch.tensor([0, 2]), slice(0, 40)), w[5:7].to(t)),
    ),
    "add to a target": lambda t, w: (t[:48, :40].copy_(w), t[:48, :40].add_(w.to(t.device))),
    "select by where": lambda t, w: (
        t[:48, :40].copy_(w),
        t[48:, :40].copy_(torch.where(w.to(t) > 0, t[:48, :40], w.to(t))),
    ),
    "positional copy": lambda t, w: (
        w.to("cpu", torch.float32, False, True).zero_(),
        t[:48, :40].copy_(w),
    ),
    "float aliases": lambda t, w: (w.float().mul_(2), t[:48, :40].copy_(w)),
    "ravel aliases": lambda t, w: (w.ravel()[3:9].zero_(), t[:48, :40].copy_(w)),
    "xor in place": lambda t, w: (
        w.view(torch.int32).__ixor__(1),
        t[:48, :40].copy_(w),
    ),
    "view of what was written": lambda t, w: (
        w[:1].zero_(),
        t[:1, :20].copy_(w[1:2, 3:13].view(torch.int16)),
    ),
    "one element in a column": lambda t, w: t[:1, :1].t().copy_(w[:1, :1]),
    "cast": lambda t, w: t[:48, :40].copy_(w.to(torch.bfloat16)),
    "cast twice": lambda t, w: t[:48, :40].copy_(w.half().to(torch.bfloat16)),
    "a view of a cast": lambda t, w: t[:20, :40].copy_(w.half()[20:40]),
    "the dtype of a cast": lambda t, w: t[:48, :40].copy_(
        w.half() if w.half().element_size() == 2 else w
    ),
    "joined": lambda t, w: t[:, :40].copy_(torch.cat([w, w])),
    "another dtype of what was joined": lambda t, w: t[:, :40].copy_(
        torch.cat([w, w]).view(torch.int32)
    ),
    "bytes of what was joined": lambda t, w: t[:2].copy_(
        torch.cat([w[:1], w[:1]]).view(torch.uint8)[:, :80]
    ),
    "joined with nothing": lambda t, w: t[:48, :40].copy_(torch.cat([w[:0, 0], w])),
    "cast with holes": lambda t, w: (
        t[:24].view(-1)[:960].copy_(w[:, ::2].half().as_strided((960,), (1,)))
    ),
    "joined sideways": lambda t, w: t[:48].copy_(torch.cat([w, w], dim=-1)),
    "joined and cast": lambda t, w: t[:, :40].copy_(torch.cat((w, w)).to(t.device, torch.float16)),
    "cast and joined": lambda t, w: t[:, :40].copy_(torch.cat([w.half(), w.half()]).bfloat16()),
    "views joined": lambda t, w: t[:40, :40].copy_(torch.cat([w[:10], w.t()[:30, :40]])),
    "part of what was joined": lambda t, w: t[:24, :40].copy_(torch.cat([w, w])[30:54]),
    "joined and written to": lambda t, w: t[:, :40].copy_(torch.cat([w, w]).mul_(2)),
    "joined with a real one": lambda t, w: t[:, :40].copy_(torch.cat([w, torch.ones(48, 40)])),
    "joined twice": lambda t, w: t[:, :40].copy_(torch.cat([torch.cat([w[:8], w]), w[8:]])),
    "moved axes": lambda t, w: t[:40, :48].copy_(w.moveaxis(0, 1)),
    "one column": lambda t, w: t[:48, 0].copy_(w[:, 3]),
}


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loader", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("tiny_windows", [False, True], ids=["windows", "tiny windows"])
def test_a_loader_gets_the_same_result(
    loader: Loader,
    target_dtype: torch.dtype,
    tiny_windows: bool,
    device: torch.device,
    save: Any,
    open_session: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tiny_windows:  # every split there is: within rows, between rows, layouts that cannot be cut
        monkeypatch.setattr(placement, "HOST_WINDOW_BYTES", 256)
        monkeypatch.setattr(placement, "CUDA_WINDOW_BYTES", 256)
    weight = torch.randn(48, 40)
    expected = torch.zeros(96, 80, dtype=target_dtype, device=device)
    actual = expected.clone()
    loader(expected, weight.clone())
    with open_session() as session, session.armed():
        for _, lazy in session.guard(session.iterate(save({"weight": weight}))):
            assert type(lazy) is LazyTensor
            loader(actual, lazy)
    assert _same(actual, expected)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float8_e4m3fn],
    ids=str,
)
def test_every_dtype_arrives(
    dtype: torch.dtype, device: torch.device, save: Any, open_session: Any
) -> None:
    weight = torch.randint(0, 2, (33, 7)).to(dtype)
    target = torch.zeros(33, 7, dtype=dtype, device=device)
    with open_session() as session:
        for _, lazy in session.guard(session.iterate(save({"weight": weight, "x": torch.ones(1)}))):
            if lazy.dim() == 2:
                target.copy_(lazy)
    assert _same(target, weight)


def test_a_dtype_view_of_a_lazy_tensor(save: Any, open_session: Any) -> None:
    weight = torch.randn(6, 8)
    target = torch.zeros(6, 32, dtype=torch.uint8)
    with open_session() as session:
        for _, lazy in session.guard(session.iterate(save({"weight": weight}))):
            target.copy_(lazy.view(torch.uint8))
    assert torch.equal(target, weight.view(torch.uint8))


def test_a_lazy_tensor_looks_like_the_stock_one(save: Any, open_session: Any) -> None:
    weight = torch.randn(4, 6, dtype=torch.bfloat16)
    with open_session() as session:
        ((name, lazy),) = session.iterate(save({"weight": weight}))
        assert name == "weight"
        assert (lazy.shape, lazy.dtype, lazy.device) == (weight.shape, weight.dtype, weight.device)
        assert lazy.stride() == weight.stride() and lazy.numel() == 24 and len(lazy) == 4
        assert lazy.is_cpu and not lazy.is_cuda and not lazy.is_meta
        assert isinstance(lazy, torch.Tensor) and "weight" in repr(lazy)
        assert session.report.bytes_needed == 0


def test_the_end_is_told_after_the_last_byte(save: Any, open_session: Any) -> None:
    weights = {f"w{number}": torch.randn(64, 64) for number in range(20)}
    targets = {name: torch.zeros(64, 64) for name in weights}
    with open_session() as session:
        for name, lazy in session.guard(session.iterate(save(weights))):
            targets[name].copy_(lazy)
        # What models do after their loop (`post_load_weights`) sees loaded parameters.
        assert all(torch.equal(targets[name], weights[name]) for name in weights)


def test_a_loader_that_stops_early_has_what_it_took_once_the_end_is_told(
    save: Any, open_session: Any
) -> None:
    weights = {"a": torch.rand(64, 32), "b": torch.rand(64, 32), "c": torch.rand(64, 32)}
    targets = {name: torch.zeros(64, 32) for name in weights}
    with open_session() as session, session.armed():
        stream = session.guard(session.iterate(save(weights)))
        (first, early), (second, late) = next(stream), next(stream)
        targets[first].copy_(early)
        session.end()
        assert session.delivery.is_idle
        targets[second].copy_(late)  # as engines do after their loaders returned
        assert session.delivery.is_idle
        session.end()
    assert torch.equal(targets["a"], weights["a"]) and torch.equal(targets["b"], weights["b"])
    assert not targets["c"].any()


@pytest.mark.parametrize("collect", [list, sorted, dict], ids=lambda collect: collect.__name__)
def test_collecting_consumers_get_their_data(
    collect: Callable[[Iterator[Any]], Any], save: Any, open_session: Any
) -> None:
    weights = {f"w{number}": torch.randn(512, 512) for number in range(40)}
    targets = {name: torch.zeros(512, 512) for name in weights}
    with open_session(staging_mib=16) as session:  # 40 MiB of weights
        collected = collect(session.guard(session.iterate(save(weights))))
        for name, lazy in collected.items() if isinstance(collected, dict) else collected:
            targets[name].copy_(lazy)
            assert torch.equal(targets[name], weights[name])


def test_thread_pools_record_into_one_plan(save: Any, open_session: Any) -> None:
    weights = {f"w{number:03d}": torch.randn(32, 32) for number in range(200)}
    targets = {name: torch.zeros(32, 32) for name in weights}
    with open_session() as session, session.armed(), ThreadPoolExecutor(16) as pool:
        jobs = [
            pool.submit(targets[name].copy_, lazy)
            for name, lazy in session.guard(session.iterate(save(weights)))
        ]
        for job in jobs:
            job.result()
        session.flush()
    assert all(torch.equal(targets[name], weights[name]) for name in weights)
    assert session.report.planned == 200


def test_copies_into_one_place_keep_their_order(save: Any, open_session: Any) -> None:
    weights = {f"w{number:03d}": torch.full((64, 64), float(number)) for number in range(50)}
    target = torch.zeros(64, 64)
    with open_session() as session:
        for _, lazy in session.guard(session.iterate(save(weights))):
            target.copy_(lazy)
    assert torch.equal(target, weights["w049"])


def test_filling_the_empty_rest_of_a_parameter_does_not_end_planning(
    save: Any, open_session: Any
) -> None:
    files = save({"embedding": torch.randn(8, 4)})
    target = torch.zeros(8, 4)
    with open_session() as session, session.armed():
        for _, weight in session.iterate(files):
            target.copy_(weight)
            target[8:].fill_(0)  # what is padded, as vocabulary embeddings do
            assert not session.delivery.is_idle
            target[7:].fill_(0)
            assert session.delivery.is_idle, "what is pending is in place before it is written to"
    assert target[:7].count_nonzero() == 28 and not target[7:].any()


def test_only_wanted_bytes_are_read(save: Any, open_session: Any) -> None:
    (path,) = save({f"w{number}": torch.randn(1024, 256) for number in range(8)})
    target = torch.zeros(512, 256)
    with open_session() as session:
        for name, lazy in session.guard(session.iterate([path])):
            if name == "w3":
                target.copy_(lazy.narrow(0, 512, 512))
    header = 8 + int.from_bytes(Path(path).read_bytes()[:8], "little")
    assert session.report.bytes_needed == 512 * 256 * 4
    assert session.report.bytes_read == 512 * 256 * 4 + header


def test_neighbours_share_one_read(
    save: Any, open_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {f"w{number:03d}": torch.randn(8, 8) for number in range(100)}
    targets = {name: torch.zeros(8, 8) for name in weights}
    windows: list[int] = []
    offer = ReaderPool.offer

    def count(self: ReaderPool, window: Any) -> bool:
        windows.append(len(window.pieces))
        return offer(self, window)

    monkeypatch.setattr(ReaderPool, "offer", count)
    with open_session() as session:
        for name, lazy in session.guard(session.iterate(save(weights))):
            targets[name].copy_(lazy)
    assert windows == [100]


def test_only_the_arming_thread_sees_the_session(open_session: Any) -> None:
    with open_session() as session, ThreadPoolExecutor(1) as pool:
        assert active_session() is None
        with session.armed():
            assert active_session() is session
            assert pool.submit(active_session).result() is None
        assert active_session() is None


ESCAPES: dict[str, Callable[[torch.Tensor], object]] = {
    "data_ptr": lambda w: w.data_ptr(),
    "storage": lambda w: w.untyped_storage(),
    "dlpack": lambda w: w.__dlpack__(),
    "shape in place": lambda w: w.squeeze_(),
    "out=": lambda w: torch.add(torch.ones(4, 4), 1, out=w),
    "a list to write to": lambda w: torch._foreach_mul_([w], 2),  # pyright: ignore[reportPrivateImportUsage]
    "init": lambda w: torch.nn.init.constant_(w, 1),
}


@pytest.mark.parametrize("escape", ESCAPES.values(), ids=ESCAPES.keys())
def test_what_needs_the_memory_aborts_the_plan(
    escape: Callable[[torch.Tensor], object], save: Any, open_session: Any
) -> None:
    with open_session() as session, pytest.raises(PlanAborted, match="weight"):
        for _, lazy in session.guard(session.iterate(save({"weight": torch.randn(4, 4)}))):
            escape(lazy)
    assert session.aborted is not None


def test_rebinding_a_parameter_to_a_lazy_tensor_is_refused(save: Any, open_session: Any) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    with open_session() as session:
        ((_, lazy),) = session.iterate(save({"weight": torch.randn(4, 4)}))
        with pytest.raises(RuntimeError, match="incompatible tensor type"):  # by torch itself
            parameter.data = lazy
    assert torch.equal(parameter, torch.zeros(4, 4))


@pytest.mark.parametrize(
    "keep",
    [
        lambda module, lazy: setattr(module, "kept", lazy),
        lambda module, lazy: setattr(module, "weight", torch.nn.Parameter(lazy)),
        lambda module, lazy: module.register_buffer("kept", lazy),
        lambda module, lazy: setattr(module, "kept", {"inside": lazy}),
        lambda module, lazy: setattr(module, "kept", [("inside", lazy)]),
        lambda module, lazy: setattr(module, "kept", types.SimpleNamespace(inside=lazy)),
    ],
    ids=["attribute", "parameter", "buffer", "dict", "list of tuples", "object"],
)
def test_a_lazy_tensor_left_in_the_model_aborts_the_plan(
    keep: Callable[[torch.nn.Module, torch.Tensor], None], save: Any, open_session: Any
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with open_session() as session:
        ((_, lazy),) = session.guard(session.iterate(save({"weight": torch.randn(4, 4)})))
        keep(model[0], lazy)
        assert find_lazy(model).startswith("0.")
        with pytest.raises(PlanAborted, match="0\\."):
            session.finish(model)


def test_a_buffer_made_of_a_lazy_tensor_without_its_data_aborts_the_plan(
    save: Any, open_session: Any
) -> None:
    model = torch.nn.Linear(4, 4)
    with open_session() as session:
        ((_, lazy),) = session.guard(session.iterate(save({"weight": torch.randn(4, 4)})))
        model.register_buffer("kept", torch.Tensor._make_subclass(torch.Tensor, lazy))
        del lazy
        with pytest.raises(PlanAborted, match="kept"):
            session.finish(model)


def test_a_lazy_tensor_on_another_device_is_not_written_to(save: Any, open_session: Any) -> None:
    with open_session() as session:
        ((_, lazy),) = session.iterate(save({"weight": torch.randn(4, 4)}))
        assert lazy.to("cpu") is lazy
        moved = lazy.to("meta")
        for either in (moved, lazy):
            with pytest.raises(PlanAborted, match="has a lazy copy"):
                either.mul_(2)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("cpu",), {}),
        ((torch.float64,), {}),
        ((torch.float64, True), {}),
        ((), {"device": "meta", "dtype": torch.bfloat16}),
        ((torch.device("cpu"), torch.float16, True), {}),
        ((), {"dtype": torch.float32, "copy": False}),
        ((torch.zeros(1, dtype=torch.int8),), {}),
        ((), {"tensor": torch.zeros(1, device="meta")}),
    ],
)
def test_a_lazy_tensor_says_that_it_is_where_and_what_it_was_moved_to(
    save: Any, open_session: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    weight = torch.randn(4, 4)
    with open_session() as session:
        ((_, lazy),) = session.iterate(save({"weight": weight}))
        moved, expected = (each.to(*arguments, **options) for each in (lazy, weight))
        assert isinstance(moved, LazyTensor)
        assert (moved.device, moved.dtype) == (expected.device, expected.dtype)


def test_a_view_beyond_its_tensor_is_refused(save: Any, open_session: Any) -> None:
    with open_session() as session:
        for _, lazy in session.iterate(save({"a": torch.ones(4, 4), "b": torch.ones(4, 4)})):
            with pytest.raises((CheckpointError, RuntimeError), match="out of"):
                torch.zeros(4, 8).copy_(lazy.as_strided((4, 8), (8, 1)))


def test_two_threads_that_write_to_one_source_write_to_one_memory(
    save: Any, open_session: Any
) -> None:
    weight = torch.zeros(64, 64)
    with open_session() as session, ThreadPoolExecutor(8) as pool:
        ((_, lazy),) = session.iterate(save({"weight": weight}))
        list(pool.map(lambda row: lazy[row].fill_(1), range(64)))
        target = torch.zeros(64, 64)
        target.copy_(lazy)
    assert torch.equal(target, torch.ones(64, 64))


def test_a_forked_child_does_not_wait_for_readers_that_it_lacks(
    save: Any, open_session: Any
) -> None:
    target = torch.zeros(64, 64)
    with open_session() as session, session.armed():
        for _, lazy in session.iterate(save({"weight": torch.randn(64, 64)})):
            target.copy_(lazy)
            child = os.fork()
            if child == 0:
                target.add_(1)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        session.flush()


def test_an_abort_that_a_loader_swallowed_is_not_forgotten(save: Any, open_session: Any) -> None:
    with open_session() as session:
        ((_, lazy),) = session.guard(session.iterate(save({"weight": torch.randn(4, 4)})))
        with pytest.raises(PlanAborted):
            lazy.data_ptr()
        with pytest.raises(PlanAborted, match="data_ptr"):
            session.finish(torch.nn.Module())


def test_targets_that_readers_cannot_write_are_filled_by_torch(
    save: Any, open_session: Any
) -> None:
    weight = torch.randn(4, 4)
    meta = torch.empty(4, 4, device="meta")
    sparse_like = torch.zeros(2, 4, 4)
    with open_session() as session:
        for _, lazy in session.guard(session.iterate(save({"weight": weight}))):
            meta.copy_(lazy)
            sparse_like.copy_(lazy)  # broadcast
    assert torch.equal(sparse_like[1], weight)
    assert session.report.planned == 0


def test_a_parameter_that_requires_grad_is_filled(save: Any, open_session: Any) -> None:
    weight = torch.randn(4, 4)
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    with open_session() as session, torch.no_grad():
        for _, lazy in session.guard(session.iterate(save({"weight": weight}))):
            parameter.copy_(lazy)
    assert torch.equal(parameter, weight) and parameter.requires_grad


def test_storage_does_not_move(device: torch.device, save: Any, open_session: Any) -> None:
    target = torch.zeros(64, 64, device=device)
    address = target.data_ptr()
    session: LoadSession
    with open_session() as session:
        for _, lazy in session.guard(session.iterate(save({"weight": torch.randn(64, 64)}))):
            target.copy_(lazy)
    assert target.data_ptr() == address
