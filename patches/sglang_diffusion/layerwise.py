"""Components whose layers wait on the host, in page-locked memory that several threads make."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from weightlift.compat.context import context_of
from weightlift.compat.patch import Patch
from weightlift.loading.budget import reader_count
from weightlift.loading.host_supply import HostSupply, Supplied

_RUNTIME = "sglang.multimodal_gen.runtime"


def _initialize(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Have the engine move layers to memory that was page-locked beside what it copies."""
    if not (context_of("sglang").settings().parallel_module_load and _is_page_locked(instance)):
        return wrapped(*args, **kwargs)
    supply = HostSupply(instance.device, reader_count(), most=instance.num_layers)
    release = weakref.finalize(instance, supply.release)
    release.atexit = False
    with supply, Supplied(supply):
        return wrapped(*args, **kwargs)


def _is_page_locked(manager: Any) -> bool:
    """Whether the engine is going to ask for memory that a CUDA device copies from."""
    return bool(manager.enabled and manager.pin_cpu_memory and manager.device.type == "cuda")


PATCHES: tuple[Patch, ...] = tuple(
    Patch(
        target=f"{_RUNTIME}.{module}:LayerwiseOffloadManager.{method}",
        versions=versions,
        wrapper=_initialize,
        parameters=("self",),
        why="The host's memory for each layer is page-locked when it is asked for, one after the other, "
        "at 2 GB/s, and rounded up to a power of two: 8 s for the 15 GB of Qwen-Image's encoder.",
        how="With `--enable-parallel-module-load` layers get memory of exact size; threads make that of "
        "the next ones while the engine copies.",
        upstream="Since 0.5.20 the engine page-locks memory of exact size itself.",
        drop_when="Releases before 0.5.20 are not supported any more.",
    )
    for module, method, versions in (
        ("utils.layerwise_offload", "_initialize", ">=0.5.7,<0.5.11"),
        ("managers.layerwise_offload", "_initialize", ">=0.5.11,<0.5.13"),
        ("managers.memory_managers.layerwise_offload", "_initialize", ">=0.5.13,<0.5.19"),
        (
            "managers.memory_managers.layerwise_offload",
            "_initialize_layer_weights",
            ">=0.5.19,<0.5.20",
        ),
    )
)
