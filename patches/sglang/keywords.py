"""``sglang.Engine(...)``: weightlift's flags as keyword arguments."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.patches import SGLANG
from weightlift.patches.sglang.flags import keep

_MODULE = "sglang.srt.entrypoints.engine"


def _engine_init(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Take weightlift's keywords out, and start the engine with the others.

    They hold for this engine alone: the environment, by which its processes get them, is put back.
    """
    before = dict(os.environ)
    extra = keep(_taken_out(kwargs), kwargs.get("model_loader_extra_config"))
    if extra is not None and "server_args" not in kwargs:  # which come with a configuration
        kwargs["model_loader_extra_config"] = extra
    try:
        wrapped(*args, **kwargs)
    finally:
        for option in context_of("sglang").options:
            if option.env in before:
                os.environ[option.env] = before[option.env]
            else:
                os.environ.pop(option.env, None)


def _taken_out(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove weightlift's keywords; their values by option name. None says nothing.

    Raises:
        ValueError: A switch is asked to be on and off.
    """
    given: dict[str, Any] = {}
    for option in context_of("sglang").options:
        keywords = [flag[2:].replace("-", "_") for flag in option.flags.get("sglang", ())]
        values = [kwargs.pop(keyword, None) for keyword in keywords]
        if option.is_switch and keywords:
            on, off = values
            values = [None if on is None else bool(on), False if off else None]
        values = [value for value in values if value is not None]
        if len(set(values)) > 1:
            raise ValueError(f"{' and '.join(keywords)} contradict each other")
        if values:
            given[option.name] = values[0]
    return given


PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{_MODULE}:Engine.__init__",
        versions=SGLANG.versions,
        wrapper=_engine_init,
        parameters=("kwargs",),
        why="`Engine` hands its keywords to `ServerArgs`, which refuses names that it does not know.",
        how="Takes `enable_multithread_load`, `disable_multithread_load` and `num_load_threads` "
        "out and keeps them as the command line's.",
        upstream="No plugin interface for flags.",
        drop_when="Plugins may declare flags.",
    ),
)
