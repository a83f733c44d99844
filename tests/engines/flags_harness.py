"""What the real command lines and constructors of vLLM and vLLM-Omni make of weightlift's options.

flags_harness.py CASES.json    see ``engines.forked``

A case has argv, what follows ``vllm serve``; or keywords, of ``LLM`` or ``Omni``; and omni=true for
vLLM-Omni, async=true for its ``AsyncOmni``. The engine is stopped where it would start processes; what they would inherit is told. Or it has
stages, a YAML file of a stage: told is what its diffusion configuration and its workers would be given.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import types
from typing import Any

from engines.forked import run_cases
from engines.omni_harness import platform_for_loading

LOADING = ("enable_multithread_weight_load", "num_weight_load_threads")


class Stop(Exception):
    """The engine would start its processes now."""


def inherited() -> dict[str, str]:
    """What a process started now is told by the environment."""
    names = ("WEIGHTLIFT_MULTITHREAD_LOAD", "WEIGHTLIFT_NUM_LOAD_THREADS")
    return {name: os.environ[name] for name in names if name in os.environ}


def stopping(seen: dict[str, Any]) -> Any:
    """Stands for what starts processes: notes what it gets and stops."""

    def stop(*_: Any, **kwargs: Any) -> None:
        seen.update(environ=inherited(), kwargs=sorted(kwargs))
        raise Stop

    return stop


def serve(argv: list[str], module: Any, command: Any) -> dict[str, Any]:
    """``vllm serve`` up to its server, which runs in asyncio."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    maker = getattr(module, "TrackingArgumentParser", FlexibleArgumentParser)
    parser: Any = maker()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args: argparse.Namespace = parser.parse_args(["serve", *argv])
    seen: dict[str, Any] = {}
    for name in ("run_server", "omni_run_server"):
        if hasattr(module, name):
            setattr(module, name, stopping(seen))
    try:
        command.cmd(args)
    except Stop:
        names = [*vars(args), *getattr(args, "explicit_keys", ())]
        return {**seen, "left_over": [name for name in names if name.startswith("weightlift")]}
    raise AssertionError("the server was not started")


def construct(keywords: dict[str, Any], module: Any, starts: str, make: Any) -> dict[str, Any]:
    """A constructor up to what it starts."""
    seen: dict[str, Any] = {}
    setattr(module, starts, stopping(seen))
    try:
        make(model=keywords.pop("model"), **keywords)
    except Stop:
        return {**seen, "after": inherited()}
    raise AssertionError("nothing was started")


def stage_of(path: str) -> dict[str, Any]:
    """The first stage of a file, read as the release reads such files."""
    utils = importlib.import_module("vllm_omni.entrypoints.utils")
    if hasattr(utils, "load_stage_configs_from_yaml"):
        (config,) = utils.load_stage_configs_from_yaml(path)
        stage = config.engine_args
    else:
        module = importlib.import_module("vllm_omni.config.stage_config")
        (config,) = module.load_deploy_config(path).stages
        stage = vars(config)
    data = importlib.import_module("vllm_omni.diffusion.data")
    known = [name for name in LOADING if hasattr(data.OmniDiffusionConfig, name)]
    if known:
        fields = {name: stage[name] for name in known if stage.get(name) is not None}
        return {"fields": fields, "environ": inherited()}
    module = importlib.import_module("vllm_omni.entrypoints.omni_stage")
    found = []
    for is_async in (False, True):
        (config,) = utils.load_stage_configs_from_yaml(path)
        worker, seen = module.OmniStage(config), dict[str, Any]()
        worker.attach_queues(object(), object())
        context = types.SimpleNamespace(Process=stopping(seen))
        with contextlib.suppress(Stop):
            worker.init_stage_worker("model", is_async=is_async, ctx=context)
        assert not set(LOADING) & set(worker.engine_args), "the stage's engine would refuse them"
        found.append(seen["environ"])
    assert found[0] == found[1] and not inherited(), "they hold for that stage alone"
    return {"fields": {}, "environ": found[0]}


def run(case: dict[str, Any], rank: int, port: int) -> dict[str, Any]:
    """One command line, one call or one file."""
    if "stages" in case:
        return stage_of(case["stages"])
    if "argv" in case:
        package = "vllm_omni" if case.get("omni") else "vllm"
        module = importlib.import_module(f"{package}.entrypoints.cli.serve")
        command = module.OmniServeCommand() if case.get("omni") else module.ServeSubcommand()
        return serve(case["argv"], module, command)
    if not case.get("omni"):
        module = importlib.import_module("vllm.entrypoints.llm")
        return construct(case["keywords"], module, "EngineArgs", module.LLM)
    maker: Any = importlib.import_module("vllm_omni.entrypoints.omni").Omni
    if case.get("async"):
        maker = importlib.import_module("vllm_omni.entrypoints.async_omni").AsyncOmni
    # What starts the stages: a method up to 0.16 and from 0.30, a class between
    base = next(each for each in maker.__mro__ if each.__name__ == "OmniBase")
    for holder, name in (
        (base, "_initialize_stages"),
        (base, "_create_engine"),
        (sys.modules[base.__module__], "AsyncOmniEngine"),
    ):
        if hasattr(holder, name):
            return construct(case["keywords"], maker if holder is base else holder, name, maker)
    raise AssertionError(f"{base} starts its stages in some other way")


if __name__ == "__main__":
    platform_for_loading()
    for entrypoint in ("vllm.entrypoints.cli.serve", "vllm.entrypoints.llm"):
        importlib.import_module(entrypoint)  # once for all cases
    importlib.import_module("vllm_omni.entrypoints.cli.serve")
    importlib.import_module("vllm_omni.entrypoints.omni")
    run_cases(sys.argv[1], run)
