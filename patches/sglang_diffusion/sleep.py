"""Sleep and wake-up of a diffusion pipeline, by host memory that is kept and copies that are few."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, Final

import torch

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.sleep import Sleeper

_MODULE = "sglang.multimodal_gen.runtime.managers.memory_managers.memory_occupation_controller"

ENGINES_OWN = "_offload_weight_snapshot"
"""Where the engine, from 0.5.20 on, keeps the host's copy of a component that it offloads by itself."""

_sleepers: Final[weakref.WeakKeyDictionary[Any, Sleeper]] = weakref.WeakKeyDictionary()
"""By the engine's controller of a pipeline."""


def _move_modules(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Move weights and buffers, then have the engine move what else components hold."""
    if not context_of("sglang").settings().parallel_module_load:
        return wrapped(*args, **kwargs)
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    if instance not in _sleepers:
        _sleepers[instance] = Sleeper()
    sleeper = _sleepers[instance]
    if not call["device"].startswith("cpu"):
        sleeper.wake_up()
        return wrapped(*args, **kwargs)
    modules: dict[str, torch.nn.Module] = wrapped.__globals__["get_updatable_modules"](
        instance.pipeline
    )
    named = {
        name: modules[name] for name in call["names"] if ENGINES_OWN not in vars(modules[name])
    }
    sleeper.sleep(named)
    try:
        return wrapped(*args, **kwargs)
    except BaseException:
        sleeper.wake_up()  # the engine takes them for awake
        raise


PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{_MODULE}:MemoryOccupationController._move_modules",
        versions=">=0.5.15,<0.5.24",
        wrapper=_move_modules,
        parameters=("names", "device"),
        why="Every sleep copies every weight to the host, into page-locked memory that is made anew and "
        "rounded up to a power of two (up to 0.5.16: pageable memory), and tied weights come back apart.",
        how="With `--enable-parallel-module-load` weights move to host memory of exact size that is kept "
        "from one sleep to the next, and only what changed since is copied again.",
        upstream="sgl-project/sglang#19090 is open.",
        drop_when="The engine keeps its host copies between sleeps.",
    ),
)
