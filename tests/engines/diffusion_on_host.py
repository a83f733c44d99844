"""Components that SGLang Diffusion keeps on the host beside a GPU, on a machine without one."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# mypy: disable-error-code="attr-defined, no-untyped-call, assignment"

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import types
from typing import Any

import torch


class NoDevice:
    """In place of ``torch.cuda``, its streams and events: there is nothing to wait for."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: 0 if name == "current_device" else self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class TorchOnCpu:
    """torch for a module of the engine that takes a CUDA device for granted."""

    cuda = NoDevice()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def get_device_module(self) -> NoDevice:
        return self.cuda

    def device(self, *_: object) -> torch.device:
        return torch.device("cpu")


def move_layers(transformer: Any, arguments: Any, is_stock: bool) -> dict[str, Any]:
    """Have the engine move the layers of a transformer to the host; what is there then."""
    runtime = "sglang.multimodal_gen.runtime."
    (module,) = [
        module
        for name, module in sys.modules.items()
        if name.startswith(runtime) and name.endswith(".layerwise_offload")
    ]
    module.torch = TorchOnCpu()
    torch.get_device_module = lambda *_: NoDevice()
    if not is_stock:  # torch page-locks nothing without a GPU
        from weightlift.patches.sglang_diffusion import layerwise

        arguments.pin_cpu_memory = True
        layerwise._is_page_locked = lambda manager: True
    if hasattr(transformer, "configure_layerwise_offload"):
        transformer.configure_layerwise_offload(arguments)
        (manager,) = transformer.layerwise_offload_managers
    else:  # 0.5.7
        manager = module.LayerwiseOffloadManager(
            transformer,
            module_list_attr="blocks",
            num_layers=len(transformer.blocks),
            enabled=True,
            pin_cpu_memory=arguments.pin_cpu_memory,
            auto_initialize=True,
        )
    return layers_of(manager)


def layers_of(manager: Any) -> dict[str, Any]:
    """Hash of the weights that wait on the host, and the sizes of the memory that they have."""
    digest, sizes = hashlib.sha256(), set()
    for layer, weights in sorted(manager._weight_metadata.items()):
        buffers = manager._consolidated_cpu_weights[layer]
        sizes |= {buffer.untyped_storage().nbytes() for buffer in buffers.values()}
        for name, facts in sorted(weights.items()):
            start, count = facts["offset"], facts["numel"]
            data = buffers[facts["dtype"]][start : start + count]
            digest.update(f"{name} {data.dtype} {tuple(facts['shape'])}".encode())
            digest.update(data.view(torch.uint8).numpy().tobytes())
    return {
        "hash": digest.hexdigest(),
        "layers": len(manager._weight_metadata),
        "sizes": sorted(sizes),
    }


def offload_encoders(is_stock: bool) -> list[int]:
    """Have encoders stay on the host, which releases from 0.5.11 on do beside a GPU only.

    Returns how many parameters FSDP is given without data, and how many with it, as it goes.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    given, make = [0, 0], FSDPParam._init_sharded_param

    def counted(self: Any, param: torch.nn.Parameter, *args: Any, **kwargs: Any) -> None:
        given[not param.is_meta] += 1
        make(self, param, *args, **kwargs)

    FSDPParam._init_sharded_param = counted
    name = "sglang.multimodal_gen.runtime.loader.component_loaders.text_encoder_loader"
    if importlib.util.find_spec(name.rpartition(".")[0]) is not None:
        loader = importlib.import_module(name)
        loader.current_platform = types.SimpleNamespace(
            is_cpu=lambda: False,
            is_mps=lambda: False,
            device_type=loader.current_platform.device_type,
        )
    if not is_stock:
        from weightlift.patches.sglang_diffusion import offload

        offload._locked_for = lambda server_args: torch.device("cpu")
    return given
