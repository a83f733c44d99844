"""``vllm serve`` and ``LLM``: weightlift's options on the command line and as keywords."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weightlift.compat.patch import Patch
from weightlift.patches import VLLM, arguments

_SERVE = "vllm.entrypoints.cli.serve"
_LLM = "vllm.entrypoints.llm"


def _subparser_init(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Add the options after the engine's own, whose definitions win."""
    parser = wrapped(*args, **kwargs)
    arguments.add_options(parser, "vllm")
    return parser


def _cmd(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Keep what was given, and let the engine have the rest."""
    namespace = args[0] if args else kwargs["args"]
    arguments.keep(arguments.parsed(namespace, "vllm"), "vllm")
    return wrapped(*args, **kwargs)


def _llm_init(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Take weightlift's keywords out, and start the engine with the others."""
    with arguments.put_back("vllm"):
        arguments.keep(arguments.taken_out(kwargs, "vllm"), "vllm")
        wrapped(*args, **kwargs)


_NOTES = {
    "upstream": "No plugin interface for flags.",
    "drop_when": "Plugins may declare flags.",
}

PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{_SERVE}:ServeSubcommand.subparser_init",
        versions=VLLM.versions,
        wrapper=_subparser_init,
        parameters=("subparsers",),
        why="`--model-loader-extra-config` takes two keys and refuses all others, so the engine's "
        "command line has no room for options of a plugin.",
        how="Adds a group to the parser of `vllm serve`.",
        **_NOTES,
    ),
    Patch(
        target=f"{_SERVE}:ServeSubcommand.cmd",
        versions=VLLM.versions,
        wrapper=_cmd,
        parameters=("args",),
        why="The engine makes its arguments of its own fields and drops the rest.",
        how="Puts weightlift's into the environment, which the processes of the engine inherit.",
        **_NOTES,
    ),
    Patch(
        target=f"{_LLM}:LLM.__init__",
        versions=VLLM.versions,
        wrapper=_llm_init,
        parameters=("kwargs",),
        why="`LLM` hands its keywords to `EngineArgs`, which refuses names that it does not know.",
        how="Takes weightlift's out and keeps them as the command line's, for this engine alone.",
        **_NOTES,
    ),
)
