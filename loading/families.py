"""Fast load: one layer is traced with the engine's own code, the others are derived from it.

A model repeats itself: its layers by name, the experts of a layer by their place in a parameter.
So the engine's loader gets one layer of each kind, with some of its experts, and samples of others.
What it does with the samples must be what the first one foretells; what is not so goes to the
engine, tensor by tensor. The cost of planning then no longer grows with layers or experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from weightlift.loading.header import TensorEntry
from weightlift.loading.parameters import Parameters, form

FEWEST_LAYERS = 4
"""Of a kind, below which there is nothing to gain."""

PROBES = 16
"""Stretches that the experts of a layer are cut into; both ends of each are traced. Expert
parallelism gives a rank one stretch or several, for up to 16 ranks."""

HELD_SECONDS = 2.0
"""How long a loader's own threads may take to finish with the samples."""


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
    groups = experts_of(first, families)
    grouped = {rest for by_number in groups.values() for rest in by_number.values()}
    single = [rest for rest in first if rest not in grouped]
    probed = [by_number[e] for by_number in groups.values() for e in probes(list(by_number))]
    yield from (first[rest].name for rest in (*single, *probed))
    few = [
        by_number[e]
        for by_number in groups.values()
        for e in {min(by_number), max(by_number), list(by_number)[len(by_number) // 2]}
    ]
    for number in kind.checked():
        yield from (kind.layers[number][rest].name for rest in (*single, *few))


def experts_of(
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


def probes(numbers: list[int]) -> list[int]:
    """Both ends of each of :data:`PROBES` stretches, or all where they are few."""
    count = len(numbers)
    if count <= 3 * PROBES:
        return numbers
    edges = [count * part // PROBES for part in range(PROBES + 1)]
    return sorted(
        {numbers[edge] for edge in edges[:-1]} | {numbers[edge - 1] for edge in edges[1:]}
    )
