"""Loads models with the real SGLang of this process's path, several cases for one import.

harness.py CASES.json    prints a line ``RESULT {...}`` a rank and case

The engine's own benchmark helper does the version's set-up; the harness stops it as soon as the
model is loaded. Each case runs in forked children, one a rank, so that the engine is imported once.
A case: name, model, then if wanted updates (further checkpoints), tp, args, env, and stock=true for
the engine with every patch taken off.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib
import inspect
import itertools
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import threading
import traceback
from typing import Any

CASE_SECONDS = 120
PORTS = (20000, 30000)
FLAGS = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch --disable-cuda-graph "
    "--max-total-tokens 512 --mem-fraction-static 0.3 --max-running-requests 2"
).split()


class Loaded(Exception):
    """Raised to leave the engine once the model is there."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.runner = runner


def helper_module() -> Any:
    """The engine's one-batch benchmark, which moved in 0.5.15."""
    try:
        return importlib.import_module("sglang.benchmark.one_batch")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("sglang.bench"):
            raise
        return importlib.import_module("sglang.bench_one_batch")


def stop_after_load(runner_class: Any) -> None:
    """Have ``ModelRunner.load_model`` raise :class:`Loaded` when it is done."""
    load_model = runner_class.load_model

    def load_and_stop(self: Any) -> None:
        load_model(self)
        raise Loaded(self)

    runner_class.load_model = load_and_stop


