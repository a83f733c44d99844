"""Cases of a harness, each in forked children: the engine is imported once for all of them.

A case is a mapping with a name, tp if it takes several ranks, env for its environment variables, and
stock=true for the engine with every patch taken off. Prints a line ``RESULT {...}`` a rank and case.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from engines.harness import CASE_SECONDS, free_port

Case = dict[str, Any]
Run = Callable[[Case, int, int], dict[str, Any]]
"""``(case, rank, port)`` -> what there is to tell."""


def state_hash(model: torch.nn.Module) -> str:
    """Of every parameter and buffer: name, dtype, shape and bytes, of what this rank has of it."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        data = local.detach().contiguous().view(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(data.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run_cases(path: str, run: Run) -> None:
    """Run the cases of a JSON file one after the other, the ranks of one at a time."""
    if not torch.accelerator.is_available():  # engines call it without asking whether there is one
        torch.accelerator.empty_cache = lambda: None
    with open(path) as file:
        cases = json.load(file)
    for case in cases:
        port, children = free_port(), []
        for rank in range(case.get("tp", 1)):
            pid = os.fork()
            if not pid:
                _child(case, rank, port, run)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)


def _child(case: Case, rank: int, port: int, run: Run) -> None:
    """One rank; prints what it found and ends."""
    signal.alarm(CASE_SECONDS)  # a hang ends this rank, and its missing line is a failure
    try:
        os.environ.update(case.get("env", {}))
        if case.get("stock"):
            from weightlift.hooks.bootstrap import uninstall

            uninstall()
            os.environ["WEIGHTLIFT"] = "0"  # the engine's plugin loader would put them on again
        told = run(case, rank, port)
    except BaseException as error:
        told = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    line = json.dumps({"case": case["name"], "rank": rank, **told})
    os.write(1, f"\nRESULT {line}\n".encode())  # another rank may be in the middle of a line
    os._exit(0)
