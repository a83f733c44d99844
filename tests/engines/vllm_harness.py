"""Loads models with the real vLLM of this process's path, several cases for one import.

vllm_harness.py CASES.json    see ``engines.forked``

vLLM's own model classes and ``DefaultModelLoader``, without the engine around them. A case has besides:
model, then if wanted options (of ``EngineArgs``), collect=true for a model whose loader collects the
whole stream, as thinkers do, as_stored=true for weights that no kernel here can process, and reload, a
path that the runner's own ``reload_weights`` loads then: after ``damaged``, a path that it must fail to load, and with ``asks_for_addresses`` of each weight. With
fault, reads of the reload fail: after how many, as what (``damage``, or ``bug`` of a reader), and on which
rank; then ``then_damaged`` must fail, too, and the reload is done once more.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engines.forked import run_cases, state_hash


def collect_before_loading() -> None:
    """Have Qwen3 hold the whole stream before it loads any of it."""
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

    load = Qwen3ForCausalLM.load_weights
    Qwen3ForCausalLM.load_weights = lambda self, weights: load(self, list(weights))


stored: list[str] = []
"""What models hold when the engine would go on to process it."""


def leave_as_stored() -> None:
    """Have weights in FP8 on this CPU, which has no kernels for them; what is loaded is told, and left so."""
    from vllm import _custom_ops
    from vllm.model_executor.model_loader import base_loader

    base_loader.process_weights_after_loading = lambda model, *_: stored.append(state_hash(model))
    torch.cpu._is_amx_tile_supported = lambda: True
    _custom_ops._supports_cpu_fp8_w8a16 = True
    kernels = (
        "vllm.model_executor.kernels.linear.scaled_mm.cpu"  # from 0.20 on they are asked first
    )
    with contextlib.suppress(ImportError, AttributeError):
        kernel = importlib.import_module(kernels).CPUFp8BlockScaledMMKernel
        kernel.can_implement = classmethod(lambda *_: (True, None))


def run(case: dict[str, Any], rank: int, port: int) -> dict[str, Any]:
    """Load one rank of a case."""
    from vllm.engine.arg_utils import EngineArgs

    if case.get("collect"):
        collect_before_loading()
    if case.get("as_stored"):
        leave_as_stored()
    options = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 128}
    args = EngineArgs(model=case["model"], **options, **case.get("options", {}))
    return load(case, args.create_engine_config(), rank, port)


def load(case: dict[str, Any], config: Any, rank: int, port: int) -> dict[str, Any]:
    """Load, and reload as the case says, by the engine's configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader import get_model

    os.environ["VLLM_DIST_IDENT"] = f"{os.getppid()}-{port}"  # the engine's runner makes one
    size = case.get("tp", 1)
    with set_current_vllm_config(config):
        init_distributed_environment(
            world_size=size,
            rank=rank,
            local_rank=rank,
            distributed_init_method=f"tcp://127.0.0.1:{port}",
            backend="gloo",
        )
        initialize_model_parallel(size)
        for segment in Path("/dev/shm").glob(f"{os.environ['VLLM_DIST_IDENT']}-*"):
            segment.unlink(
                missing_ok=True
            )  # all ranks have it; a name left behind fails who has it next
        model = get_model(vllm_config=config)
        if case.get("damaged"):
            fail_to_reload(config, model, case["damaged"])
        if case.get("asks_for_addresses"):
            ask_for_addresses(model)
        if case.get("is_refused"):
            fail_to_reload(config, model, case["reload"], "cannot be had here")
        elif case.get("reload"):
            after, kind, where = case.get("fault", (0, "", -1))
            try:
                with failing_reads(after, kind if rank == where else ""):
                    reload_weights(config, model, case["reload"])
            except Exception as error:
                if kind != "damage" or "injected" not in str(error):
                    raise
                if case.get("then_damaged"):
                    fail_to_reload(config, model, case["then_damaged"])
                there = [name for name, item in model.named_parameters() if not item.is_meta]
                reload_weights(config, model, case["reload"])
                return {"there": there, "hash": state_hash(model)}
        found = stored[-1] if case.get("as_stored") else state_hash(model)
        return {"hash": found, "parameters": len(list(model.parameters()))}


def reload_weights(config: Any, model: torch.nn.Module, path: str) -> None:
    """By the method of the engine's runner, without the runner, which needs compiled kernels."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    nothing = dict.fromkeys(
        ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache"), lambda: None
    )
    runner = types.SimpleNamespace(
        get_model=lambda: model,
        load_config=config.load_config,
        model_config=config.model_config,
        vllm_config=config,
        device=torch.device("cpu"),
        lora_config=None,
        **nothing,
    )
    GPUModelRunner.reload_weights(runner, weights_path=path)


def fail_to_reload(config: Any, model: torch.nn.Module, path: str, why: str = "truncated") -> None:
    """A reload of a checkpoint that cannot be, for a damaged file or another reason."""
    try:
        reload_weights(config, model, path)
    except Exception as error:
        assert why in str(error), error
    else:
        raise AssertionError(f"{path} was loaded")


@contextlib.contextmanager
def failing_reads(after: int, kind: str) -> Iterator[None]:
    """Within this, weightlift's reads of data fail, but for the first ones."""
    from weightlift.loading.errors import CheckpointError
    from weightlift.loading.files import ShardFile

    read, reads = ShardFile.read_into, itertools.count()

    def fail(file: ShardFile, offset: int, *args: Any, **kwargs: Any) -> None:
        if kind and offset > 4096 and next(reads) >= after:
            raise (
                CheckpointError(file.path, "injected") if kind == "damage" else OSError("injected")
            )
        read(file, offset, *args, **kwargs)

    ShardFile.read_into = fail  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ShardFile.read_into = read  # type: ignore[method-assign]


def ask_for_addresses(model: Any) -> None:
    """Have the model ask where each weight is, which no lazy tensor can tell."""
    load = model.load_weights
    model.load_weights = lambda weights: load(
        (name, weight) for name, weight in weights if weight.data_ptr()
    )


def main(path: str) -> None:
    """Import the engine, then run the cases."""
    import vllm.model_executor.model_loader
    import vllm.model_executor.models.qwen3  # noqa: F401

    run_cases(path, run)


if __name__ == "__main__":
    main(sys.argv[1])
