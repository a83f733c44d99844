"""The real server, by its own command lines: same tokens, weightlift's flags, clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engines import environment
from engines.checkpoints import make_checkpoint
from engines.server import LAUNCH, SERVE, Server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    first, second = (make_checkpoint(folder / str(seed), "qwen3", seed) for seed in (0, 1))
    return first, second


def reports(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("version", "command", "ranks"),
    [("0.5.9", LAUNCH, 1), ("0.5.23", SERVE, 2)],
    ids=["launch_server", "serve on two ranks"],
)
def test_the_server_serves_the_same_tokens(
    version: str, command: Sequence[str], ranks: int, models: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = models
    flags = ["--tp-size", str(ranks)]
    environ = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if ranks == 2 else {}

    def serve(log: str, flags: Sequence[str], environ: dict[str, str]) -> list[Any]:
        options = {"flags": flags, "environ": environ, "command": command}
        with Server(version, first, tmp_path / log, **options) as server:  # type: ignore[arg-type]
            told = [server.tokens()]
            assert server.update(second)["success"], server.log()[-3000:]
            return [*told, server.tokens()]

    stock = serve("stock.log", flags, {**environ, "WEIGHTLIFT": "0"})
    report = tmp_path / "report.jsonl"
    ours = [*flags, "--enable-multithread-load", "--num-load-threads", "3"]
    planned = serve("weightlift.log", ours, {**environ, "WEIGHTLIFT_REPORT": str(report)})
    assert planned == stock and stock[0] != stock[1]
    loads = reports(report)
    assert [load["phase"] for load in loads] == ["launch"] * ranks + ["update"] * ranks
    assert {load["mode"] for load in loads} == {"weightlift"}
    assert {load["threads"] for load in loads} == {3}
    assert {load["rank"] for load in loads} == set(range(ranks))


def test_a_checkpoint_that_breaks_ends_the_launch_with_its_name(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    broken = make_checkpoint(tmp_path / "broken", "qwen3", 0)
    shard = broken / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-500])
    with pytest.raises(RuntimeError, match=r"model-00001-of-00002\.safetensors.*truncated"):
        with Server("0.5.9", broken, tmp_path / "log"):
            pass


def python(version: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**environment.sglang_environ(version), "COLUMNS": "100", **environ},
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.mark.parametrize(
    ("version", "command"), [("0.4.9.post2", LAUNCH), ("0.5.23", LAUNCH), ("0.5.23", SERVE)]
)
def test_the_flags_are_in_the_engines_own_help(version: str, command: Sequence[str]) -> None:
    told = python(version, *command, "--help").stdout
    for flag in ("--enable-multithread-load", "--disable-multithread-load", "--num-load-threads"):
        assert flag in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-load-threads", "none"), "must be a whole number from 1 to 256"),
        (
            ("--enable-multithread-load", "--model-loader-extra-config",
             '{"enable_multithread_load": false}'),
            "--enable-multithread-load contradicts --model-loader-extra-config",
        ),
    ],
)  # fmt: skip
def test_nonsense_on_the_command_line_is_refused(
    flags: Sequence[str], message: str, models: tuple[Path, Path]
) -> None:
    ran = python("0.5.9", *LAUNCH, "--model-path", str(models[0]), *flags)
    assert ran.returncode and message in ran.stderr


ENGINE = """
import sys, sglang
if __name__ == "__main__":
    engine = sglang.Engine(
        model_path=sys.argv[1], device="cpu", attention_backend="torch_native",
        sampling_backend="pytorch", disable_radix_cache=True, disable_overlap_schedule=True,
        skip_server_warmup=True, max_total_tokens=2048, mem_fraction_static=0.3,
        max_running_requests=4, log_level="info", **eval(sys.argv[2]))
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    answer = engine.generate(input_ids=[10, 20, 30, 40], sampling_params=sampling)
    print("TOKENS", answer["output_ids"])
    engine.shutdown()
"""


def test_engine_takes_the_flags_as_keywords(models: tuple[Path, Path], tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    tokens = []
    for keywords in ({"num_load_threads": 3}, {"disable_multithread_load": True}):
        report = tmp_path / f"{'-'.join(keywords)}.jsonl"
        ran = python(
            "0.5.17", str(script), str(models[0]), repr(keywords), WEIGHTLIFT_REPORT=str(report)
        )
        tokens += [line for line in ran.stdout.splitlines() if line.startswith("TOKENS")]
        assert len(reports(report)) == 1, (ran.stdout[-2000:], ran.stderr[-3000:])
    assert len(tokens) == 2 and tokens[0] == tokens[1]
    (planned,) = reports(tmp_path / "num_load_threads.jsonl")
    (stock,) = reports(tmp_path / "disable_multithread_load.jsonl")
    assert (planned["mode"], planned["threads"]) == ("weightlift", 3)
    assert stock["fallback_reason"] == "multithread load is switched off"
