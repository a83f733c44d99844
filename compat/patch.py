"""The record of a patch, and putting the patches of a module on and off.

The patches of one module are one feature: all of them are put on, or none.
"""

from __future__ import annotations

import enum
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import wrapt
from packaging.specifiers import SpecifierSet
from packaging.version import Version

logger = logging.getLogger("weightlift")

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""``(wrapped, instance, args, kwargs) -> result``, as wrapt calls it."""


@dataclass(frozen=True)
class Patch:
    """One thing that is replaced in an engine, and why.

    Attributes:
        target: ``module:name`` or ``module:Class.name``.
        versions: PEP 440 range of the engine in which the target is as expected.
        wrapper: What runs in its place.
        parameters: Names that the target must accept; all that the wrapper relies on.
        why: What is wrong or missing in the engine.
        how: What the wrapper does about it.
        upstream: Where the engine's project stands on this.
        drop_when: What must happen for this patch to go.
    """

    target: str
    versions: str
    wrapper: Wrapper
    parameters: tuple[str, ...]
    why: str
    how: str
    upstream: str
    drop_when: str

    @property
    def module(self) -> str:
        """The module that holds the target."""
        return self.target.partition(":")[0]

    @property
    def path(self) -> str:
        """The target within its module."""
        return self.target.partition(":")[2]

    def fits(self, version: Version) -> bool:
        """Whether this engine version is in the range; development builds count as any other."""
        return SpecifierSet(self.versions).contains(version, prereleases=True)


class Outcome(enum.Enum):
    """What became of the patches of a module."""

    APPLIED = "applied"
    WAITING = "waiting"
    NOT_INSTALLED = "not-installed"
    VERSION = "version"
    SHAPE = "shape"
    DISABLED = "disabled"
    FAILED = "failed"


@dataclass(frozen=True)
class Result:
    """An outcome with what there is to say about it."""

    outcome: Outcome
    detail: str = ""


class OurWrapper(wrapt.FunctionWrapper):  # type: ignore[type-arg]
    """A wrapper of ours: the mark by which a second install knows the first."""

    def __init__(self, wrapped: Any, wrapper: Wrapper, handle: Handle) -> None:
        super().__init__(wrapped, wrapper, enabled=lambda: handle.is_on)
        self._self_handle = handle

    @property
    def is_on(self) -> bool:
        """Whether it does anything but pass calls on."""
        handle: Handle = self._self_handle
        return handle.is_on


@dataclass
class Handle:
    """A patch that is on. :meth:`undo` takes it off, also from under somebody else's wrapper."""

    patch: Patch
    parent: Any
    attribute: str
    original: Any
    was_inherited: bool
    wrapper: Any = None
    is_on: bool = field(default=True)

    def undo(self) -> None:
        """Put the original back; where another wrapper lies over ours, ours passes calls on."""
        self.is_on = False
        if vars(self.parent).get(self.attribute) is not self.wrapper:
            return
        if self.was_inherited:
            delattr(self.parent, self.attribute)
        else:
            setattr(self.parent, self.attribute, self.original)


def put_on(patches: Sequence[Patch], module: ModuleType) -> tuple[Result, list[Handle]]:
    """Put on all patches of a module, or none.

    Args:
        patches: Patches for this engine version, all of them of ``module``.
        module: The imported module.
    """
    handles: list[Handle] = []
    for patch in patches:
        problem = _misfit(patch, module)
        if problem:
            return Result(Outcome.SHAPE, f"{patch.target}: {problem}"), []
    try:
        for patch in patches:
            handle = _wrap(patch, module)
            if handle is not None:
                handles.append(handle)
    except Exception as error:
        take_off(handles)
        logger.exception("weightlift: cannot patch %s; the engine stays stock", module.__name__)
        return Result(Outcome.FAILED, repr(error)), []
    return Result(Outcome.APPLIED, f"{len(patches)} patches"), handles


def take_off(handles: Sequence[Handle]) -> None:
    """Undo patches, the last first."""
    for handle in reversed(handles):
        handle.undo()


def _misfit(patch: Patch, module: ModuleType) -> str:
    """Why the target is not what the patch expects, or ''."""
    try:
        _, _, original = wrapt.resolve_path(module, patch.path)
    except AttributeError:
        return "there is no such name"
    function = getattr(original, "__func__", original)
    if not callable(function):
        return f"it is a {type(original).__name__}, not a function"
    try:
        accepted = inspect.signature(function).parameters
    except ValueError as error:
        return str(error)
    missing = [name for name in patch.parameters if name not in accepted]
    return f"it takes no {', '.join(missing)}" if missing else ""


def _wrap(patch: Patch, module: ModuleType) -> Handle | None:
    parent, attribute, original = wrapt.resolve_path(module, patch.path)
    layers = list(_layers(original))
    if any(layer.is_on for layer in layers):
        return None
    if layers and layers[0] is original:  # one of ours that was taken off and put back by others
        original = layers[0].__wrapped__
    handle = Handle(patch, parent, attribute, original, attribute not in vars(parent))
    handle.wrapper = OurWrapper(original, patch.wrapper, handle)
    setattr(parent, attribute, handle.wrapper)
    return handle


def _layers(function: Any) -> Iterator[OurWrapper]:
    """The wrappers of ours around a function, the outermost first."""
    while function is not None:
        if isinstance(function, OurWrapper):
            yield function
        function = getattr(function, "__wrapped__", None)
