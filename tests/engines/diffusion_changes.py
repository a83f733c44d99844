"""Changes a pipeline of SGLang Diffusion that is loaded: updates it from disk, lets it sleep.

Of a case:

sharded    true for modules that are taken to be sharded, and so are updated by the engine
python     true for updates by weightlift's Python call
updates    a list of: path; modules, if not all; unreadable, a component whose files cannot be read;
           early, true to write while the update is still planned; rank N, what is other on rank N
sleeps     a list of: update, a path to update from before; fails, true for a host without memory. After
           each the pipeline wakes up.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# mypy: disable-error-code="attr-defined, no-untyped-call, assignment"

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from engines.forked import state_hash
from weightlift import diffusion


def components_of(pipeline: Any) -> dict[str, Any]:
    """What was loaded: class, state and where it is, by component."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in sorted(pipeline.modules.items()):
        found[name] = {"class": f"{type(module).__module__}.{type(module).__qualname__}"}
        if isinstance(module, torch.nn.Module):
            parameters = list(module.parameters())
            found[name]["state"] = state_hash(module)
            found[name]["devices"] = sorted({str(item.device) for item in parameters})
            found[name]["kinds"] = sorted({type(item).__name__ for item in parameters})
            found[name]["gradients"] = sum(item.requires_grad for item in parameters)
            found[name]["nbytes"] = sum(item.nbytes for item in parameters)
            found[name]["training"] = module.training
    return found


def updater_of(pipeline: Any) -> Any:
    """The engine's own updater of weights."""
    runtime = "sglang.multimodal_gen.runtime"
    place = f"{runtime}.loader.weights_updater"
    if importlib.util.find_spec(place) is None:
        place = f"{runtime}.post_training.weights_updater"  # from 0.5.14 on
    return importlib.import_module(place).WeightsUpdater(pipeline)


def updated(pipeline: Any, case: dict[str, Any]) -> list[dict[str, Any]]:
    """What the engine says of each update of a case, and what the components hold then."""
    if case.get("python"):
        update_from = functools.partial(diffusion.update_weights_from_disk, pipeline)
    else:
        update_from = updater_of(pipeline).update_weights_from_disk
    if case.get("sharded"):
        from weightlift.patches.sglang_diffusion import modules, updates

        modules.is_sharded = updates.is_sharded = lambda _: True
    told = []
    for given in case["updates"]:
        update = {**given, **given.get(f"rank {torch.distributed.get_rank()}", {})}
        chosen = {"modules" if case.get("python") else "target_modules": update.get("modules")}
        folder = f"{update['path']}/{update['unreadable']}/" if "unreadable" in update else ""
        collected: list[int] = []
        with unreadable(folder), written_early(update.get("early")), noted_in(collected):
            done, message = update_from(update["path"], **chosen)
        found = {"collected": collected, "components": components_of(pipeline)}
        told.append({"done": done, "message": message, **found})
    return told


@contextlib.contextmanager
def noted_in(generations: list[int]) -> Iterator[None]:
    """Within this, garbage is collected where that is asked for alone, and how much of it is noted."""

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    gc.disable()
    gc.callbacks.append(note)
    try:
        yield
    finally:
        gc.callbacks.remove(note)
        gc.enable()


@contextlib.contextmanager
def unreadable(folder: str) -> Iterator[None]:
    """Within this, weightlift's readers fail at the files of a folder."""
    from weightlift.loading.files import ShardFile

    read = ShardFile.read_into

    def fail(file: ShardFile, offset: int, *args: Any, **kwargs: Any) -> None:
        if folder and file.path.startswith(folder) and offset > 1000:
            raise OSError(5, "injected", file.path)
        read(file, offset, *args, **kwargs)

    ShardFile.read_into = fail
    try:
        yield
    finally:
        ShardFile.read_into = read


@contextlib.contextmanager
def written_early(is_wanted: bool | None) -> Iterator[None]:
    """Within this, weightlift writes while it plans, as where a loader works with data."""
    from weightlift.loading.delivery import Delivery

    add = Delivery.add

    def open_and_add(delivery: Delivery, transfer: Any) -> None:
        add(delivery, transfer)
        delivery.open_gate()

    Delivery.add = open_and_add if is_wanted else add
    try:
        yield
    finally:
        Delivery.add = add


class Device(str):
    """A name of the CPU that the engine takes for that of a GPU."""

    def startswith(self, *_: Any) -> bool:
        return False


def slept(pipeline: Any, case: dict[str, Any]) -> list[dict[str, Any]]:
    """What the engine says of each sleep and wake-up, what components hold, and whether they moved."""
    from sglang.multimodal_gen.runtime.managers.memory_managers import memory_occupation_controller

    from weightlift.loading import sleep as core
    from weightlift.patches.sglang_diffusion import sleep

    memory_occupation_controller._get_module_device = lambda module: Device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.cpu.empty_cache = lambda: None
    sleep.Sleeper = functools.partial(core.Sleeper, "cpu")
    controller = memory_occupation_controller.MemoryOccupationController(pipeline, 0, False)
    told = []
    for case_of_one in case["sleeps"]:
        if "update" in case_of_one:
            assert updater_of(pipeline).update_weights_from_disk(case_of_one["update"])[0]
        before, was_at = components_of(pipeline), places_of(pipeline)
        available = core.available_memory
        core.available_memory = (lambda: 0) if case_of_one.get("fails") else available
        asleep: dict[str, Any] = {}
        try:
            asleep = controller.release_memory_occupation()
        except RuntimeError as error:
            asleep["error"] = str(error)
        core.available_memory = available
        stayed = len(places_of(pipeline) & was_at)
        kept = components_of(pipeline) == before and controller.is_sleeping() is not bool(
            case_of_one.get("fails")
        )
        awake = controller.resume_memory_occupation()
        told.append(
            {
                "asleep": asleep,
                "awake": awake,
                "stayed": stayed,
                "kept": kept and components_of(pipeline) == before,
                "components": before,
            }
        )
    return told


def places_of(pipeline: Any) -> set[int]:
    """Where the weights are."""
    modules = [item for item in pipeline.modules.values() if isinstance(item, torch.nn.Module)]
    return {item.data_ptr() for module in modules for item in module.parameters() if item.numel()}
