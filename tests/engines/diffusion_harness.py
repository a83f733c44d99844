"""Loads and runs pipelines with the real SGLang Diffusion of this process's path, on a CPU.

diffusion_harness.py CASES.json    see ``engines.forked``

A case has besides:

model, flags    what is built
generate        true to make a video of it
trials          how often it is built, with readers that take their work in random order
sequence        true for several ranks that share sequences, not tensors
memory          true to watch memory meanwhile
mapped          true for transformers that are taken to stay on the host beside a GPU
hindered        true where nothing can be read before the engine asks for it
ahead           true for text encoders that are read before their turn, as to a GPU
layers          true for a transformer whose layers are moved to the host then, as beside a GPU
offloaded       true for encoders that FSDP keeps on the host, as beside a GPU
updates, sleeps see ``diffusion_changes``
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# mypy: disable-error-code="attr-defined, no-untyped-call, assignment"

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.util
import os
import queue
import random
import sys
import threading
import types
from typing import Any

import torch

from engines.diffusion_changes import components_of, slept, updated
from engines.diffusion_on_cpu import operators_for_cpu, platform_for_cpu
from engines.diffusion_on_host import move_layers, offload_encoders
from engines.forked import run_cases

NAMES = {"wan": "Wan2.1-T2V-1.3B-Diffusers", "flux": "FLUX.1-dev", "qwen": "Qwen-Image"}
"""What a folder with a pipeline must be called: the engine knows pipelines by the hub's names."""

STEPS = 2


def build(case: dict[str, Any], rank: int, port: int) -> tuple[Any, Any]:
    """The engine's pipeline with its components loaded, and its arguments."""
    from sglang.multimodal_gen.runtime import distributed
    from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
    from sglang.multimodal_gen.runtime.server_args import (
        prepare_server_args,
        set_global_server_args,
    )

    ranks = case.get("tp", 1)
    tensor, sequence = (1, ranks) if case.get("sequence") else (ranks, 1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    where = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks)
    flags = ["--model-path", case["model"], "--num-gpus", str(ranks), "--tp-size", str(tensor)]
    flags += ["--sp-degree", str(sequence), "--ulysses-degree", str(sequence)]
    flags += ["--attention-backend", "torch_sdpa", *case.get("flags", [])]
    sys.argv[1:] = flags  # where releases up to 0.5.11 look for what was given
    arguments = prepare_server_args(flags)
    set_global_server_args(arguments)
    start = distributed.maybe_init_distributed_environment_and_model_parallel
    more = {"enable_cfg_parallel": False, "ulysses_degree": sequence}
    takes = start.__code__.co_varnames
    start(
        tp_size=tensor,
        sp_size=sequence,
        distributed_init_method=where,
        **{name: value for name, value in more.items() if name in takes},
    )
    return build_pipeline(arguments), arguments


def process_state() -> dict[str, Any]:
    """What a load may leave changed in the process and in this thread."""
    from sglang.multimodal_gen.runtime.distributed import get_tp_group

    layers = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "LayerNorm")
    resets = {name: getattr(torch.nn, name).reset_parameters for name in layers}
    return {
        "default dtype": str(torch.get_default_dtype()),
        "reset_parameters": {name: method.__qualname__ for name, method in resets.items()},
        "precision": str(_precision()),
        "tensor parallel": str(get_tp_group().ranks),
        "gradients": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "modes": torch._C._len_torch_function_stack(),
    }


def _precision() -> Any:
    """The thread's mixed-precision policy, which the engine keeps in two places by release."""
    for module in ("sglang.multimodal_gen.runtime.utils.precision", "sglang.multimodal_gen.utils"):
        if importlib.util.find_spec(module) is not None:
            found = getattr(importlib.import_module(module), "get_mixed_precision_state", None)
            if found is not None:
                return found()
    raise AssertionError("the engine has no get_mixed_precision_state any more")