def sabotage(model_class: Any) -> None:
    """Let a model's loader do to its first weight what cannot be planned."""
    kind = os.environ.get("HARNESS_SABOTAGE")
    if not kind:
        return
    load_weights = model_class.load_weights

    def load_badly(self: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        name, first = next(weights)
        if kind == "data_ptr":
            first.data_ptr()
        elif kind == "swallowed":
            try:
                first.data_ptr()
            except RuntimeError:
                pass
        elif kind == "rebind":
            parameter = next(iter(self.parameters()))
            parameter.data = first.data.view(parameter.dtype)[: parameter.shape[0]]
        else:
            self.kept = [first]
        return load_weights(self, itertools.chain([(name, first)], weights), *args, **kwargs)

    model_class.load_weights = load_badly


def inject_fault(model: str) -> None:
    """Have the first update fail once a part of it is written: ``HARNESS_FAULT=KIND[@RANK]``.

    The disk fails (``disk``), or memory does (``memory``); the rank dies (``die``); the new
    checkpoint is removed as it is read (``vanish``); or the disk fails and the old checkpoint is
    gone too (``stranded``).
    """
    kind, _, rank = os.environ.get("HARNESS_FAULT", "").partition("@")
    import torch

    if not kind or (rank and torch.distributed.get_rank() != int(rank)):
        return
    placement: Any = importlib.import_module("weightlift.loading.placement")
    place, windows, read = placement.HostPlacer.place, itertools.count(), os.preadv

    def failing_place(self: Any, window: Any) -> None:
        if next(windows) != 1:
            place(self, window)
            return
        if kind == "die":
            os._exit(9)
        elif kind == "memory":
            raise MemoryError
        elif kind == "vanish":
            shutil.rmtree(os.path.dirname(window.file.path))
            place(self, window)
        else:
            if kind == "stranded":
                shutil.rmtree(model)
            os.preadv = failing_read
            place(self, window)

    def failing_read(*_: Any) -> int:
        os.preadv = read
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    placement.HostPlacer.place = failing_place


def count_opened_shards() -> list[str]:
    """The names of the shards that weightlift opens from now on."""
    opened: list[str] = []
    files: Any = importlib.import_module("weightlift.loading.files")
    open_file = files.ShardFile.open

    def counted(path: str) -> Any:
        opened.append(os.path.basename(path))
        return open_file(path)

    files.ShardFile.open = counted
    return opened


def left_behind(folder: str) -> list[str]:
    """Open files and mappings of a checkpoint, and threads of weightlift."""
    descriptors = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    found = [os.readlink(name) for name in descriptors if os.path.exists(name)]
    with open("/proc/self/maps") as maps:
        found += [line.split()[-1] for line in maps]
    threads = [thread.name for thread in threading.enumerate()]
    return [name for name in found if name.startswith(f"{folder}/")] + [
        name for name in threads if name.startswith("weightlift")
    ]


def skip_post_processing() -> None:
    """Leave FP8 weights as they were loaded; on a CPU, their post-processing needs AMX."""
    if "HARNESS_SKIP_POST_PROCESSING" not in os.environ:
        return
    fp8 = importlib.import_module("sglang.srt.layers.quantization.fp8")
    for method in (fp8.Fp8LinearMethod, fp8.Fp8MoEMethod):
        method.process_weights_after_loading = lambda self, layer: None


def fingerprint(model: Any) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers."""
    import torch

    digest = hashlib.sha256()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()


def addresses(model: Any) -> list[int]:
    """Where the parameters are."""
    return [parameter.data_ptr() for _, parameter in sorted(model.named_parameters())]


def server_arguments(case: dict[str, Any]) -> Any:
    """The engine's own parser on the case's command line."""
    server_args = importlib.import_module("sglang.srt.server_args")

    parser = argparse.ArgumentParser()
    server_args.ServerArgs.add_cli_args(parser)
    command = ["--model-path", case["model"], *FLAGS, "--tp-size", str(case.get("tp", 1))]
    arguments = server_args.ServerArgs.from_cli_args(
        parser.parse_args([*command, *case.get("args", [])])
    )
    if hasattr(arguments, "resolve_once"):
        arguments.resolve_once()
    return arguments


def load(case: dict[str, Any], rank: int, port: int) -> dict[str, Any]:
    """Run one rank of a case."""
    helper = helper_module()
    if case.get("stock"):
        from weightlift.hooks import bootstrap

        bootstrap.uninstall()
    arguments = server_arguments(case)
    helper._set_envs_and_config(arguments)
    ports = importlib.import_module("sglang.srt.server_args").PortArgs.init_new(arguments)
    ports.nccl_port = port
    if "HARNESS_MAX_GAP" in os.environ:
        plan: Any = importlib.import_module("weightlift.loading.plan")
        plan.MAX_GAP = int(os.environ["HARNESS_MAX_GAP"])
    stop_after_load(helper.ModelRunner)
    skip_post_processing()
    sabotage(importlib.import_module("sglang.srt.models.qwen3").Qwen3ForCausalLM)
    given = {
        "server_args": arguments,
        "port_args": ports,
        "bench_args": helper.BenchArgs(),
        "gpu_id": rank,
        "tp_rank": rank,
    }
    wanted = inspect.signature(helper.correctness_test).parameters
    try:
        helper.correctness_test(**{name: given[name] for name in wanted})
    except Loaded as loaded:
        return results(case, loaded.runner)
    raise RuntimeError("the engine went on without loading a model")


def results(case: dict[str, Any], runner: Any) -> dict[str, Any]:
    """What the loaded model is made of, and again after each update."""
    told: dict[str, Any] = {
        "architecture": type(runner.model).__name__,
        "launch": fingerprint(runner.model),
    }
    before = addresses(runner.model)
    updater = runner
    if not hasattr(runner, "update_weights_from_disk"):  # from 0.5.16
        if not hasattr(runner, "weight_updater"):  # made after the load in newer releases
            runner.init_weight_updater()
        updater = runner.weight_updater
    if "HARNESS_DRAFT" in os.environ:
        runner.is_draft_worker = True
    if "HARNESS_TENSOR_UPDATE" in os.environ:
        head = dict(runner.model.named_parameters())["model.norm.weight"].detach().clone()
        assert updater.update_weights_from_tensor([("model.norm.weight", head)], None)[0]
    inject_fault(case["model"])
    opened = count_opened_shards()
    told["cost"] = []
    for number, path in enumerate(case.get("updates", [])):
        opened.clear()
        try:
            done, message = updater.update_weights_from_disk(path, "auto")[:2]
        except Exception as error:
            done, message = False, f"raised {error}"
        told[f"update {number}"] = fingerprint(runner.model)
        if not done:
            told[f"failure {number}"] = message
        told["cost"].append({"opened": sorted(opened), "left": left_behind(path)})
    told["moved"] = before != addresses(runner.model)
    return told


def free_port() -> int:
    """A port that nobody listens on; a low one, for releases derive others by adding to it."""
    for port in random.SystemRandom().sample(range(*PORTS), 100):  # engines seed the other one
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no port is free")


def run_case(case: dict[str, Any]) -> None:
    """Fork a child a rank and wait for them."""
    port = free_port()
    ranks = case.get("tp", 1)
    children = []
    sys.stdout.flush()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            run_rank(case, rank, port)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def run_rank(case: dict[str, Any], rank: int, port: int) -> None:
    """In the child: load, tell, and leave without the engine's clean-up."""
    signal.alarm(CASE_SECONDS)  # a hang ends this rank, and its missing line is a failure
    os.environ.update(case.get("env", {}))
    if case.get("tp", 1) > 1:
        cores = sorted(os.sched_getaffinity(0))
        binding = "|".join(str(cores[number % len(cores)]) for number in range(case["tp"]))
        os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = binding
    told: dict[str, Any] = {"case": case["name"], "rank": rank}
    try:
        told.update(load(case, rank, port))
    except BaseException as error:
        traceback.print_exc()
        told["error"] = f"{type(error).__name__}: {error}"
    sys.stdout.write(f"\nRESULT {json.dumps(told)}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    """Import the engine once, then run every case."""
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    logging.basicConfig(level=logging.INFO)
    helper_module()
    for case in cases:
        run_case(case)


if __name__ == "__main__":
    main()
