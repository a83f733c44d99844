"""``vllm serve --omni``, ``Omni`` and ``AsyncOmni``: the options of vllm-omni's pull request 1504.

https://github.com/vllm-project/vllm-omni/pull/1504. From 0.18 the engine has two of the three flags.
What they say goes into the environment as well: 0.22 drops them on the way to registered pipelines,
0.14 and 0.16 have no fields for them.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.patches import VLLM_OMNI, arguments

_SERVE = "vllm_omni.entrypoints.cli.serve"
_ENGINE = "vllm_omni"
_SWITCH, _THREADS = "enable_multithread_weight_load", "num_weight_load_threads"
_THEIR_THREADS = 4
"""The engine's default, which cannot be told from a 4 that was given."""


def _cmd(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Keep what was given, and let the engine have the rest.

    Raises:
        ValueError: Loading by threads is asked to be on and off.
    """
    namespace: argparse.Namespace = args[0] if args else kwargs["args"]
    given = arguments.parsed(namespace, _ENGINE)
    _forget(namespace)
    theirs = _theirs(vars(namespace))
    if given.get("multithread_load") and "multithread_load" in theirs:
        raise ValueError(
            "--enable-multithread-weight-load and --disable-multithread-weight-load contradict "
            "each other"
        )
    arguments.keep({**theirs, **given}, _ENGINE)
    return wrapped(*args, **kwargs)


def _forget(namespace: argparse.Namespace) -> None:
    """Take weightlift's values off the list of what was given; the engine knows none of them."""
    explicit = getattr(namespace, "explicit_keys", None)
    if explicit is not None:
        ours = {key for key in explicit if key.startswith("weightlift_")}
        namespace.explicit_keys = explicit - ours


def _theirs(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the engine's own flags or keywords say, where they say more than its defaults."""
    given: dict[str, Any] = {}
    if values.get(_SWITCH) is False:
        given["multithread_load"] = False
    if values.get(_THREADS) not in (None, _THEIR_THREADS):
        given["num_load_threads"] = values[_THREADS]
    return given


def _omni_init(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Keep weightlift's keywords for the engine's processes, and start it with those it knows."""
    known = {name: kwargs[name] for name in (_SWITCH, _THREADS) if name in kwargs}
    with arguments.put_back(_ENGINE):
        arguments.keep(arguments.taken_out(kwargs, _ENGINE), _ENGINE)
        if _has_fields():
            kwargs.update(known)
        wrapped(*args, **kwargs)


def _init_stage_worker(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Start the process of a stage with what its YAML file says, unless it was said elsewhere.

    Raises:
        ValueError: A value makes no sense.
    """
    stage = instance.engine_args
    theirs = _theirs({name: stage.pop(name) for name in (_SWITCH, _THREADS) if name in stage})
    asked = context_of(_ENGINE).settings().asked
    with arguments.put_back(_ENGINE):
        given = {name: value for name, value in theirs.items() if name not in asked}
        arguments.keep(given, _ENGINE)
        wrapped(*args, **kwargs)


def _has_fields() -> bool:
    """Whether this release has these settings itself."""
    data = importlib.import_module("vllm_omni.diffusion.data")
    return hasattr(data.OmniDiffusionConfig, _THREADS)


_NOTES = {
    "upstream": "vllm-project/vllm-omni#1504 brought two of the three flags in 0.18.",
    "drop_when": "Plugins may declare flags.",
}

PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{_SERVE}:OmniServeCommand.subparser_init",
        versions=VLLM_OMNI.versions,
        wrapper=arguments.adding(_ENGINE),
        parameters=("subparsers",),
        why="No release has `--enable-multithread-weight-load`, 0.14 and 0.16 none of the flags.",
        how="Adds to the parser of `vllm serve --omni` those that it has not.",
        **_NOTES,
    ),
    Patch(
        target=f"{_SERVE}:OmniServeCommand.cmd",
        versions=VLLM_OMNI.versions,
        wrapper=_cmd,
        parameters=("args",),
        why="0.22 drops the flags on the way to pipelines of its registry, and 0.14 and 0.16 have "
        "no fields for them.",
        how="Puts them into the environment, which the processes of all stages inherit.",
        **_NOTES,
    ),
    Patch(
        target="vllm_omni.entrypoints.omni_stage:OmniStage.init_stage_worker",
        versions="<0.18",
        wrapper=_init_stage_worker,
        parameters=("model",),
        why="0.14 and 0.16 drop what a stage's YAML file says of the loading of weights.",
        how="Puts it into the environment in which the stage's process is started.",
        **_NOTES,
    ),
    *(
        Patch(
            target=f"vllm_omni.entrypoints.{module}:OmniBase.__init__",
            versions=versions,
            wrapper=_omni_init,
            parameters=("model", "kwargs"),
            why="`Omni` and `AsyncOmni` pass keywords on to where some are dropped or refused.",
            how="Keeps weightlift's as the command line's, for this engine alone.",
            **_NOTES,
        )
        for module, versions in (("omni", "<0.18"), ("omni_base", ">=0.18,<0.33"))
    ),
)
