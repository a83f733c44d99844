"""The command ``weightlift``, run as people run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

COMMAND = Path(sys.executable).with_name("weightlift")


def weightlift(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **environ},
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for number in range(2):
        tensors = {
            f"layer.{number}.weight": torch.randn(256, 64, dtype=torch.bfloat16),
            f"layer.{number}.scale": torch.ones(64),
        }
        save_file(tensors, folder / f"model-{number}.safetensors")
    return folder


def test_help_explains_every_command() -> None:
    told = weightlift("--help").stdout
    for command in ("status", "inspect", "bench", "run"):
        assert command in told
        assert "Usage" in weightlift(command, "--help").stdout


def test_status_without_an_engine() -> None:
    ran = weightlift("status", "--json")
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert Path(told["hook"], "weightlift.pth").is_file()
    assert told["engines"][0]["result"]["outcome"] == "not-installed"


def test_inspect_counts_files_tensors_bytes_and_cache(checkpoint: Path) -> None:
    rows = json.loads(weightlift("inspect", checkpoint, "--json").stdout)
    assert [row["tensors"] for row in rows] == [2, 2]
    assert rows[0]["dtypes"] == {"bfloat16": 256 * 64 * 2, "float32": 256}
    assert all(0 <= row["cached_bytes"] <= row["bytes"] for row in rows)
    table = weightlift("inspect", checkpoint).stdout
    assert "2 files" in table and "model-1.safetensors" in table and "in page cache" in table


def test_inspect_refuses_a_damaged_file(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model-1.safetensors", 1000)
    ran = weightlift("inspect", checkpoint)
    assert ran.returncode == 1
    assert "model-1.safetensors" in ran.stderr and "truncated" in ran.stderr


def test_bench_compares_and_checks(checkpoint: Path, tmp_path: Path) -> None:
    plot = tmp_path / "bench.png"
    ran = weightlift("bench", checkpoint, "--calls", "2", "--no-cold", "--json", "--plot", plot)
    assert ran.returncode == 0, ran.stderr
    rows = {row["loader"]: row for row in json.loads(ran.stdout)}
    assert rows.keys() >= {"ceiling", "weightlift", "safetensors"}
    assert rows.pop("ceiling")["is_equal"] is None
    for row in rows.values():
        assert row["is_equal"] and row["nbytes"] == 2 * (256 * 64 * 2 + 256)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--loader", "magic"), "no loader magic on cpu here; there are weightlift, safetensors"),
        (("--device", "toaster"), "toaster"),
    ],
)
def test_bench_refuses_what_is_not_there(
    arguments: tuple[str, ...], message: str, checkpoint: Path
) -> None:
    given = arguments if "--device" in arguments else (*arguments, "--device", "cpu")
    ran = weightlift("bench", checkpoint, *given)
    assert ran.returncode == 1 and message in ran.stderr


def _environment_of(*arguments: str) -> Any:
    code = "import os, json; print(json.dumps(dict(os.environ)))"
    ran = weightlift("run", *arguments, "--", sys.executable, "-c", code)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_run_becomes_the_command_with_the_settings_in_its_environment(tmp_path: Path) -> None:
    seen = _environment_of("--num-load-threads", "3", "--report", "r.jsonl")
    assert seen["WEIGHTLIFT_NUM_LOAD_THREADS"] == "3"
    assert seen["WEIGHTLIFT_REPORT"] == str(Path.cwd() / "r.jsonl")


def test_run_passes_the_exit_status_and_flags_on() -> None:
    ran = weightlift(
        "run", "--", sys.executable, "-c", "import sys; sys.exit(int(sys.argv[1]))", "7"
    )
    assert ran.returncode == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-load-threads", "x", "--", "true"), "must be a whole number from 1 to 256"),
        (("--", "no-such-command"), "there is no command 'no-such-command'"),
    ],
)
def test_run_refuses_nonsense(arguments: tuple[str, ...], message: str) -> None:
    ran = weightlift("run", *arguments)
    assert ran.returncode == 1 and message in ran.stderr
