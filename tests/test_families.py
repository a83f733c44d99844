"""Deriving the plan of all layers from one: what follows, what does not, and what must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from weightlift.loading.derive import derive
from weightlift.loading.families import Families, Kind, kinds, samples
from weightlift.loading.header import TensorEntry
from weightlift.loading.parameters import Parameters
from weightlift.loading.planner import Planner
from weightlift.loading.recording import Move, Recipe
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession
from weightlift.loading.settings import Settings

LAYERS, EXPERTS, ROWS, COLUMNS = 6, 64, 4, 8
NBYTES = ROWS * COLUMNS * 2
FAMILIES = Families()
Traces = dict[str, Recipe]


def entry(name: str, *shape: int) -> TensorEntry:
    count = torch.Size(shape).numel()
    return TensorEntry(name, torch.bfloat16, shape, 0, count * 2)


def checkpoint(layers: int = LAYERS, experts: int = EXPERTS) -> list[TensorEntry]:
    """Per layer a norm, and two matrices an expert; and an embedding."""
    entries = [entry("model.embed.weight", 16, COLUMNS)]
    for layer in range(layers):
        entries.append(entry(f"model.layers.{layer}.norm.weight", COLUMNS))
        for expert in range(experts):
            for role in ("up", "down"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{role}.weight"
                entries.append(entry(name, ROWS, COLUMNS))
    return entries


def parameters(layers: int = LAYERS, experts: int = EXPERTS) -> Parameters:
    named = {"model.embed.weight": torch.zeros(16, COLUMNS).bfloat16()}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        named[f"{prefix}norm.weight"] = torch.zeros(COLUMNS).bfloat16()
        for role in ("up", "down"):
            target = torch.zeros(experts, ROWS, COLUMNS).bfloat16()
            named[f"{prefix}mlp.experts.{role}_weight"] = target
    return Parameters(named)


def engine(entries: list[TensorEntry], place: Callable[[int, int], int | None]) -> Traces:
    """What an engine does that puts expert ``e`` of a layer at ``place(layer, e)``, or nowhere."""
    traces: Traces = {}
    for item in entries:
        parts = item.name.split(".")
        moves: tuple[Move, ...] = (Move(0, item.nbytes, item.name, 0, None),)
        if "experts" in parts:
            layer, expert, role = int(parts[2]), int(parts[5]), parts[6]
            where = place(layer, expert)
            target = f"model.layers.{layer}.mlp.experts.{role}_weight"
            moves = () if where is None else (Move(0, NBYTES, target, where * NBYTES, None),)
        traces[item.name] = Recipe(item.shape, item.dtype, moves)
    return traces


def derived(traces: Traces, entries: list[TensorEntry], model: Parameters) -> tuple[Traces, int]:
    """The recipes that follow from the samples, and how many samples there were."""
    found: Traces = {}
    sampled: set[str] = set()
    for kind in kinds(entries, model, FAMILIES):
        sampled |= set(samples(kind, FAMILIES))
        trace = {name: recipe for name, recipe in traces.items() if name in sampled}
        found |= derive(kind, trace.get, model, FAMILIES)
    assert not sampled & found.keys()
    return found, len(sampled)


def test_all_that_follows_is_as_the_engine_does_it() -> None:
    entries, model = checkpoint(), parameters()
    traces = engine(entries, lambda layer, expert: expert)
    found, sampled = derived(traces, entries, model)
    assert all(recipe == traces[name] for name, recipe in found.items())
    assert len(found) + sampled == len(entries) - 1


def test_samples_do_not_grow_with_layers_or_experts() -> None:
    counts = set()
    for layers, experts in ((6, 64), (48, 64), (6, 256)):
        entries, model = checkpoint(layers, experts), parameters(layers, experts)
        traces = engine(entries, lambda layer, expert: expert)
        found, sampled = derived(traces, entries, model)
        assert len(found) + sampled == len(entries) - 1
        counts.add(sampled)
    assert len(counts) == 1


def test_experts_of_other_ranks_go_nowhere() -> None:
    local = EXPERTS // 4
    entries, model = checkpoint(), parameters(experts=local)
    traces = engine(
        entries, lambda layer, expert: expert - 2 * local if expert // local == 2 else None
    )
    found, sampled = derived(traces, entries, model)
    assert all(recipe == traces[name] for name, recipe in found.items())
    assert len(found) + sampled == len(entries) - 1


def test_experts_between_two_probes_are_not_overlooked() -> None:
    """So many ranks that one of them has less than a stretch of experts."""
    experts, local = 256, range(4, 8)
    entries, model = checkpoint(experts=experts), parameters(experts=len(local))
    traces = engine(
        entries, lambda layer, expert: expert - local.start if expert in local else None
    )
    found, _ = derived(traces, entries, model)
    assert not any(".experts." in name for name in found)


def test_rearranged_experts_are_not_guessed() -> None:
    entries, model = checkpoint(), parameters()
    traces = engine(entries, lambda layer, expert: (expert * 5) % EXPERTS)
    found, _ = derived(traces, entries, model)
    assert all(recipe == traces[name] for name, recipe in found.items())
    assert not any(".experts." in name for name in found)


def test_a_layer_that_differs_is_found_by_its_samples() -> None:
    entries, model = checkpoint(), parameters()
    last = LAYERS - 1
    traces = engine(
        entries, lambda layer, expert: EXPERTS - 1 - expert if layer == last else expert
    )
    found, _ = derived(traces, entries, model)
    assert not any(".experts." in name for name in found)
    assert any("norm" in name for name in found)


def test_a_parameter_that_would_not_be_filled_is_left_to_the_engine() -> None:
    entries, model = checkpoint(), parameters(experts=EXPERTS + 1)
    found, _ = derived(engine(entries, lambda layer, expert: expert), entries, model)
    assert not any(".experts." in name for name in found)


def test_what_the_engine_must_see_is_left_to_it() -> None:
    entries, model = checkpoint(), parameters()
    traces = engine(entries, lambda layer, expert: expert)
    worked_with = {name: recipe for name, recipe in traces.items() if "norm" not in name}
    found, _ = derived(worked_with, entries, model)
    assert found and not any("norm" in name for name in found)


def test_layers_without_parameters_are_of_another_kind() -> None:
    """Pipeline parallelism: this rank has the last four of eight layers."""
    entries, whole = checkpoint(8), parameters(8)
    mine = {
        name: tensor
        for name, tensor in whole.tensors.items()
        if not any(f".layers.{layer}." in name for layer in range(4))
    }
    model = Parameters(mine)
    traces = {
        name: recipe._replace(moves=tuple(m for m in recipe.moves if m.target in mine))
        for name, recipe in engine(entries, lambda layer, expert: expert).items()
    }
    found, sampled = derived(traces, entries, model)
    assert all(recipe == traces[name] for name, recipe in found.items())
    assert len(found) + sampled == len(entries) - 1
    used = [name for name, recipe in found.items() if recipe.moves]
    assert used and all(int(name.split(".")[2]) >= 4 for name in used)


def test_layers_of_another_shape_are_of_another_kind() -> None:
    entries, model = checkpoint(), parameters()
    first = entries.index(entry("model.layers.0.norm.weight", COLUMNS))
    entries[first] = entry("model.layers.0.norm.weight", COLUMNS // 2)
    found = kinds(entries, model, FAMILIES)
    assert [list(kind.layers) for kind in found] == [["1", "2", "3", "4", "5"]]
    assert isinstance(found[0], Kind)


def test_names_that_stand_in_two_files_are_left_to_the_engine(
    tmp_path: Path,
) -> None:
    weights = {f"model.layers.{layer}.w": torch.full((4, 4), layer + 1.0) for layer in range(5)}
    weights["model.embed"] = torch.ones(4, 4)
    save_file(weights, tmp_path / "1.safetensors")
    save_file({"model.layers.3.w": torch.full((4, 4), 99.0)}, tmp_path / "2.safetensors")
    plans = []
    for files in (["1.safetensors"], ["1.safetensors", "2.safetensors"]):
        model = {name: torch.zeros(4, 4) for name in weights}
        planner = Planner(Parameters(model), families=FAMILIES, is_fast=True)
        with LoadSession(Settings(), LoadReport(), planner.ledger, planner.weights) as session:
            with session.armed():
                paths = [str(tmp_path / file) for file in files]
                for name, weight in session.guard(session.iterate(paths)):
                    model[name].copy_(weight)
        plans.append((planner.plan, model["model.layers.3.w"][0, 0].item()))
    assert plans == [("fast", 4.0), ("full", 99.0)]
    assert "of the same name" in planner.note
