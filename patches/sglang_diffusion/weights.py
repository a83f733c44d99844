"""How the loaders of SGLang Diffusion come by weights: lazily, within a planned load."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch

from weightlift.compat.patch import Patch
from weightlift.loading.errors import CheckpointError, PlanAborted
from weightlift.loading.lazy import LazyTensor
from weightlift.loading.leftovers import adopt_lazy
from weightlift.loading.session import NamedWeights, active_session
from weightlift.patches import SGLANG_DIFFUSION
from weightlift.patches.planned import ITERATOR_NOTES
from weightlift.patches.sglang_diffusion.pipeline_load import current_load
from weightlift.patches.shadow import shadowed

_LOADER = "sglang.multimodal_gen.runtime.loader"
_DISTRIBUTED = "sglang.multimodal_gen.runtime.distributed"


def _iterator(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> NamedWeights:
    """Lazy tensors within a planned load, said to be where the stock iterator would bring them."""
    session = active_session()
    if session is None:
        yield from wrapped(*args, **kwargs)
        return
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    _is_read(call["hf_weights_files"])
    try:
        checkpoint = session.open(call["hf_weights_files"])
    except CheckpointError as error:
        session.report.plan_note = str(error)
        raise
    names = [entry.name for entry in checkpoint.entries()]
    if len(set(names)) < len(names):
        raise session.abort(PlanAborted("several of its files have a tensor of the same name"))
    is_wanted = call.get("key_filter") or bool
    wanted = {name for name in names if is_wanted(name)}
    yield from session.lazies(checkpoint, wanted, _device(wrapped, call))


def _is_read(files: Iterable[str]) -> None:
    """Nobody has to bring these into the page cache."""
    pipeline = current_load()
    if pipeline is not None:
        pipeline.ahead.drop(files)


def _maybe_load_fsdp_model(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Begin to read what the model is going to be made of while it is built on the meta device."""
    session = active_session()
    if session is None:
        return wrapped(*args, **kwargs)
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    device, files = _assigned_on(call), call["weight_dir_list"]
    dtype = call.get("default_dtype") or call["param_dtype"]  # the former up to 0.5.8
    if device is not None and dtype is not None and session.begin(files, device, dtype):
        _is_read(files)
        if (pipeline := current_load()) is not None:
            pipeline.device = device
    return wrapped(*args, **kwargs)


def _assigned_on(call: dict[str, Any]) -> torch.device | None:
    """The device on which tensors of the files become parameters as they are; None if they may not."""
    plan = call.get("weight_load_plan")
    device = torch.device(plan.checkpoint_load_device if plan is not None else call["device"])
    if any(call.get(name) for name in _NOT_ASSIGNED) or _stay_mapped(device):
        return None
    is_alone = importlib.import_module(_DISTRIBUTED).get_tp_world_size() == 1
    return device if is_alone and call["weight_dir_list"] else None


_NOT_ASSIGNED = (
    *("fsdp_inference", "cpu_offload", "component_starts_on_cpu"),
    *("weights_iterator", "checkpoint_key_filter"),
)
"""Arguments with which tensors are sharded, go on to the host, or are not all of the files'."""


def _device(iterator: Callable[..., Any], call: dict[str, Any]) -> torch.device:
    """Where the stock iterator would bring the tensors."""
    plan = call.get("weight_load_plan")
    if plan is not None:
        return torch.device(plan.checkpoint_load_device)
    if call.get("to_cpu", True):
        return torch.device("cpu")
    return torch.device(iterator.__globals__["get_local_torch_device"]())


