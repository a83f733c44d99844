"""``sglang.Engine(...)``: weightlift's flags as keyword arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.patches.sglang.flags import keep

_MODULE = "sglang.srt.entrypoints.engine"


def _engine_init(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Take weightlift's keywords out, and start the engine with the others."""
    given: dict[str, Any] = {}
    for option in context_of("sglang").options:
        for position, flag in enumerate(option.flags.get("sglang", ())):
            keyword = flag.removeprefix("--").replace("-", "_")
            if keyword in kwargs:
                value = kwargs.pop(keyword)
                given[option.name] = bool(value) == (position == 0) if option.is_switch else value
    extra = keep(given, kwargs.get("model_loader_extra_config"))
    if extra is not None:
        kwargs["model_loader_extra_config"] = extra
    wrapped(*args, **kwargs)


PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{_MODULE}:Engine.__init__",
        versions=">=0.4.9.post2,<0.5.24",
        wrapper=_engine_init,
        parameters=("kwargs",),
        why="`Engine` hands its keywords to `ServerArgs`, which refuses names that it does not know.",
        how="Takes `enable_multithread_load`, `disable_multithread_load` and `num_load_threads` "
        "out and keeps them as the command line's.",
        upstream="No plugin interface for flags.",
        drop_when="Plugins may declare flags.",
    ),
)
