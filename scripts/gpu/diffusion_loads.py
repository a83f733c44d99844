"""SGLang Diffusion's own pipeline on this GPU: loading its components, stock and with weightlift.

diffusion_loads.py FOLDER OUT [LAYERS] [GROUP..]    the checkpoint goes to FOLDER, table and numbers to OUT

A pipeline of Qwen-Image's shapes: text encoder of 15.2 GB, transformer of LAYERS (60: 41 GB), a small
VAE; one that is in FOLDER already is taken as it is. ``build_pipeline`` in a process of its own for each
case, stock and with weightlift. Groups of cases, all if none is named:

launch    with all components on the GPU, three times, files in the page cache
offload   with the text encoder on the host, layer by layer, likewise, once
fsdp      with the text encoder on the host by FSDP, likewise, once
layers    with the layers of the transformer brought to the host then, likewise, once
change    then updated twice, and three times asleep and awake again
cold      with no file in the page cache

Needs SGLang Diffusion in this Python's path (``scripts/gpu/bundle-diffusion``).
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import write
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from weightlift.loading.benchmark import make_cold
from weightlift.loading.budget import available_memory
from weightlift.loading.ceilings import warm_ceiling

TESTS = Path(__file__).resolve().parents[2] / "tests"
LAYERS = 60
TRANSFORMER = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 64,
    "out_channels": 16,
    "joint_attention_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}
RESIDENT = (
    "--text-encoder-cpu-offload false --image-encoder-cpu-offload false --vae-cpu-offload false "
    "--dit-cpu-offload false --dit-layerwise-offload false"
).split()
WAYS: dict[str, tuple[bool, list[str]]] = {
    "stock": (False, RESIDENT),
    "weightlift": (True, [*RESIDENT, "--enable-parallel-module-load"]),
    **{
        f"{who}, {where}": (is_ours, [*flags, *(["--enable-parallel-module-load"] * is_ours)])
        for where, flags in (
            ("encoder in layers", RESIDENT[2:]),
            ("encoder by FSDP", ["--text-encoder-cpu-offload", "true", *RESIDENT[2:]]),
            ("transformer in layers", [*RESIDENT[:-1], "true"]),
        )
        for who, is_ours in (("stock", False), ("weightlift", True))
    },
}
GROUPS = {
    "launch": ["stock", "weightlift"] * 3,
    "offload": [way for way in WAYS if "encoder in layers" in way],
    "fsdp": [way for way in WAYS if "encoder by FSDP" in way],
    "layers": [way for way in WAYS if "transformer" in way],
    "change": ["stock", "weightlift"],
    "cold": ["weightlift", "stock"],
}
UPDATED = ["transformer"]
NOT_NEEDED = (
    "cv2",
    "scipy",
    "torchvision",
    "av",
    "trimesh",
    "imageio_ffmpeg",
    "soundfile",
    "xatlas",
)
"""Imported by pipelines and needed by no load."""


class _Nothing:
    """Whatever is looked for in a module that is not there."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self._name} is not here")


