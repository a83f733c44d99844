"""Parses an example configuration with a launcher's own classes; run by test_launchers.py.

launcher_configs.py areal FILE          prints the server's environment and command as JSON
launcher_configs.py verl OVERRIDE...    prints the server's environment and arguments as JSON

What their packages import for training (torch, ray, transformers) is not here, and no part of parsing.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any


def stub(name: str, **attributes: Any) -> types.ModuleType:
    """A module that is there in name."""
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    return module


def root(name: str) -> Path:
    """The folder of a package, which is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin
    return Path(spec.origin).parent


def areal(file: str) -> dict[str, Any]:
    """AReaL's structured configuration of this file."""
    stub("areal", __path__=[str(root("areal"))])
    stub("areal.engine", __path__=[])
    stub("areal.engine.fsdp_utils", __path__=[])
    stub(
        "areal.engine.fsdp_utils.attn_impl",
        BUILTIN_ATTN_IMPLS=("sdpa", "flash_attention_2"),
        is_valid_attn_impl=lambda name: True,
        get_attn_impl_validation_error=str,
    )
    stub("areal.utils.seqpack", PACKING_ALGORITHMS=("ffd", "kk"))
    stub("areal.utils.name_resolve")
    omegaconf = importlib.import_module("omegaconf").OmegaConf
    cli_args = importlib.import_module("areal.api.cli_args")
    cli_args.pkg_version.is_version_greater_or_equal = lambda *_: (
        True
    )  # of the SGLang that is not here
    config, _ = cli_args.parse_cli_args(["--config", file])
    config = cli_args.to_structured_cfg(config, cli_args.GRPOConfig)
    spec = omegaconf.to_object(config.rollout.scheduling_spec)[0]
    command = cli_args.SGLangConfig.build_cmd(omegaconf.to_object(config.sglang), 1, 0)
    return {"env": dict(spec.env_vars), "command": command}


def verl(overrides: list[str]) -> dict[str, Any]:
    """verl's composed configuration with these overrides."""
    package = root("verl")
    for part in ("", "utils", "utils/profiler", "workers", "workers/config"):
        stub(".".join(filter(None, ("verl", *part.split("/")))), __path__=[str(package / part)])
    profiler = importlib.import_module("verl.utils.profiler.config")
    vars(sys.modules["verl.utils.profiler"])["ProfilerConfig"] = profiler.ProfilerConfig
    vars(sys.modules["verl.utils"]).update(hf_processor=None, hf_tokenizer=None)
    stub("transformers", AutoConfig=object)
    stub("verl.utils.fs", copy_to_local=None)
    stub("verl.utils.import_utils", import_external_libs=None)
    stub("verl.utils.model", get_generation_config=None, update_model_config=None)
    hydra = importlib.import_module("hydra")
    omegaconf = importlib.import_module("omegaconf").OmegaConf
    convert = importlib.import_module("verl.utils.config").omega_conf_to_dataclass
    rollout_class = importlib.import_module("verl.workers.config.rollout").RolloutConfig
    with hydra.initialize_config_dir(str(package / "trainer/config"), version_base=None):
        config = hydra.compose("ppo_trainer", overrides=overrides)
    omegaconf.resolve(config.actor_rollout_ref.rollout)
    rollout = convert(config.actor_rollout_ref.rollout, rollout_class)
    environ = omegaconf.to_container(config.ray_kwargs.ray_init.runtime_env)["env_vars"]
    arguments = omegaconf.to_container(config.actor_rollout_ref.rollout.engine_kwargs.sglang)
    return {"env": environ, "arguments": arguments, "load_format": rollout.load_format}


if __name__ == "__main__":
    found = areal(sys.argv[2]) if sys.argv[1] == "areal" else verl(sys.argv[2:])
    sys.stdout.write(f"\nFOUND {json.dumps(found)}\n")
