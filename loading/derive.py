"""What follows from the samples of a kind of layers, and what contradicts them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

from weightlift.loading.families import Families, Kind, experts_of, probes, samples
from weightlift.loading.parameters import Parameters
from weightlift.loading.recording import Move, Recipe

Trace = Callable[[str], Recipe | None]
"""What the engine did with a tensor, by name; None if that cannot be derived for others."""


def derive(
    kind: Kind, trace: Trace, parameters: Parameters, families: Families
) -> dict[str, Recipe]:
    """Recipes of the tensors of a kind that follow from its samples, by name.

    What does not follow is left out: roles that the engine must see, or did more with than copy;
    roles whose checks failed; experts between two that do not lie on a line; and parameters that
    the moves found would not fill.
    """
    number = next(iter(kind.layers))
    known = _first_layer(kind, trace, parameters, families)
    mark = f"{families.layers}{number}."
    inside = {
        rest: recipe
        for rest, recipe in known.items()
        if all(mark in move.target for move in recipe.moves)
    }
    sampled = set(samples(kind, families))
    wrong = _contradicted(kind, inside, mark, trace, sampled, families)
    inside = {rest: recipe for rest, recipe in inside.items() if _role(rest, families) not in wrong}
    recipes: dict[str, Recipe] = {}
    for other, layer in kind.layers.items():
        targets = _targets(inside, mark, f"{families.layers}{other}.")
        absent = {name for name, new in targets.items() if not parameters.are_alike(name, new)}
        for rest, recipe in inside.items():
            name = layer[rest].name
            if name in sampled or any(move.target in absent for move in recipe.moves):
                continue
            recipes[name] = recipe if other == number else _renamed(recipe, targets)
    return recipes


def _targets(known: Mapping[str, Recipe], mark: str, renamed: str) -> dict[str, str]:
    """What the targets of one layer's recipes are called in another."""
    return {
        move.target: move.target.replace(mark, renamed, 1)
        for recipe in known.values()
        for move in recipe.moves
    }


def _renamed(recipe: Recipe, targets: Mapping[str, str]) -> Recipe:
    moves = [
        Move(start, nbytes, targets[target], place, layout)
        for start, nbytes, target, place, layout in recipe.moves
    ]
    return Recipe(recipe.shape, recipe.dtype, tuple(moves))


def _role(rest: str, families: Families) -> tuple[str, str]:
    """What a tensor is, whichever expert it belongs to."""
    before, mark, after = f".{rest}".partition(families.experts)
    number, _, role = after.partition(".")
    return (before, role) if mark and number.isdecimal() else (rest, "")


def _first_layer(
    kind: Kind, trace: Trace, parameters: Parameters, families: Families
) -> dict[str, Recipe]:
    """What is known of the first layer, by the rest of the names."""
    first = kind.first
    groups = experts_of(first, families)
    grouped = {rest for by_number in groups.values() for rest in by_number.values()}
    known = {rest: trace(entry.name) for rest, entry in first.items() if rest not in grouped}
    of_experts: dict[str, Recipe | None] = {}
    for by_number in groups.values():
        numbers = probes(list(by_number))
        traced = {number: trace(first[by_number[number]].name) for number in numbers}
        is_used = any(recipe and recipe.moves for recipe in traced.values())
        if not is_used and _has_parameters(kind, parameters, families):
            continue  # this rank's experts may lie between two probes
        for number, recipe in _on_lines(list(by_number), traced, parameters).items():
            of_experts[by_number[number]] = recipe
    unfilled = _unfilled({**known, **of_experts}, parameters)
    for rest, recipe in of_experts.items():
        if recipe and not any(move.target in unfilled for move in recipe.moves):
            known[rest] = recipe
    return {rest: recipe for rest, recipe in known.items() if recipe is not None}


def _has_parameters(kind: Kind, parameters: Parameters, families: Families) -> bool:
    """Whether this rank has parameters of the kind's layers at all."""
    mark = f"{families.layers}{next(iter(kind.layers))}."
    return any(mark in name for name in parameters.tensors)


def _on_lines(
    numbers: list[int], traced: Mapping[int, Recipe | None], parameters: Parameters
) -> dict[int, Recipe | None]:
    """The recipes of all experts of a role, from those of some; others are left out."""
    found: dict[int, Recipe | None] = dict(traced)
    probes = sorted(traced)
    for low, high in itertools.pairwise(probes):
        start, stop = traced[low], traced[high]
        if start is None or stop is None or not _is_line(low, start, high, stop, parameters):
            continue
        for number in numbers:
            if low < number < high:
                moves = (_shifted(move, number - low, parameters) for move in start.moves)
                found[number] = Recipe(start.shape, start.dtype, tuple(moves))
    return found


def _is_line(low: int, start: Recipe, high: int, stop: Recipe, parameters: Parameters) -> bool:
    """Whether one expert's recipe is the other's, as many experts further on."""
    return start._replace(moves=()) == stop._replace(moves=()) and stop.moves == tuple(
        _shifted(move, high - low, parameters) for move in start.moves
    )


def _shifted(move: Move, experts: int, parameters: Parameters) -> Move:
    target = parameters.tensors[move.target]
    step = target.stride(0) * target.element_size()
    return Move(move.start, move.nbytes, move.target, move.place + experts * step, move.layout)


def _unfilled(recipes: Mapping[str, Recipe | None], parameters: Parameters) -> set[str]:
    """The parameters that these recipes do not fill exactly, by number of bytes."""
    filled: dict[str, int] = {}
    for recipe in recipes.values():
        for move in recipe.moves if recipe else ():
            filled[move.target] = filled.get(move.target, 0) + move.filled
    return {name for name, nbytes in filled.items() if nbytes != parameters.tensors[name].nbytes}


def _contradicted(
    kind: Kind,
    known: Mapping[str, Recipe],
    mark: str,
    trace: Trace,
    sampled: set[str],
    families: Families,
) -> set[tuple[str, str]]:
    """The roles that another layer's samples do not bear out."""
    wrong: set[tuple[str, str]] = set()
    for number in kind.checked():
        renamed = f"{families.layers}{number}."
        for rest, entry in kind.layers[number].items():
            if entry.name not in sampled or rest not in known:
                continue
            targets = _targets({rest: known[rest]}, mark, renamed)
            if trace(entry.name) != _renamed(known[rest], targets):
                wrong.add(_role(rest, families))
    return wrong
