"""Staging before the pause, and a server that says when its weights are of two checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import environment
from engines.checkpoints import make_checkpoint
from engines.server import Server

pytestmark = pytest.mark.engine

GENERATIONS = ("0.4.9.post2", "0.5.23")
GENERATES_ON_ONE_RANK = "0.4.9.post2"
"""Two ranks on a CPU load, and then fail to generate, stock as well."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    first, second = (make_checkpoint(folder / str(seed), "qwen3", seed) for seed in (0, 1))
    return first, second


def updates(report: Path) -> list[dict[str, Any]]:
    loads = [json.loads(line) for line in report.read_text().splitlines()]
    return [load for load in loads if load["phase"] == "update"]


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("version", GENERATIONS)
def test_what_is_staged_is_not_read_again(
    version: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = models
    report, watched = tmp_path / "report.jsonl", tmp_path / "watched"
    watched.mkdir()
    ranks = 1 if version == GENERATES_ON_ONE_RANK else 2
    environ = {"WEIGHTLIFT_REPORT": str(report)}
    if ranks == 2:
        environ["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"
    flags = [
        "--tp-size",
        str(ranks),
        "--weight-stage-gib",
        "1",
        "--weight-stage-watch",
        str(watched),
    ]
    with Server(version, first, tmp_path / "log", flags=flags, environ=environ) as server:
        before = server.tokens()
        staged = server.ask("stage_weights", {"model_path": str(second)})
        assert staged["success"] and len(staged["ranks"]) == ranks
        assert all(rank["bytes"] > 100_000 for rank in staged["ranks"])
        assert server.tokens() == before, "staging writes no parameter"
        assert server.update(second)["success"]
        after = server.tokens()
        assert after != before

        appeared = shutil.copytree(first, watched / "step-1")
        wait_until(lambda: report.read_text().count(f'"model_path": "{appeared}"') == ranks)
        assert server.update(appeared)["success"] and server.tokens() == before
        shutil.rmtree(appeared)

        server.ask("stage_weights", {"model_path": str(second)})
        os.utime(second / "model-00001-of-00002.safetensors")  # rewritten, for all that is known
        assert server.update(second)["success"] and server.tokens() == after

        with pytest.raises(urllib.error.HTTPError) as refused:
            server.ask("stage_weights", {"model_path": str(tmp_path / "nowhere")})
        assert "no safetensors file is here" in refused.value.read().decode()
    staged_updates, rewritten = updates(report)[: 2 * ranks], updates(report)[2 * ranks :]
    headers = 8192
    for load in staged_updates:
        assert load["bytes_read"] < headers < load["bytes_staged"]
    for load in rewritten:
        assert load["bytes_read"] > headers and load["bytes_staged"] > headers


def test_who_did_not_ask_for_staging_is_told_how(models: tuple[Path, Path], tmp_path: Path) -> None:
    with Server("0.5.17", models[0], tmp_path / "log") as server:
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.ask("stage_weights", {"model_path": str(models[1])})
        assert "--weight-stage-gib" in refused.value.read().decode()


ENGINE = """
import sys, sglang
from weightlift.staging import stage_weights
if __name__ == "__main__":
    engine = sglang.Engine(
        model_path=sys.argv[1], device="cpu", attention_backend="torch_native",
        sampling_backend="pytorch", disable_radix_cache=True, disable_overlap_schedule=True,
        skip_server_warmup=True, max_total_tokens=2048, mem_fraction_static=0.3,
        max_running_requests=4, weight_stage_gib=1)
    print("STAGED", stage_weights(sys.argv[2])["success"])
    print("UPDATED", engine.update_weights_from_disk(sys.argv[2])[0])
    engine.shutdown()
"""


def test_an_engine_stages_by_a_python_call(models: tuple[Path, Path], tmp_path: Path) -> None:
    script, report = tmp_path / "engine.py", tmp_path / "report.jsonl"
    script.write_text(ENGINE)
    ran = subprocess.run(
        [sys.executable, str(script), *map(str, models)],
        env={**environment.sglang_environ("0.5.17"), "WEIGHTLIFT_REPORT": str(report)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert "STAGED True" in ran.stdout and "UPDATED True" in ran.stdout, ran.stderr[-3000:]
    (load,) = updates(report)
    assert load["bytes_read"] < 8192 < load["bytes_staged"]


BREAK = """
import errno, os, runpy, threading, wrapt

runpy.run_path(os.path.join({other!r}, "sitecustomize.py"))

reader, preadv = threading.local(), os.preadv  # readers of other files beside go on

def failing_preadv(*args):
    if getattr(reader, "fails", False):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return preadv(*args)

os.preadv = failing_preadv

def break_the_disk(placement):
    place = placement.HostPlacer.place

    def failing_place(self, window):
        reader.fails = os.path.exists({marker!r}) and "2-of" in window.file.path
        try:
            place(self, window)
        finally:
            reader.fails = False

    placement.HostPlacer.place = failing_place

wrapt.register_post_import_hook(break_the_disk, "weightlift.loading.placement")
"""


@pytest.mark.parametrize("version", GENERATIONS)
def test_a_server_of_two_checkpoints_is_unhealthy_until_it_is_whole(
    version: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    first = shutil.copytree(models[0], tmp_path / "first")
    marker = tmp_path / "disk-fails"
    # A module on the path that each of the server's processes imports at its start.
    (tmp_path / "sitecustomize.py").write_text(
        BREAK.format(marker=str(marker), other=str(environment.HERE / "stand_ins"))
    )
    path = environment.sglang_environ(version)["PYTHONPATH"]
    environ = {"PYTHONPATH": os.pathsep.join((str(tmp_path), path))}
    with Server(version, first, tmp_path / "log", environ=environ) as server:
        before = server.tokens()
        shutil.rmtree(first)
        marker.touch()
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.update(models[1])
        told = refused.value.read().decode()
        assert "Input/output error" in told and "parts of two checkpoints" in told
        for route in ("health", "generate"):
            with pytest.raises(urllib.error.HTTPError) as unhealthy:
                server.ask(route)
            assert unhealthy.value.code == 503
            assert "parts of two checkpoints" in unhealthy.value.read().decode()
        marker.unlink()
        assert server.update(models[0])["success"], "a whole checkpoint heals it"
        assert server.tokens() == before
