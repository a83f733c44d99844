"""vLLM's own loader on this GPU, stock and with weightlift.

vllm_loads.py CHECKPOINT OUT    numbers go to OUT

``DefaultModelLoader.load_weights`` into the parameters of vLLM's own model, several times, then the
runner's ``reload_weights``, in a process of its own for each way. The page cache is warm. Needs vLLM in
this Python's path (``scripts/gpu/bundle-omni``), without its compiled kernels: its platform is the CPU,
its parameters are on the GPU.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omni_loads import timed, without_kernels

from weightlift.loading.ceilings import warm_ceiling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS: dict[str, dict[str, Any]] = {
    "stock": {},
    "stock, 8 threads": {
        "model_loader_extra_config": {"enable_multithread_load": True, "num_threads": 8}
    },
    "weightlift": {},
}
CALLS = 4


def load(checkpoint: str, way: str) -> dict[str, Any]:
    """Seconds of the calls of one way, and what the parameters hold after them."""
    without_kernels()
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    options = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 128}
    arguments = EngineArgs(model=checkpoint, skip_tokenizer_init=True, **options, **WAYS[way])
    config = arguments.create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29656", 0, backend="gloo")
        initialize_model_parallel(1)
        with DEVICE:
            model = initialize_model(vllm_config=config)
        loader = DefaultModelLoader(config.load_config)
        seconds = [
            timed(lambda: loader.load_weights(model, config.model_config)) for _ in range(CALLS)
        ]
        loaded = sums_of(model)
        places = [value.data_ptr() for value in model.parameters()]
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        reload = reload_of(config, model, checkpoint)
        for value in model.parameters():
            value.data.zero_()
        reloads = [timed(reload) for _ in range(CALLS)]
    assert sums_of(model) == loaded, "a reload of the same checkpoint changes parameters"
    assert places == [value.data_ptr() for value in model.parameters()], "parameters moved"
    nbytes = sum(value.nbytes for value in model.parameters())
    more = torch.cuda.max_memory_allocated() - nbytes
    return {
        "seconds": seconds,
        "reloads": reloads,
        "sums": loaded,
        "nbytes": nbytes,
        "reload_bytes": more,
    }


def reload_of(config: Any, model: torch.nn.Module, checkpoint: str) -> Callable[[], object]:
    """The method of the engine's runner, without the runner, which needs compiled kernels."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner = types.SimpleNamespace(
        get_model=lambda: model,
        load_config=config.load_config,
        model_config=config.model_config,
        vllm_config=config,
        device=DEVICE,
        lora_config=None,
        **dict.fromkeys(
            ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache"), lambda: None
        ),
    )
    return lambda: GPUModelRunner.reload_weights(runner, weights_path=checkpoint)


def sums_of(model: torch.nn.Module) -> int:
    """A number that tells what the parameters hold."""
    return hash(
        tuple(
            int(value.detach().reshape(-1).view(torch.int16).to(torch.int64).sum())
            for _, value in sorted(model.named_parameters())
        )
    )


def run(checkpoint: Path, way: str) -> dict[str, Any]:
    """One way in a process of its own."""
    environ = {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environ["WEIGHTLIFT"] = environ["WEIGHTLIFT_MULTITHREAD_LOAD"] = str(int(way == "weightlift"))
    command = [sys.executable, __file__, "--one", str(checkpoint), way]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{way}:\n{ran.stdout[-1000:]}\n{ran.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def main(checkpoint: Path, out: Path) -> None:
    """Load, compare, write."""
    out.mkdir(parents=True, exist_ok=True)
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    ceiling = warm_ceiling(checkpoint, DEVICE) if DEVICE.type == "cuda" else 0.0
    print(f"{stored / 1e9:.1f} GB in files, ceiling {ceiling / 1e9:.1f} GB/s", flush=True)
    rows = []
    for way in WAYS:
        rows.append({"way": way, "stored": stored, "ceiling": ceiling, **run(checkpoint, way)})
        loads, reloads = (
            " ".join(f"{seconds:.3f}" for seconds in rows[-1][kind])
            for kind in ("seconds", "reloads")
        )
        more = rows[-1]["reload_bytes"] / 1e9
        print(f"{way:20s} {loads} s, reload {reloads} s, {more:.2f} GB more", flush=True)
        (out / "vllm.json").write_text(json.dumps(rows, indent=1))
    sums = {row["sums"] for row in rows}
    print(f"parameters are {'equal' if len(sums) == 1 else 'NOT equal'}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        told = load(*sys.argv[2:])
        print(f"RESULT {json.dumps(told)}", flush=True)
        os._exit(0)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
