"""What patches may know of the process they run in. Set by ``hooks``, read by ``patches``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightlift.compat.engines import Engine

if TYPE_CHECKING:
    from weightlift.loading.settings import Settings


@dataclass(frozen=True)
class Option:
    """A setting that users can give.

    Attributes:
        name: The field of :class:`~weightlift.loading.settings.Settings`, and the YAML key.
        parse: Turns text into the value; raises ValueError with what is allowed.
        env: Its environment variable.
        help: One or two sentences for ``--help`` and the README.
        flags: By engine or package of one, how its command line spells it. A switch has two: on, off.
        is_switch: Whether it is on or off, its flags taking no value.
        metavar: What the value stands for in ``--help``.
    """

    name: str
    parse: Callable[[str], Any]
    env: str
    help: str
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_switch: bool = False
    metavar: str = ""


@dataclass(frozen=True)
class Context:
    """An engine in this process.

    Attributes:
        engine: What is installed.
        options: The settings that users can give.
        settings: What they gave, as of now.
    """

    engine: Engine
    options: Sequence[Option]
    settings: Callable[[], Settings]


_contexts: dict[str, Context] = {}


def provide(context: Context) -> None:
    """Make a context known to the patches of its engine."""
    _contexts[context.engine.name] = context


def context_of(engine: str) -> Context:
    """The context of an engine whose patches are on, or of the one that a package is of."""
    return _contexts[engine.partition(".")[0]]
