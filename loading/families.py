"""Fast load: one layer is traced with the engine's own code, the others are derived from it.

A model repeats itself: its layers by name, the experts of a layer by their place in a parameter.
So the engine's loader gets one layer of each kind, with some of its experts, and samples of others.
What it does with the samples must be what the first one foretells; what is not so goes to the
engine, tensor by tensor. The cost of planning then no longer grows with layers or experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from weightlift.loading.header import TensorEntry
from weightlift.loading.parameters import Parameters, form
from weightlift.loading.recording import Move, Recipe

FEWEST_LAYERS = 4
"""Of a kind, below which there is nothing to gain."""

PROBES = 16
"""Stretches that the experts of a layer are cut into; both ends of each are traced. Expert
parallelism gives a rank one stretch or several, for up to 16 ranks."""

HELD_SECONDS = 2.0
"""How long a loader's own threads may take to finish with the samples."""

Trace = Callable[[str], Recipe | None]
"""What the engine did with a tensor, by name; None if that cannot be derived for others."""


@dataclass(frozen=True)
class Families:
    """What repeats in an architecture, and how it shows in names.

    Attributes:
        layers: Stands before the number of a layer, in the checkpoint and in the model.
        experts: Stands before the number of an expert.
        seen: Parts of the names that the engine must see in every layer, because it keeps count.
    """

    layers: str = ".layers."
    experts: str = ".experts."
    seen: tuple[str, ...] = ()


@dataclass
class Kind:
    """Layers whose tensors and parameters are alike but for the number.

    Attributes:
        before: What stands before the layers in tensor names.
        layers: By number, the tensors of a layer by the rest of their names.
    """

    before: str
    layers: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)

    @property
    def first(self) -> dict[str, TensorEntry]:
        """The layer that is traced."""
        return next(iter(self.layers.values()))

    def has(self, layer: Mapping[str, TensorEntry]) -> bool:
        """Whether a layer's tensors are those of this kind."""
        mine = self.first
        return len(layer) == len(mine) and all(
            (other := mine.get(rest)) is not None
            and other.shape == entry.shape
            and other.dtype == entry.dtype
            for rest, entry in layer.items()
        )

    def checked(self) -> list[str]:
        """Numbers of the layers that are compared with the first: second, middle and last."""
        numbers = list(self.layers)
        return sorted({numbers[1], numbers[len(numbers) // 2], numbers[-1]})


def kinds(entries: Iterable[TensorEntry], parameters: Parameters, families: Families) -> list[Kind]:
    """The kinds of layers that are worth deriving, each with its layers in order."""
    layers: dict[tuple[str, int], dict[str, TensorEntry]] = {}
    for entry in entries:
        before, mark, rest = entry.name.partition(families.layers)
        number, _, rest = rest.partition(".")
        if mark and number.isdecimal():
            layers.setdefault((before, int(number)), {})[rest] = entry
    forms = _forms(parameters, families)
    found: dict[tuple[str, object], list[Kind]] = {}
    for (before, index), layer in sorted(layers.items()):
        number = str(index)
        alike = found.setdefault((before, forms.get(number)), [])
        kind = next((kind for kind in alike if kind.has(layer)), None)
        if kind is None:
            kind = Kind(before)
            alike.append(kind)
        kind.layers[number] = layer
    several = [kind for alike in found.values() for kind in alike]
    return [kind for kind in several if len(kind.layers) >= FEWEST_LAYERS]


def _forms(parameters: Parameters, families: Families) -> dict[str, frozenset[object]]:
    """By layer number, the names and forms of its parameters."""
    found: dict[str, set[object]] = {}
    for name, tensor in parameters.tensors.items():
        before, mark, rest = name.partition(families.layers)
        number, _, rest = rest.partition(".")
        if mark and name not in parameters.buffers:
            found.setdefault(number, set()).add((before, rest, form(tensor)))
    return {number: frozenset(forms) for number, forms in found.items()}


def samples(kind: Kind, families: Families) -> Iterator[str]:
    """Names of the tensors of a kind that the engine must show the way with."""
    first = kind.first
    groups = _experts(first, families)
    grouped = {rest for by_number in groups.values() for rest in by_number.values()}
    single = [rest for rest in first if rest not in grouped]
    probed = [by_number[e] for by_number in groups.values() for e in _probes(list(by_number))]
    yield from (first[rest].name for rest in (*single, *probed))
    few = [
        by_number[e]
        for by_number in groups.values()
        for e in {min(by_number), max(by_number), list(by_number)[len(by_number) // 2]}
    ]
    for number in kind.checked():
        yield from (kind.layers[number][rest].name for rest in (*single, *few))


def _experts(
    layer: Mapping[str, TensorEntry], families: Families
) -> dict[tuple[str, str], dict[int, str]]:
    """By role, such as ``gate_proj.weight``, the rests of the experts' names by number."""
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for rest in layer:
        before, mark, after = f".{rest}".partition(families.experts)
        number, _, role = after.partition(".")
        if mark and number.isdecimal():
            groups.setdefault((before, role), {})[int(number)] = rest
    return {role: dict(sorted(by_number.items())) for role, by_number in groups.items()}


def _probes(numbers: list[int]) -> list[int]:
    """Both ends of each of :data:`PROBES` stretches, or all where they are few."""
    count = len(numbers)
    if count <= 3 * PROBES:
        return numbers
    edges = [count * part // PROBES for part in range(PROBES + 1)]
    return sorted(
        {numbers[edge] for edge in edges[:-1]} | {numbers[edge - 1] for edge in edges[1:]}
    )


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
    groups = _experts(first, families)
    grouped = {rest for by_number in groups.values() for rest in by_number.values()}
    known = {rest: trace(entry.name) for rest, entry in first.items() if rest not in grouped}
    of_experts: dict[str, Recipe | None] = {}
    for by_number in groups.values():
        probes = _probes(list(by_number))
        traced = {number: trace(first[by_number[number]].name) for number in probes}
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
