"""``vllm serve`` and ``LLM``: weightlift's options on the command line and as keywords."""

from __future__ import annotations

from weightlift.compat.patch import Patch
from weightlift.patches import VLLM, arguments

_SERVE = "vllm.entrypoints.cli.serve"
_LLM = "vllm.entrypoints.llm"


_NOTES = {
    "upstream": "No plugin interface for flags.",
    "drop_when": "Plugins may declare flags.",
}

PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{_SERVE}:ServeSubcommand.subparser_init",
        versions=VLLM.versions,
        wrapper=arguments.adding("vllm"),
        parameters=("subparsers",),
        why="`--model-loader-extra-config` takes two keys and refuses all others, so the engine's "
        "command line has no room for options of a plugin.",
        how="Adds a group to the parser of `vllm serve`.",
        **_NOTES,
    ),
    Patch(
        target=f"{_SERVE}:ServeSubcommand.cmd",
        versions=VLLM.versions,
        wrapper=arguments.keeping("vllm"),
        parameters=("args",),
        why="The engine makes its arguments of its own fields and drops the rest.",
        how="Puts weightlift's into the environment, which the processes of the engine inherit.",
        **_NOTES,
    ),
    Patch(
        target=f"{_LLM}:LLM.__init__",
        versions=VLLM.versions,
        wrapper=arguments.taking_keywords("vllm"),
        parameters=("kwargs",),
        why="`LLM` hands its keywords to `EngineArgs`, which refuses names that it does not know.",
        how="Takes weightlift's out and keeps them as the command line's, for this engine alone.",
        **_NOTES,
    ),
)