def put_in_place_of_absent_modules() -> None:
    """Let what no load needs be imported; who asks whether it is there has been told no before."""
    import diffusers.utils.import_utils  # noqa: F401 - asks as it is imported
    from transformers.utils import import_utils

    for name, asks in vars(import_utils).items():
        if name.startswith("is_") and name.endswith("_available") and hasattr(asks, "cache_info"):
            asks() if not inspect.signature(asks).parameters else None
    sys.meta_path.append(_Absent())


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that are needed by no load and are not installed."""

    def __init__(self) -> None:
        self._names = {name for name in NOT_NEEDED if importlib.util.find_spec(name) is None}

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] in self._names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = _Nothing(spec.name).__getattr__  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def make(folder: Path, layers: int) -> None:
    """Write the pipeline."""
    import diffusers
    import transformers
    from engines import diffusion_checkpoints as checkpoints

    checkpoints.qwen_image_around(folder)
    started = time.perf_counter()
    config = checkpoints.qwen_encoder(28, 3584, 18944, 152064)
    with torch.device("meta"):
        encoder = transformers.Qwen2_5_VLForConditionalGeneration(config)
        transformer = diffusers.QwenImageTransformer2DModel(num_layers=layers, **TRANSFORMER)
    for part, model, stem in (
        ("text_encoder", encoder, "model"),
        ("transformer", transformer, "diffusion_pytorch_model"),
    ):
        named = [
            (checkpoints.published_name(name), tuple(value.shape))
            for name, value in model.named_parameters()
        ]
        write(folder / part, named, torch.bfloat16, stem=stem)
    config.save_pretrained(folder / "text_encoder")
    transformer.save_config(folder / "transformer")
    print(f"written in {time.perf_counter() - started:.0f} s", flush=True)


def load(folder: Path, group: str, flags: list[str]) -> dict[str, Any]:
    """Seconds of ``load_modules`` and of each component, and what the parameters hold."""
    from engines import diffusion_harness as harness
    from engines import diffusion_on_cpu
    from sglang.multimodal_gen.runtime.loader.component_loaders.component_loader import (
        PipelineComponentLoader,
    )
    from sglang.multimodal_gen.runtime.pipelines_core import composed_pipeline_base
    from sglang.multimodal_gen.runtime.post_training.weights_updater import WeightsUpdater

    seconds: dict[str, float] = {}
    host = 0
    base, components = composed_pipeline_base.ComposedPipelineBase, PipelineComponentLoader
    base.load_modules = timed(base.load_modules, seconds, "load_modules")
    components.load_component = timed(components.load_component, seconds, waits=False)
    if not torch.cuda.is_available():
        diffusion_on_cpu.platform_for_cpu()
    pipeline, server_args = harness.build({"model": str(folder), "flags": flags}, 0, 29700)
    if group == "layers":
        move_layers(pipeline, server_args, seconds)
    if group == "change":
        update = WeightsUpdater(pipeline).update_weights_from_disk
        for name in ("first update", "second update"):
            done, message = timed(update, seconds, name)(str(folder), target_modules=UPDATED)
            assert done, message
        host = sleep_and_wake_up(pipeline, seconds)
    sums = {}
    for name, module in pipeline.modules.items():
        if isinstance(module, torch.nn.Module):
            values = [bits_of(item) for _, item in sorted(weights_of(module))]
            sums[name] = [type(module).__name__, hash(tuple(values)), *brought(module)]
    scratch = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"seconds": seconds, "sums": sums, "peak": scratch, "host": host}


def move_layers(pipeline: Any, server_args: Any, seconds: dict[str, float]) -> None:
    """Have the engine bring layers to the host, as its worker does once the pipeline is built."""
    from sglang.multimodal_gen.runtime.managers.memory_managers import layerwise_offload

    move = timed(layerwise_offload.configure_layerwise_offload_modules, seconds, "layers moved")
    names = server_args.layerwise_offload_components
    assert move(pipeline.modules, server_args, component_names=names), "nothing was moved"


def sleep_and_wake_up(pipeline: Any, seconds: dict[str, float]) -> int:
    """Do so three times, by the engine's own controller; before the last the transformer is changed.

    Returns the bytes of the host's memory that are gone since.
    """
    from sglang.multimodal_gen.runtime.managers.memory_managers import memory_occupation_controller

    controller = memory_occupation_controller.MemoryOccupationController(pipeline, 0, False)
    before = available_memory()
    for number in ("first", "second", "third"):
        transformer = pipeline.modules["transformer"]
        if number == "third":
            for weight in transformer.parameters():
                weight.data.neg_()
        held = torch.cuda.memory_allocated()
        timed(controller.release_memory_occupation, seconds, f"{number} sleep")()
        freed = held - torch.cuda.memory_allocated()
        timed(controller.resume_memory_occupation, seconds, f"{number} wake-up")()
        assert freed > 0.99 * held, f"{freed} of {held} bytes of the device were freed"
        if number == "third":
            for weight in transformer.parameters():
                weight.data.neg_()
    return before - available_memory()


def weights_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights; of layers that were moved to the host, those there."""
    moved: set[str] = set()
    for manager in getattr(module, "layerwise_offload_managers", ()):
        for name, weight in manager.iter_cpu_weights():
            moved.add(name)
            yield name, weight
    for name, weight in module.named_parameters():
        if name not in moved:
            yield name, weight


