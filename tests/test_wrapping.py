"""Models that torch's FSDP wraps without their data, against those that it wraps with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from weightlift.patches.sglang_diffusion import offload


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[DeviceMesh]:
    """Of this process alone, in which a load by plan is on."""
    monkeypatch.setattr(offload, "active_session", object)
    where = f"file://{tmp_path}/ranks"
    distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


class Encoder(torch.nn.Module):
    """Layers that are wrapped, what is left for the whole, and parameters that are tied."""

    def __init__(self, *, is_tied_across: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        self.layers[0].extra = self.layers[0].weight  # in one group
        if is_tied_across:  # groups; such a model cannot run, but be wrapped
            self.layers[2].weight = self.layers[1].weight
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = torch.nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("scale", torch.randn(4))

    def forward(self, tokens: torch.Tensor) -> Any:
        found = self.embed(tokens) * self.scale
        for layer in self.layers:
            found = layer(found)
        return self.head(found)


def shard_model(
    model: Encoder, *, cpu_offload: bool, mesh: DeviceMesh, fails: bool = False
) -> None:
    """As the engine does: layers from the last to the first, then all."""
    more: Any = {"mesh": mesh, "offload_policy": CPUOffloadPolicy(pin_memory=False)}
    for layer in reversed(model.layers):
        if fails:
            raise ValueError("no layer is wrapped")
        fully_shard(layer, **more)
    fully_shard(model, **more)


def facts(model: Encoder) -> dict[str, tuple[Any, ...]]:
    """What the parameters are, and which of them are the same object."""
    every: list[tuple[str, Any]] = list(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    return {
        name: (
            type(item).__name__,
            item.dtype,
            item.device,
            item.placements,
            item.requires_grad,
            item.to_local().tolist(),
            first.setdefault(id(item), name),
        )
        for name, item in every
    }


@pytest.mark.parametrize("is_tied_across", [False, True])
def test_wrapped_without_data_a_model_is_what_it_would_be(
    is_tied_across: bool, mesh: DeviceMesh
) -> None:
    stock = Encoder(is_tied_across=is_tied_across)
    ours, places = copy.deepcopy(stock), {}
    for name, item in ours.named_parameters():
        places[name] = item.data_ptr()
    shard_model(stock, cpu_offload=True, mesh=mesh)
    offload._shard_model(shard_model, None, (ours,), {"cpu_offload": True, "mesh": mesh})
    assert facts(ours) == facts(stock)
    found: list[tuple[str, Any]] = list(ours.named_parameters())
    kept = {name for name, item in found if item.to_local().data_ptr() == places.get(name)}
    assert kept == places.keys(), "nothing is copied but what FSDP unties"
    if not is_tied_across:
        tokens = torch.tensor([0, 3, 4])
        assert torch.equal(ours(tokens), stock(tokens))
        wrapped: Any = (ours, stock)
        for model in wrapped:
            model.reshard()  # what is in no layer stays whole after a run
        assert facts(ours) == facts(stock)


def test_a_model_that_cannot_be_wrapped_is_what_it_was(mesh: DeviceMesh) -> None:
    model = Encoder()
    before = list(model.named_parameters(remove_duplicate=False))
    with pytest.raises(ValueError, match="no layer is wrapped"):
        offload._shard_model(
            shard_model, None, (model,), {"cpu_offload": True, "mesh": mesh, "fails": True}
        )
    after = list(model.named_parameters(remove_duplicate=False))
    assert all(now is item for (_, now), (_, item) in zip(after, before, strict=True))


@pytest.mark.parametrize("what", ["no offload", "meta"])
def test_other_models_are_wrapped_as_they_are(what: str, mesh: DeviceMesh) -> None:
    seen: list[Any] = []

    def shard(model: Encoder, *, cpu_offload: bool, mesh: DeviceMesh) -> None:
        seen.extend(model.parameters())

    model = Encoder() if what == "no offload" else Encoder().to("meta")
    parameters = list(model.parameters())
    offload._shard_model(shard, None, (model,), {"cpu_offload": what == "meta", "mesh": mesh})
    assert all(now is item for now, item in zip(seen, parameters, strict=True))
