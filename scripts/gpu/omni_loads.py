"""vLLM-Omni's own loader on this GPU, stock and with weightlift: transformers of two real shapes.

qwen-image    its transformer, 41 GB of bfloat16
wan           two transformers of Wan2.2's width and a quarter of its 40 layers, 29 GB of float32 in
              the files and bfloat16 on the device

``DiffusersPipelineLoader.load_weights`` into parameters that are there, in a process of its own for
each way, three times; the page cache is warm, but for a last call of two of the ways. Needs
vLLM-Omni and vLLM in this Python's path (``scripts/gpu/bundle-omni``), without their compiled kernels.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import write

from weightlift.loading.benchmark import make_cold
from weightlift.loading.ceilings import warm_ceiling

TESTS = Path(__file__).resolve().parents[2] / "tests"
PARTS: dict[str, dict[str, Any]] = {
    "qwen-image": {
        "num_layers": 60,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "in_channels": 64,
        "out_channels": 16,
        "joint_attention_dim": 3584,
        "axes_dims_rope": [16, 56, 56],
    },
    "wan": {
        "num_layers": 10,
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
    },
}
WAYS: dict[str, dict[str, Any]] = {
    "stock, 1 thread": {"fields": {"enable_multithread_weight_load": False}},
    "stock, 4 threads": {"fields": {"num_weight_load_threads": 4}},
    "weightlift, 4 readers": {"readers": "4"},
    "weightlift, 12 readers": {"readers": "12"},
}
CALLS = 3
COLD = ("stock, 4 threads", "weightlift, 12 readers")


def make(part: str, folder: Path) -> None:
    """The components, with the names that diffusers gives their tensors."""
    import diffusers

    is_wan = part == "wan"
    maker = diffusers.WanTransformer3DModel if is_wan else diffusers.QwenImageTransformer2DModel
    with torch.device("meta"):
        model = maker(**PARTS[part])
    named = [(name, tuple(value.shape)) for name, value in model.named_parameters()]
    started = time.perf_counter()
    for component in ("transformer", "transformer_2") if is_wan else ("transformer",):
        dtype = torch.float32 if is_wan else torch.bfloat16
        write(folder / component, named, dtype, stem="diffusion_pytorch_model")
        (folder / component / "config.json").write_text(json.dumps(PARTS[part]))
    print(f"{part} written in {time.perf_counter() - started:.0f} s", flush=True)


def load(part: str, folder: Path, way: str, *, is_warm: bool) -> dict[str, Any]:
    """Seconds of the calls of one way, and what the parameters hold after them."""
    sys.path.insert(0, str(TESTS))
    from engines import omni_harness as omni
    from vllm.config import CompilationConfig, DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.config.load import LoadConfig

    without_kernels()
    omni.platform_for_loading("cuda")
    without_torchvision()
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm_omni.diffusion.forward_context import set_forward_context
    from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

    case = {"kind": part, "model": str(folder), "fields": WAYS[way].get("fields", {})}
    config = omni.configuration(case)
    vllm_config = VllmConfig(
        compilation_config=CompilationConfig(), device_config=DeviceConfig(device="cpu")
    )
    with (
        set_forward_context(vllm_config=vllm_config, omni_diffusion_config=config),
        set_current_vllm_config(vllm_config),
        set_default_torch_dtype(torch.bfloat16),
    ):
        omni.parallel_state(1, 0, 29655)
        with torch.device("cuda"):
            pipeline = omni.pipeline_class("wan" if part == "wan" else "qwenimage", collect=False)
            model = pipeline(od_config=config)
        loader = DiffusersPipelineLoader(LoadConfig(), config)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        seconds = [timed(lambda: loader.load_weights(model)) for _ in range(CALLS)]
        if way in COLD and not is_warm:
            for file in folder.rglob("*.safetensors"):
                make_cold(file)
            seconds.append(timed(lambda: loader.load_weights(model)))
    sums = [
        int(value.detach().reshape(-1).view(torch.int16).to(torch.int64).sum())
        for _, value in sorted(model.named_parameters())
    ]
    nbytes = sum(value.nbytes for value in model.parameters())
    scratch = torch.cuda.max_memory_allocated() - held
    return {"seconds": seconds, "sums": hash(tuple(sums)), "nbytes": nbytes, "scratch": scratch}


def without_kernels() -> None:
    """Let vLLM's CUDA platform, which vLLM-Omni finds by the driver, be imported without kernels."""
    for name in ("_C", "_C_stable_libtorch", "_moe_C"):
        if importlib.util.find_spec(f"vllm.{name}") is None:
            sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")


def without_torchvision() -> None:
    """Let Wan's module be imported where there is no torchvision: it needs it for images alone."""
    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            module = sys.modules[name] = types.ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            parent, _, own = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], own, module)


def wait() -> None:
    """Until the device, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(load: Any) -> float:
    """Seconds until the last byte is on the device."""
    wait()
    started = time.perf_counter()
    load()
    wait()
    return time.perf_counter() - started


def run(part: str, folder: Path, way: str, *, is_warm: bool) -> dict[str, Any]:
    """One way in a process of its own."""
    environ = {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"}
    readers = WAYS[way].get("readers")
    environ["WEIGHTLIFT"] = str(int(bool(readers)))
    if readers:
        environ["WEIGHTLIFT_NUM_LOAD_THREADS"] = readers
        environ["WEIGHTLIFT_MULTITHREAD_LOAD"] = "1"
    command = [sys.executable, __file__, "--one", part, str(folder), way, *["--warm"] * is_warm]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{part}, {way}:\n{ran.stdout[-1000:]}\n{ran.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def main() -> None:
    """Make, load, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="gets the checkpoints, 41 GB at a time")
    parser.add_argument("out", type=Path, help="gets the numbers, as omni.json")
    parser.add_argument("--warm", action="store_true", help="no cold loads")
    told = f"all if left out: {'; '.join(WAYS)}"
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=told)
    given = parser.parse_args()
    folder, out = given.folder, given.out
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for part in PARTS:
        place = folder / part
        make(part, place)
        stored = sum(file.stat().st_size for file in place.rglob("*.safetensors"))
        ceiling = warm_ceiling(place / "transformer", torch.device("cuda"))
        print(
            f"{part}: {stored / 1e9:.1f} GB in files, ceiling {ceiling / 1e9:.1f} GB/s", flush=True
        )
        for way in given.ways:
            found = run(part, place, way, is_warm=given.warm)
            rows.append({"part": part, "way": way, "stored": stored, "ceiling": ceiling, **found})
            first, cold = found["seconds"][0], found["seconds"][CALLS:]
            then = statistics.median(found["seconds"][1:CALLS])
            share = stored / ceiling / then
            print(
                f"{part:10s} {way:24s} first {first:6.2f} s, then {then:6.2f} s, "
                f"{share:4.0%} of the ceiling; cold {cold[0] if cold else 0:6.2f} s; "
                f"scratch {found['scratch'] / 1e6:.0f} MB",
                flush=True,
            )
            (out / "omni.json").write_text(json.dumps(rows, indent=1))
        sums = {row["sums"] for row in rows if row["part"] == part}
        print(f"{part}: parameters are {'equal' if len(sums) == 1 else 'NOT equal'}", flush=True)
        for file in place.rglob("*.safetensors"):
            file.unlink()


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        told = load(sys.argv[2], Path(sys.argv[3]), sys.argv[4], is_warm="--warm" in sys.argv[5:])
        print(f"RESULT {json.dumps(told)}", flush=True)
        os._exit(0)
    main()