def brought(module: torch.nn.Module) -> list[int]:
    """How many parameters wait page-locked, and the sum of what FSDP brings to the GPU for a run."""
    locked = sum(local_of(item).is_pinned() for item in module.parameters())  # before FSDP looks
    found = 0
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
            whole = [item for item in part.parameters() if not isinstance(item, DTensor)]
            found += sum(bits_of(item) for item in whole)
            part.reshard()
    return [locked, found]


def local_of(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank has of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def bits_of(parameter: torch.Tensor) -> int:
    """The sum of a parameter's elements, taken for whole numbers."""
    local = local_of(parameter)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[local.element_size()]
    return int(local.detach().contiguous().view(-1).view(kind).to(torch.int64).sum())


def timed(function: Any, seconds: dict[str, float], name: str = "", *, waits: bool = True) -> Any:
    """The function, with what it took put down; if it ``waits``, until all is done on the device."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **kwargs)
        if waits and torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[name or kwargs["component_name"]] = time.perf_counter() - started
        return result

    return measured


def fill_page_cache(files: list[Path]) -> None:
    """Read files that a process before may have had the kernel forget."""

    def read(file: Path) -> None:
        room = bytearray(16 << 20)
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(room):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, files))


def run(folder: Path, way: str, group: str, report: Path) -> dict[str, Any]:
    """One way in a process of its own."""
    is_ours, flags = WAYS[way]
    environ = {**os.environ, "WEIGHTLIFT": str(int(is_ours)), "WEIGHTLIFT_REPORT": str(report)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an engine that is installed has its own compiled
    command = [sys.executable, __file__, "--one", str(folder), group, *flags]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{way}:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def main(folder: Path, out: Path, layers: int, groups: list[str]) -> None:
    """Make, load, compare, write."""
    out.mkdir(parents=True, exist_ok=True)
    pipeline = folder / "Qwen-Image"
    if not pipeline.exists():
        make(pipeline, layers)
    files = sorted(pipeline.rglob("*.safetensors"))
    stored, ceiling = sum(file.stat().st_size for file in files), 0.0
    if torch.cuda.is_available():
        ceiling = warm_ceiling(pipeline / "transformer", torch.device("cuda"))
    print(f"{stored / 1e9:.1f} GB in files, ceiling {ceiling / 1e9:.1f} GB/s", flush=True)
    rows = []
    for group, way in [(asked, way) for asked in groups for way in GROUPS[asked]]:
        fill_page_cache(files)
        for file in files if group == "cold" else []:
            make_cold(file)
        found = run(pipeline, way, group, out / "reports.jsonl")
        rows.append({"way": way, "group": group, "stored": stored, "ceiling": ceiling, **found})
        (out / "diffusion.json").write_text(json.dumps(rows, indent=1))
        told = ", ".join(f"{name} {value:.2f}" for name, value in found["seconds"].items())
        print(
            f"{group:8s} {way:36s} {told} s; peak {found['peak'] / 1e9:.1f} GB, "
            f"host {found['host'] / 1e9:.1f} GB",
            flush=True,
        )
    for where in sorted({row["way"].partition(", ")[2] for row in rows}):
        alike = [row for row in rows if row["way"].partition(", ")[2] == where]
        told = "equal" if len({str(row["sums"]) for row in alike}) == 1 else "NOT equal"
        print(f"{where or 'all on the GPU'}: parameters are {told}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    put_in_place_of_absent_modules()
    if sys.argv[1] == "--one":
        told = load(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
        print(f"RESULT {json.dumps(told)}", flush=True)
        os._exit(0)
    folder, out, *more = sys.argv[1:]
    layers = int(more.pop(0)) if more and more[0].isdecimal() else LAYERS
    main(Path(folder), Path(out), layers, more or list(GROUPS))
