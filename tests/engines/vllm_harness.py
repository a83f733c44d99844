"""Loads models with the real vLLM of this process's path, several cases for one import.

vllm_harness.py CASES.json    prints a line ``RESULT {...}`` a rank and case

vLLM's own model classes and ``DefaultModelLoader``, without the engine around them. Each case runs in
forked children, one a rank. A case: name, model, then if wanted tp, options (of ``EngineArgs``), env,
collect=true for a model whose loader collects the whole stream, as thinkers do, and stock=true for the
engine with every patch taken off.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import traceback
from typing import Any

import torch


def state_hash(model: torch.nn.Module) -> str:
    """Of every parameter and buffer: name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        data = tensor.detach().contiguous().view(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(data.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def collect_before_loading() -> None:
    """Have Qwen3 hold the whole stream before it loads any of it."""
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

    load = Qwen3ForCausalLM.load_weights
    Qwen3ForCausalLM.load_weights = lambda self, weights: load(self, list(weights))


def run(case: dict[str, Any], rank: int, port: int) -> dict[str, Any]:
    """Load one rank of a case."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    os.environ.update(case.get("env", {}))
    if case.get("stock"):
        from weightlift.hooks.bootstrap import uninstall

        uninstall()
    if case.get("collect"):
        collect_before_loading()
    size = case.get("tp", 1)
    options = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 128}
    config = EngineArgs(
        model=case["model"], **options, **case.get("options", {})
    ).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(
            world_size=size,
            rank=rank,
            local_rank=rank,
            distributed_init_method=f"tcp://127.0.0.1:{port}",
            backend="gloo",
        )
        initialize_model_parallel(size)
        model = get_model(vllm_config=config)
        return {"hash": state_hash(model), "parameters": len(list(model.parameters()))}


def child(case: dict[str, Any], rank: int, port: int) -> None:
    """One rank; prints what it found and ends."""
    try:
        told = run(case, rank, port)
    except BaseException as error:
        told = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    line = json.dumps({"case": case["name"], "rank": rank, **told})
    os.write(1, f"RESULT {line}\n".encode())
    os._exit(0)


def main(path: str) -> None:
    """Run the cases one after the other."""
    import vllm.model_executor.model_loader
    import vllm.model_executor.models.qwen3  # noqa: F401

    if not torch.accelerator.is_available():  # 0.32 calls it without asking whether there is one
        torch.accelerator.empty_cache = lambda: None
    with open(path) as file:
        cases = json.load(file)
    for case in cases:
        port, children = random.SystemRandom().randrange(20000, 30000), []
        for rank in range(case.get("tp", 1)):
            pid = os.fork()
            if not pid:
                child(case, rank, port)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main(sys.argv[1])
