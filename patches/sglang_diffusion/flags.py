"""weightlift's options on the command line of SGLang Diffusion and among the keywords of its API.

``sglang generate`` and ``sglang serve`` of a diffusion model fill a parser of their own.
"""

from __future__ import annotations

from weightlift.compat.patch import Patch
from weightlift.patches import DIFFUSION, SGLANG_DIFFUSION, arguments

_OLD = "sglang.multimodal_gen.runtime.server_args"
_NEW = "sglang.multimodal_gen.runtime.server_args.server_args"
_API = "sglang.multimodal_gen.runtime.entrypoints.diffusion_generator"


def _records(module: str, versions: str) -> tuple[Patch, ...]:
    return (
        Patch(
            target=f"{module}:ServerArgs.add_cli_args",
            versions=versions,
            wrapper=arguments.adding(DIFFUSION),
            parameters=("parser",),
            why="The engine's command line has no room for options of a plugin.",
            how="Adds a group to the parser that `sglang generate` and `sglang serve` fill.",
            upstream="No plugin interface for flags.",
            drop_when="Plugins may declare flags.",
        ),
        Patch(
            target=f"{module}:ServerArgs.from_cli_args",
            versions=versions,
            wrapper=arguments.keeping(DIFFUSION),
            parameters=("args",),
            why="It refuses what is not a field of the engine's.",
            how="Puts weightlift's into the environment, which the spawned processes inherit.",
            upstream="No plugin interface for flags.",
            drop_when="Plugins may declare flags.",
        ),
    )


PATCHES: tuple[Patch, ...] = (
    *_records(_OLD, ">=0.5.7,<0.5.16"),
    *_records(_NEW, ">=0.5.16,<0.5.24"),
    Patch(
        target=f"{_API}:DiffGenerator.from_pretrained",
        versions=SGLANG_DIFFUSION,
        wrapper=arguments.taking_keywords(DIFFUSION),
        parameters=("kwargs",),
        why="`DiffGenerator` hands its keywords to `ServerArgs`, which refuses those it does not know.",
        how="Takes weightlift's out and keeps them as the command line's.",
        upstream="No plugin interface for flags.",
        drop_when="Plugins may declare flags.",
    ),
)
