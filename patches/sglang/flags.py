"""``ServerArgs``: weightlift's options on the engine's own command line, and in its ``--help``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from weightlift.compat.patch import Patch
from weightlift.patches import SGLANG, arguments

_MODULE = "sglang.srt.server_args"


def _from_cli_args(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Keep what was given, and let the engine have the rest."""
    namespace: argparse.Namespace = args[0] if args else kwargs["args"]
    given = arguments.parsed(namespace, "sglang")
    extra = keep(given, getattr(namespace, "model_loader_extra_config", None))
    if extra is not None:
        namespace.model_loader_extra_config = extra
    return wrapped(*args, **kwargs)


def keep(given: Mapping[str, Any], extra_config: Any) -> Any:
    """Hand settings to every process that loads.

    Args:
        given: Values by option name, switches as bool.
        extra_config: The engine's ``model_loader_extra_config``: JSON, a dict, or None.

    Returns:
        The ``model_loader_extra_config`` to go on with. Switching off means the engine's own
        threads too, which are on by default from 0.5.10.

    Raises:
        ValueError: A value makes no sense, or contradicts ``extra_config``.
    """
    extra_config = _agreeing(given.get("multithread_load"), extra_config)
    arguments.keep(given, "sglang")
    return extra_config


def _agreeing(switch: bool | None, extra_config: Any) -> Any:
    """The engine's own configuration, made to agree with the switch if that was given."""
    if switch is None:
        return extra_config
    config = (
        json.loads(extra_config or "{}") if not isinstance(extra_config, dict) else extra_config
    )
    if not isinstance(config, dict):
        raise ValueError(f"model_loader_extra_config must be a JSON object, not {extra_config}")
    if config.get("enable_multithread_load", switch) != switch:
        raise ValueError(
            f"--{'enable' if switch else 'disable'}-multithread-load contradicts "
            f"--model-loader-extra-config {extra_config}: leave one of them out"
        )
    if switch:
        return extra_config
    config = {**config, "enable_multithread_load": False}
    return config if isinstance(extra_config, dict) else json.dumps(config)


PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{_MODULE}:ServerArgs.add_cli_args",
        versions=SGLANG.versions,
        wrapper=arguments.adding("sglang"),
        parameters=("parser",),
        why="`--model-loader-extra-config` takes two keys and refuses all others, so the engine's "
        "command line has no room for options of a plugin.",
        how="Adds a group to the parser that `launch_server` and `sglang serve` fill.",
        upstream="No plugin interface for flags.",
        drop_when="Plugins may declare flags.",
    ),
    Patch(
        target=f"{_MODULE}:ServerArgs.from_cli_args",
        versions=SGLANG.versions,
        wrapper=_from_cli_args,
        parameters=("args",),
        why="It copies the engine's own fields and drops the rest.",
        how="Puts weightlift's into the environment, which the spawned processes inherit.",
        upstream="No plugin interface for flags.",
        drop_when="Plugins may declare flags.",
    ),
)