def _load_full_state_dict(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Have every parameter filled before the engine works with them."""
    session = active_session()
    if session is None:
        return wrapped(*args, **kwargs)
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    if _stay_mapped(call.get("checkpoint_load_device")):
        raise session.abort(PlanAborted("its weights stay on the host, mapped"))
    if is_sharded(call["model"]):
        raise session.abort(PlanAborted(SHARDED))
    model = call["model"]
    with shadowed(model, "load_state_dict", _unwatched) if _only_assigns(model) else nullcontext():
        result = wrapped(*args, **kwargs)
    adopt_lazy(model)
    if (pipeline := current_load()) is not None:
        pipeline.begin_next()  # all of this model has been asked for
    session.flush()
    return result


def _unwatched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Of what looks at no data the guard need not be told, a dozen times for each tensor."""
    with torch._C.DisableTorchFunction():
        return function(*args, **kwargs)


def _only_assigns(model: torch.nn.Module) -> bool:
    """Whether all that ``load_state_dict`` does with the parameters that it is given is to take them."""
    return all(
        type(module)._load_from_state_dict is torch.nn.Module._load_from_state_dict
        and not module._load_state_dict_pre_hooks
        and not module._load_state_dict_post_hooks
        for module in model.modules()
    )


SHARDED = "FSDP shards its parameters"


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether parameters are DTensors, which take whole tensors apart in ways of their own."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def _stay_mapped(device: torch.device | None) -> bool:
    """Whether the weights stay on the host beside a GPU: from 0.5.18 on, as the file's pages."""
    return device is not None and device.type == "cpu" and torch.cuda.is_available()


def _make_param_like(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Give a lazy tensor memory of its own before it becomes a parameter of the right class."""
    parameter, tensor = args
    if isinstance(tensor, LazyTensor):
        tensor = tensor.source.recorder.land(tensor)
    return _unwatched(wrapped, parameter, tensor)


def _load_file(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The tensors of a file, lazily within a planned load."""
    session = active_session()
    if session is None or len(args) != 1 or kwargs:
        return wrapped(*args, **kwargs)
    return dict(session.iterate(args))


_STATE_DICT_NOTES = {
    "why": "The transformer is built on the meta device and gets parameters made of what it is offered.",
    "how": "Within a planned load such parameters get memory on their device, which readers fill; "
    "all are filled before the engine goes on.",
    "upstream": "Nothing is proposed.",
    "drop_when": "The engine's own loader reads at the speed of the hardware.",
}

_FILE_NOTES = {
    "why": "It reads the whole file into pageable memory.",
    "how": "Within a planned load it gives lazy tensors.",
    "upstream": "From 0.5.20 on the engine's loader of VAEs takes the iterator.",
    "drop_when": "Releases before 0.5.20 are not supported any more.",
}

PATCHES: tuple[Patch, ...] = (
    *(
        Patch(
            target=f"{_LOADER}.{module}:safetensors_load_file",
            versions=versions,
            wrapper=_load_file,
            parameters=("filename",),
            **_FILE_NOTES,
        )
        for module, versions in (
            ("component_loader", ">=0.5.7,<0.5.9"),
            ("component_loaders.vae_loader", ">=0.5.9,<0.5.19"),
        )
    ),
    Patch(
        target=f"{_LOADER}.weight_utils:safetensors_weights_iterator",
        versions=SGLANG_DIFFUSION,
        wrapper=_iterator,
        parameters=("hf_weights_files",),
        **{**ITERATOR_NOTES, "upstream": "sgl-project/sglang#34064 reads slices of a rank."},
    ),
    Patch(
        target=f"{_LOADER}.fsdp_load:maybe_load_fsdp_model",
        versions=SGLANG_DIFFUSION,
        wrapper=_maybe_load_fsdp_model,
        parameters=("weight_dir_list", "device", "param_dtype"),
        why="While the transformer is built nothing is read, though its parameters are going to be "
        "what the files hold.",
        how="Within a planned load tensors that become parameters as they are, on one tensor-parallel "
        "rank, are read to memory of their own meanwhile; the loader gets that where it would make some.",
        upstream="Nothing is proposed.",
        drop_when="The engine's own loader reads while it builds.",
    ),
    Patch(
        target=f"{_LOADER}.fsdp_load:load_model_from_full_model_state_dict",
        versions=SGLANG_DIFFUSION,
        wrapper=_load_full_state_dict,
        parameters=("model",),
        **_STATE_DICT_NOTES,
    ),
    Patch(
        target=f"{_LOADER}.fsdp_load:_make_param_like",
        versions=">=0.5.8,<0.5.24",
        wrapper=_make_param_like,
        parameters=("actual_param", "tensor"),
        **_STATE_DICT_NOTES,
    ),
)
