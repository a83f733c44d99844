"""Every option, once. From here come the engines' flags, the variables, the YAML keys and the docs.

Precedence: flag, then environment, then the YAML file that ``WEIGHTLIFT_CONFIG`` names, then the
default. A flag becomes the environment variable, for engines spawn the processes that load.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from weightlift.compat.context import Option
from weightlift.hooks.values import file, one_of, picture, switch, whole

if TYPE_CHECKING:
    from weightlift.loading.settings import Settings

CONFIG_ENV = "WEIGHTLIFT_CONFIG"
MOST_READERS = 256
MOST_STAGING_MIB = 1 << 20
MOST_STAGE_GIB = 1 << 16


_mode = one_of("auto", "on", "off")


OPTIONS: tuple[Option, ...] = (
    Option(
        name="multithread_load",
        parse=switch,
        env="WEIGHTLIFT_MULTITHREAD_LOAD",
        help="Load weights with weightlift's readers. On once weightlift is installed; given on "
        "purpose, a load that must fall back to the engine's own loader is an error.",
        flags={
            "sglang": ("--enable-multithread-load", "--disable-multithread-load"),
            **dict.fromkeys(
                ("vllm", "vllm_omni"),
                ("--enable-multithread-weight-load", "--disable-multithread-weight-load"),
            ),
        },
        is_switch=True,
    ),
    Option(
        name="fast_load",
        parse=switch,
        env="WEIGHTLIFT_FAST_LOAD",
        help="Plan loads from one layer of each kind and samples of others, instead of every tensor, "
        "where the architecture is known. Off unless asked for.",
        flags={"sglang": ("--enable-fast-load", "--disable-fast-load")},
        is_switch=True,
    ),
    Option(
        name="parallel_module_load",
        parse=switch,
        env="WEIGHTLIFT_PARALLEL_MODULE_LOAD",
        help="In SGLang Diffusion, load the components of a pipeline with weightlift's readers, which "
        "read the next ones while the engine builds one. Updates from disk and sleep go through weightlift too. Off unless asked for.",
        flags={
            "sglang.multimodal_gen": (
                "--enable-parallel-module-load",
                "--disable-parallel-module-load",
            )
        },
        is_switch=True,
    ),
    Option(
        name="num_load_threads",
        parse=lambda text: whole(text, 1, MOST_READERS),
        env="WEIGHTLIFT_NUM_LOAD_THREADS",
        help="Readers of each process that loads with weightlift; asks for no such load by itself. "
        "Default: what the engine's own configuration says, unless that is its default too, else "
        "one a core of its share, from 2 to 12.",
        flags={
            "sglang": ("--num-load-threads",),
            "sglang.multimodal_gen": ("--num-load-threads",),
            "vllm": ("--num-weight-load-threads",),
            "vllm_omni": ("--num-weight-load-threads",),
        },
        metavar="N",
    ),
    Option(
        name="readers",
        parse=one_of("auto", "processes", "threads"),
        env="WEIGHTLIFT_READERS",
        help="What reads files: processes, which do not compete with the engine for Python's "
        "interpreter lock; threads; or auto, processes for loads to a GPU. Default: auto.",
        metavar="KIND",
    ),
    Option(
        name="staging_mib",
        parse=lambda text: whole(text, 16, MOST_STAGING_MIB),
        env="WEIGHTLIFT_STAGING_MIB",
        help="Most host memory in MiB for bytes in flight to one device. Default: 256.",
        metavar="MIB",
    ),
    Option(
        name="stage_gib",
        parse=lambda text: whole(text, 0, MOST_STAGE_GIB),
        env="WEIGHTLIFT_STAGE_GIB",
        help="Host memory in GiB that each rank may take to read the next checkpoint while "
        "generation goes on, when POST /stage_weights asks for it. Default: 0, no staging.",
        flags={"sglang": ("--weight-stage-gib",)},
        metavar="GIB",
    ),
    Option(
        name="shared_gib",
        parse=lambda text: whole(text, 0, MOST_STAGE_GIB),
        env="WEIGHTLIFT_SHARED_GIB",
        help="GiB of files in shared memory (/dev/shm) that each rank may keep page-locked from one load "
        "to the next, for trainers that write each checkpoint over the last one: GPUs then copy from "
        "there, and nothing is read. Default: 0, none.",
        flags={"sglang": ("--weight-shared-gib",)},
        metavar="GIB",
    ),
    Option(
        name="stage_watch",
        parse=file,
        env="WEIGHTLIFT_STAGE_WATCH",
        help="Stage new checkpoints of this directory as they appear, for trainers that cannot ask. "
        "Needs --weight-stage-gib.",
        flags={"sglang": ("--weight-stage-watch",)},
        metavar="DIR",
    ),
    Option(
        name="direct_io",
        parse=_mode,
        env="WEIGHTLIFT_DIRECT_IO",
        help="Read files past the page cache: on, off, or auto for what is not cached, on a local "
        "filesystem. Default: auto.",
        metavar="MODE",
    ),
    Option(
        name="exchange",
        parse=_mode,
        env="WEIGHTLIFT_EXCHANGE",
        help="Have the ranks of one host each read a part of the checkpoint and pass it on over "
        "NVLink: auto for GPUs where that reads less, on also elsewhere, off. Where they cannot, each "
        "reads for itself, and the report says why. Default: auto.",
        flags={"sglang": ("--weight-exchange",)},
        metavar="MODE",
    ),
    Option(
        name="report",
        parse=file,
        env="WEIGHTLIFT_REPORT",
        help="Append one JSON line a load to this file.",
        metavar="FILE",
    ),
    Option(
        name="load_timeline",
        parse=picture,
        env="WEIGHTLIFT_LOAD_TIMELINE",
        help="Write when each load and each of its shards was read to this file, ending in .html, .png "
        "or .json. Pictures come when no load has ended for three seconds.",
        flags=dict.fromkeys(
            ("sglang", "sglang.multimodal_gen", "vllm", "vllm_omni"), ("--load-timeline",)
        ),
        metavar="FILE",
    ),
    Option(
        name="untested_versions",
        parse=switch,
        env="WEIGHTLIFT_UNTESTED_VERSIONS",
        help="Patch engine versions that this weightlift was not tested with.",
        is_switch=True,
    ),
)


class OptionError(ValueError):
    """A setting that makes no sense; the message says where it was given and what is allowed."""


def settings(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings that hold now.

    Args:
        environ: The environment; that of the process if left out.

    Raises:
        OptionError: A variable or a YAML key makes no sense, or the YAML file cannot be read.
    """
    # Imported here: this module is imported as soon as an engine is, the core only for a load.
    from weightlift.loading.settings import Settings

    environ = os.environ if environ is None else environ
    given = _from_yaml(environ.get(CONFIG_ENV, ""))
    for option in OPTIONS:
        if environ.get(option.env):
            given[option.name] = _parse(option, environ[option.env], option.env)
    assert given.keys() <= {item.name for item in fields(Settings)}
    if given.get("stage_watch") and not given.get("stage_gib"):
        raise OptionError(
            f"stage_watch={given['stage_watch']!r} has no memory to stage to: give stage_gib "
            "(--weight-stage-gib, WEIGHTLIFT_STAGE_GIB) too"
        )
    return Settings(**given, asked=frozenset(given))


def insists_on(name: str) -> bool:
    """Whether the user asked for what this switch turns on, rather than it being on by default."""
    try:
        found = settings()
    except OptionError:  # told where the load starts
        return False
    return name in found.asked and getattr(found, name) is True


def _from_yaml(path: str) -> dict[str, Any]:
    if not path:
        return {}
    import yaml

    try:
        with open(path) as file:
            content = yaml.safe_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OptionError(f"{CONFIG_ENV}={path}: cannot read it: {error}") from error
    known = {option.name: option for option in OPTIONS}
    if not isinstance(content, dict):
        raise OptionError(f"{path}: must map keys to values; the keys are {', '.join(known)}")
    if unknown := [str(key) for key in content if key not in known]:
        raise OptionError(
            f"{path}: unknown key {', '.join(unknown)}; the keys are {', '.join(known)}"
        )
    return {
        name: _parse(known[name], _word(value), f"{path}: {name}")
        for name, value in content.items()
        if value is not None
    }


def _word(value: Any) -> str:
    """What was written; to YAML, a bare ``on`` is the same as ``true``."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _parse(option: Option, text: str, where: str) -> Any:
    try:
        return option.parse(text)
    except ValueError as error:
        raise OptionError(f"{where}={text!r} {error}") from error
