"""``sglang.Engine(...)``: weightlift's flags as keyword arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weightlift.compat.patch import Patch
from weightlift.patches import SGLANG, arguments
from weightlift.patches.sglang.flags import keep

_MODULE = "sglang.srt.entrypoints.engine"


def _engine_init(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Take weightlift's keywords out, and start the engine with the others.

    They hold for this engine alone: the environment, by which its processes get them, is put back.
    """
    with arguments.put_back("sglang"):
        given = arguments.taken_out(kwargs, "sglang")
        extra = keep(given, kwargs.get("model_loader_extra_config"))
        if extra is not None and "server_args" not in kwargs:  # which come with a configuration
            kwargs["model_loader_extra_config"] = extra
        wrapped(*args, **kwargs)


PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{_MODULE}:Engine.__init__",
        versions=SGLANG.versions,
        wrapper=_engine_init,
        parameters=("kwargs",),
        why="`Engine` hands its keywords to `ServerArgs`, which refuses names that it does not know.",
        how="Takes keywords that are named as flags of ours out, and keeps them as the command line's.",
        upstream="No plugin interface for flags.",
        drop_when="Plugins may declare flags.",
    ),
)
