"""Loads diffusion transformers with the real vLLM-Omni of this process's path.

omni_harness.py make [qwenimage|wan FOLDER SEED WIDTH]...    random checkpoints in diffusers' layout
omni_harness.py CASES.json                                see ``engines.forked``

vLLM-Omni's own transformers and ``DiffusersPipelineLoader`` in a pipeline without encoders. A case has
besides: kind, model, fields for vLLM-Omni's configuration, and collect=true for a pipeline that
collects the whole stream. vLLM-Omni has no platform for a CPU, so its platform gets what loading asks.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from engines.forked import run_cases, state_hash
from engines.page_cache import cached
from weightlift.loading.benchmark import make_cold

QWEN_IMAGE = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 4,
    "joint_attention_dim": 48,
    "axes_dims_rope": [8, 12, 12],
}
WAN = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 48,
    "freq_dim": 16,
    "ffn_dim": 96,
}
PARALLEL = {
    "data",
    "cfg",
    "sequence",
    "pipeline",
    "ulysses_degree",
    "ring_degree",
    "fully_shard_degree",
}
COMPONENTS = {"qwenimage": ("transformer",), "wan": ("transformer", "transformer_2")}


def make(kind: str, folder: Path, seed: int, width: int) -> None:
    """Write the components; Wan's in float32, as it is published, its inner layers ``width`` wide."""
    import diffusers

    torch.manual_seed(seed)
    for component in COMPONENTS[kind]:
        if kind == "qwenimage":
            model = diffusers.QwenImageTransformer2DModel(**QWEN_IMAGE).to(torch.bfloat16)
        else:
            model = diffusers.WanTransformer3DModel(**{**WAN, "ffn_dim": width})
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder / component, max_shard_size="150KB")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Tiny"}))


def platform_for_loading(device: str = "cpu") -> None:
    """Let vLLM and vLLM-Omni, which find no platform, take the CPU for one; what they ask for in
    the way of devices is ``device``."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms.current_platform = CpuPlatform()
    from vllm_omni.platforms import current_omni_platform

    answers: dict[str, Any] = {
        "get_diffusion_attn_backend_cls": "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend",
        "get_torch_device": torch.device(device),
        "get_device_count": 1,
        "current_device": 0,
        "is_initialized": False,
        **dict.fromkeys(("set_device", "synchronize", "empty_cache")),
    }
    type(current_omni_platform).device_type = device
    for name, answer in answers.items():
        setattr(type(current_omni_platform), name, classmethod(lambda *_, _is=answer, **__: _is))


def pipeline_class(kind: str, collect: bool) -> type[torch.nn.Module]:
    """A pipeline of transformers alone."""
    from vllm.model_executor.models.utils import AutoWeightsLoader
    from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

    def transformer(od_config: Any, component: str) -> Any:
        file = Path(od_config.model) / component / "config.json"
        written = json.loads(file.read_text())
        if kind == "qwenimage":
            from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import (
                QwenImageTransformer2DModel,
            )

            return QwenImageTransformer2DModel(
                od_config=od_config, **{name: written[name] for name in QWEN_IMAGE}
            )
        from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import WanTransformer3DModel

        return WanTransformer3DModel(**{name: written[name] for name in WAN})

    class Tiny(torch.nn.Module):
        def __init__(self, *, od_config: Any, **_: Any) -> None:
            super().__init__()
            self.weights_sources = []
            for component in COMPONENTS[kind]:
                source = DiffusersPipelineLoader.ComponentSource(
                    model_or_path=od_config.model,
                    subfolder=component,
                    revision=None,
                    prefix=f"{component}.",
                )
                self.weights_sources.append(source)
                setattr(self, component, transformer(od_config, component))

        def load_weights(self, weights: Any) -> set[str]:
            loaded: set[str] = AutoWeightsLoader(self).load_weights(
                list(weights) if collect else weights
            )
            return loaded

    return Tiny


def parallel_state(size: int, rank: int, port: int) -> None:
    """One host of ranks that share the tensors."""
    from vllm_omni.diffusion.distributed import parallel_state as state

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    state.init_distributed_environment(world_size=size, rank=rank, backend="gloo", local_rank=rank)
    taken = inspect.signature(state.initialize_model_parallel).parameters
    ones = {name: 1 for name in taken if name.split("_parallel_size")[0] in PARALLEL}
    backend = {"backend": "gloo"} if "backend" in taken else {}
    state.initialize_model_parallel(**{**ones, "tensor_parallel_size": size, **backend})


def configuration(case: dict[str, Any]) -> Any:
    """vLLM-Omni's, for the case."""
    from vllm_omni.diffusion.data import OmniDiffusionConfig, TransformerConfig

    config = OmniDiffusionConfig.from_kwargs(
        model=case["model"],
        model_class_name="QwenImagePipeline" if case["kind"] == "whole" else "Tiny",
        dtype=torch.bfloat16,
        **case.get("fields", {}),
    )
    params = json.loads((Path(case["model"]) / "transformer/config.json").read_text())
    config.tf_model_config = TransformerConfig.from_dict(params)
    config.parallel_config.tensor_parallel_size = case.get("tp", 1)
    return config


