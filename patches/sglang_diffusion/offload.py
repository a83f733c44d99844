"""Encoders that FSDP keeps on the host: read to page-locked memory, and wrapped where they are.

From 0.5.8 to 0.5.17 the engine builds and fills them on the host. Then FSDP brings each parameter to the
GPU, copies it there, brings it back and page-locks a copy of that, in the end one in memory that is rounded
up to a power of two. What FSDP is given without data, it leaves for others to fill: it takes what it finds
when the model first runs (``FSDPParam.reset_sharded_param`` in torch).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from weightlift.compat.patch import Patch
from weightlift.loading.budget import reader_count
from weightlift.loading.host_parameters import move_parameters
from weightlift.loading.report import human
from weightlift.loading.session import NamedWeights, active_session
from weightlift.patches.shadow import shadowed

logger = logging.getLogger("weightlift")

_LOADER = "sglang.multimodal_gen.runtime.loader"


def _load_model(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Have an encoder that is going to be page-locked be read to such memory."""
    if active_session() is None:
        return wrapped(*args, **kwargs)
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    is_wrapped = instance.should_offload(call["server_args"], call["model_config"])
    device = _locked_for(call["server_args"])
    if device is None or not is_wrapped or call.get("cpu_offload_flag") is False:
        return wrapped(*args, **kwargs)
    with shadowed(instance, "_get_all_weights", _Moved(device)):
        return wrapped(*args, **kwargs)


def _locked_for(server_args: Any) -> torch.device | None:
    """The device that copies from the host's memory, if that is to be page-locked."""
    if not (server_args.pin_cpu_memory and torch.cuda.is_available()):
        return None
    return torch.device("cuda", torch.cuda.current_device())


class _Moved:
    """Moves a model that was built, before its weights are asked for.

    Args:
        device: What copies from the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(
        self, original: Callable[..., NamedWeights], model: Any, *args: Any, **kwargs: Any
    ) -> NamedWeights:
        """In place of the loader's own ``_get_all_weights``."""
        try:
            moved = move_parameters(model, self._device, reader_count())
            if moved:  # it is on the host
                logger.info(
                    "weightlift: %s stays on the host, in %s of page-locked memory",
                    *(type(model).__name__, human(moved)),
                )
        except OSError as error:
            logger.warning(
                "weightlift: no page-locked memory for %s (%s); FSDP makes its own",
                *(type(model).__name__, error),
            )
        return original(model, *args, **kwargs)


def _shard_model(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Have FSDP wrap a model on the host without its data, which is handed to it afterwards."""
    if active_session() is None:
        return wrapped(*args, **kwargs)
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    model, mesh = call["model"], call.get("mesh")
    is_whole = mesh is not None and mesh.size() == 1
    is_on_host = all(item.device.type == "cpu" for item in model.parameters())
    if not (call["cpu_offload"] and is_whole and is_on_host):
        return wrapped(*args, **kwargs)
    is_locked = call.get("pin_cpu_memory", True) and torch.cuda.is_available()
    places = _Places(model, is_locked=is_locked)
    places.empty()
    try:
        result = wrapped(*args, **kwargs)
    except BaseException:
        places.restore()
        raise
    places.fill()
    return result


class _Places:
    """Where a model has its parameters, and what they are.

    Args:
        model: Its parameters are on the host, and it is not wrapped yet.
        is_locked: Whether they are to be page-locked.
    """

    def __init__(self, model: torch.nn.Module, *, is_locked: bool) -> None:
        self._places = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._is_locked = is_locked
        self._used: set[int] = set()

    def empty(self) -> None:
        """Put parameters without data in their place; tied ones stay tied."""
        made: dict[int, torch.nn.Parameter] = {}
        for module, name, parameter in self._places:
            if id(parameter) not in made:
                meta = torch.empty_like(parameter, device="meta")
                made[id(parameter)] = torch.nn.Parameter(meta, parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]

    def restore(self) -> None:
        """Put the parameters where they were."""
        for module, name, parameter in self._places:
            module._parameters[name] = parameter

    def fill(self) -> None:
        """Give what was wrapped the data that was there; what was not is what it was."""
        made: dict[int, torch.nn.Parameter] = {}
        for module, name, parameter in self._places:
            now = module._parameters[name]
            if not isinstance(now, DTensor):
                module._parameters[name] = parameter
                continue
            if id(now) not in made:
                made[id(now)] = self._wrapped(now, parameter)
            module._parameters[name] = made[id(now)]

    def _wrapped(self, wrapped: DTensor, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        """What FSDP makes itself of a parameter that has data."""
        with torch._C.DisableTorchFunction():  # what is under way may arrive later
            local = parameter.detach()
            is_done = local.is_pinned() or not self._is_locked
        if id(parameter) in self._used:  # FSDP unties what is in two of its groups
            local, is_done = local.clone(), not self._is_locked
        self._used.add(id(parameter))
        if not is_done:  # it could not be moved
            local = local.pin_memory()
        tensor: Any = DTensor(local, wrapped._spec, requires_grad=False)  # type: ignore[no-untyped-call]
        return torch.nn.Parameter(tensor, wrapped.requires_grad)


_NOTES = {
    "why": "FSDP brings each parameter of an encoder that stays on the host to the GPU and back, and "
    "page-locks a copy: 35 of the 43 s in which Qwen-Image loads with one.",
    "upstream": "Since 0.5.18 the engine does not wrap encoders for that.",
    "drop_when": "Releases before 0.5.18 are not supported any more.",
}

PATCHES: tuple[Patch, ...] = (
    *(
        Patch(
            target=f"{_LOADER}.{module}:TextEncoderLoader.load_model",
            versions=versions,
            wrapper=_load_model,
            parameters=("model_config", "server_args", "cpu_offload_flag"),
            how="Within a planned load its parameters get page-locked memory of exact size as soon as it "
            "is built; readers fill that.",
            **_NOTES,
        )
        for module, versions in (
            ("component_loader", ">=0.5.8,<0.5.9"),
            ("component_loaders.text_encoder_loader", ">=0.5.9,<0.5.18"),
        )
    ),
    Patch(
        target=f"{_LOADER}.fsdp_load:shard_model",
        versions=">=0.5.8,<0.5.18",
        wrapper=_shard_model,
        parameters=("model", "cpu_offload", "mesh"),
        how="Within a planned load a model on the host is wrapped on the meta device, and gets its "
        "parameters back as FSDP would have made them.",
        **_NOTES,
    ),
)