def video_hash(pipeline: Any, arguments: Any) -> str:
    """Of the pixels that the pipeline makes of a prompt."""
    from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
    from sglang.multimodal_gen.runtime.entrypoints.utils import prepare_request

    given = {
        "prompt": "the cat runs",
        "negative_prompt": "the dog",
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": STEPS,
        "seed": 1,
        "save_output": False,
        "guidance_scale": 3.0,
    }
    wanted = SamplingParams.from_user_sampling_params_args(
        arguments.model_path, server_args=arguments, **given
    )
    request = prepare_request(server_args=arguments, sampling_params=wanted)
    with torch.no_grad():
        output = pipeline.forward(request, arguments).output
    digest = hashlib.sha256()
    for item in output if isinstance(output, list | tuple) else [output]:
        tensor = torch.as_tensor(item).detach().contiguous().view(-1)
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class RandomQueue(queue.Queue[Any]):
    """A queue that gives what is in it in random order, what ends a reader last."""

    def _get(self) -> Any:
        work = [number for number, item in enumerate(self.queue) if item is not None] or [0]
        chosen = random.choice(work)
        item = self.queue[chosen]
        del self.queue[chosen]
        return item


def tried(case: dict[str, Any], rank: int, port: int) -> dict[str, Any]:
    """What differs between many loads by readers that take their work in random order."""
    from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline

    from weightlift.loading import reader

    reader.queue = types.SimpleNamespace(SimpleQueue=RandomQueue, Empty=queue.Empty)
    pipeline, arguments = build(case, rank, port)
    found: collections.Counter[str] = collections.Counter()
    for trial in range(case["trials"]):
        random.seed(trial)
        torch.manual_seed(0)
        pipeline = build_pipeline(arguments)
        found[str((components_of(pipeline), process_state()))] += 1
    return {"trials": sorted(found.values()), "components": components_of(pipeline)}


class MemoryWatch:
    """Within it, the most anonymous memory that this process has, in bytes, is taken down."""

    def __enter__(self) -> MemoryWatch:
        self._ended = threading.Event()
        self.before = self.most = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self.most = max(self.most, self._now())

    @staticmethod
    def _now() -> int:
        with open("/proc/self/status") as file:
            (line,) = [line for line in file if line.startswith("RssAnon")]
        return int(line.split()[1]) << 10


def cannot_tell(device: torch.device) -> int:
    """In place of what says how much memory is free."""
    raise RuntimeError(f"{device} does not say")


def run(case: dict[str, Any], rank: int, port: int) -> dict[str, Any]:
    """Load the pipeline of a case, and run it if asked to."""
    torch.manual_seed(0)
    if case.get("mapped"):
        from weightlift.patches.sglang_diffusion import weights

        weights._stay_mapped = lambda device: True
    if case.get("hindered"):
        from weightlift.loading import landing

        landing.free_memory = cannot_tell
    if case.get("ahead"):
        from weightlift.patches.sglang_diffusion import pipeline_load

        pipeline_load.DEVICES = ("cpu",)
    given = offload_encoders(case.get("stock", False)) if case.get("offloaded") else []
    if case.get("trials"):
        return tried(case, rank, port)
    with MemoryWatch() if case.get("memory") else contextlib.nullcontext() as watch:
        pipeline, arguments = build(case, rank, port)
    told: dict[str, Any] = {"components": components_of(pipeline), "process": process_state()}
    if given:
        encoder = pipeline.modules["text_encoder"]
        memories = {item.to_local().untyped_storage().data_ptr() for item in encoder.parameters()}
        told["wrapped"] = [*given, len(memories)]
    if watch:
        told["memory"] = watch.most - watch.before
    if case.get("layers"):
        transformer = pipeline.modules["transformer"]
        told["layers"] = move_layers(transformer, arguments, case.get("stock", False))
    if case.get("updates"):
        told["updates"] = updated(pipeline, case)
    if case.get("sleeps"):
        told["video before"] = video_hash(pipeline, arguments)
        told["sleeps"] = slept(pipeline, case)
    if case.get("generate"):
        told["video"] = video_hash(pipeline, arguments)
    return told


def main(path: str) -> None:
    """Import the engine, then run the cases."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # to compile a tiny pipeline takes half a minute
    import sglang.multimodal_gen.runtime.pipelines_core  # noqa: F401

    platform_for_cpu()
    operators_for_cpu()
    run_cases(path, run)


if __name__ == "__main__":
    main(sys.argv[1])