def run(case: dict[str, Any], rank: int, port: int) -> dict[str, Any]:
    """Load one rank of a case."""
    from vllm.config import CompilationConfig, DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.config.load import LoadConfig
    from vllm_omni.diffusion.forward_context import set_forward_context
    from vllm_omni.diffusion.model_loader import diffusers_loader

    config = configuration(case)
    told = read_ahead_of_building(case["model"]) if case.get("cold") else {}
    if case["kind"] != "whole":
        pipeline = pipeline_class(case["kind"], case.get("collect", False))
        diffusers_loader.initialize_model = lambda od_config, *_, **__: pipeline(
            od_config=od_config
        )
    vllm_config = VllmConfig(
        compilation_config=CompilationConfig(), device_config=DeviceConfig(device="cpu")
    )
    with (
        set_forward_context(vllm_config=vllm_config, omni_diffusion_config=config),
        set_current_vllm_config(vllm_config),
    ):
        parallel_state(case.get("tp", 1), rank, port)
        maker = diffusers_loader.DiffusersPipelineLoader
        given = {"od_config": config}
        takes = inspect.signature(maker.__init__).parameters
        loader = maker(LoadConfig(), **(given if "od_config" in takes else {}))
        takes = inspect.signature(loader.load_model).parameters
        model = loader.load_model(load_device="cpu", **(given if "od_config" in takes else {}))
        return {**told, "hash": state_hash(model), "parameters": len(list(model.parameters()))}


def read_ahead_of_building(model: str) -> dict[str, int]:
    """Have a pipeline built when all that is cold of its files was read ahead; tells the bytes."""
    from vllm_omni.diffusion.model_loader import diffusers_loader

    from weightlift.patches.vllm_omni import loader

    build = diffusers_loader.initialize_model
    told = {"cold": 0, "ahead": 0}
    for file in Path(model).rglob("*.safetensors"):
        make_cold(file)
        told["cold"] += file.stat().st_size - cached(file)

    def build_later(*args: Any, **kwargs: Any) -> Any:
        until = time.monotonic() + 20
        while loader._aheads[0].bytes_read < told["cold"] and time.monotonic() < until:
            time.sleep(0.001)
        told["ahead"] = loader._aheads[0].bytes_read
        return build(*args, **kwargs)

    diffusers_loader.initialize_model = build_later
    return told


def main(path: str) -> None:
    """Import the engine, then run the cases."""
    platform_for_loading()
    import vllm_omni.diffusion.model_loader.diffusers_loader  # noqa: F401

    run_cases(path, run)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        for kind, folder, seed, width in zip(*[iter(sys.argv[2:])] * 4, strict=True):
            make(kind, Path(folder), int(seed), int(width))
    else:
        main(sys.argv[1])
