"""How weightlift gets into the real SGLang: import orders, child processes, versions it does not know."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engines import environment

pytestmark = pytest.mark.engine

VERSION = "0.5.9"
LOADER = "sglang.srt.model_loader.loader"
OUTCOME = f"bootstrap.results()['sglang {LOADER}'].outcome.value"
IS_OURS = (
    "type(vars(loader.DefaultModelLoader)['load_weights_and_postprocess']).__name__, "
    "type(loader.safetensors_weights_iterator).__name__"
)


def run(code: str, tmp_path: Path, version: str = VERSION, **environ: str) -> str:
    """What a script prints with this SGLang on its path."""
    file = tmp_path / "script.py"
    file.write_text(code)
    ran = subprocess.run(
        [sys.executable, str(file)],
        env={**environment.sglang_environ(version), **environ},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return (
        "\n".join(line for line in ran.stdout.splitlines() if line.startswith("> "))
        + "\n"
        + ran.stderr
    )


def test_hook_first_twice_undone_and_again_and_in_a_fork(tmp_path: Path) -> None:
    code = f"""
import os
import {LOADER} as loader
from weightlift.hooks import bootstrap
plain = lambda: print("> ", {IS_OURS}, flush=True)
plain()                                   # the start-up hook was first
bootstrap.install(); plain()              # twice
depth, item = 0, loader.safetensors_weights_iterator
while hasattr(item, "__wrapped__"):
    depth, item = depth + 1, item.__wrapped__
print("> depth", depth)
bootstrap.uninstall(); plain()            # undone
bootstrap.install(); plain()              # and again
print("> ", {OUTCOME}, flush=True)
if os.fork() == 0:
    plain(); os._exit(0)
os.wait()
"""
    lines = [line for line in run(code, tmp_path).splitlines() if line.startswith("> ")]
    patched, stock = ">  OurWrapper OurWrapper", ">  staticmethod function"
    assert lines == [patched, patched, "> depth 1", stock, patched, ">  applied", patched]


def test_engine_first(tmp_path: Path) -> None:
    code = f"""
import os
import {LOADER} as loader
print("> ", {IS_OURS})
del os.environ["WEIGHTLIFT"]
from weightlift.hooks import bootstrap
bootstrap.install()
print("> ", {IS_OURS}, {OUTCOME})
"""
    told = run(code, tmp_path, WEIGHTLIFT="0")
    assert ">  staticmethod function\n>  OurWrapper OurWrapper applied" in told
    assert told.count("weightlift: off in this process") == 1


def test_a_spawned_child_is_patched_too(tmp_path: Path) -> None:
    code = f"""
import multiprocessing
def child():
    import {LOADER} as loader
    print("> ", {IS_OURS}, flush=True)
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=child)
    process.start(); process.join()
"""
    assert ">  OurWrapper OurWrapper" in run(code, tmp_path)


@pytest.fixture
def unknown_release(tmp_path: Path) -> Path:
    """This SGLang, calling itself 9.9.9."""
    real = environment.sglang_folder(VERSION)
    folder = tmp_path / "unknown"
    folder.mkdir()
    (folder / "sglang").symlink_to(real / "sglang")
    metadata = shutil.copytree(
        real / f"sglang-{VERSION}.dist-info", folder / "sglang-9.9.9.dist-info"
    )
    text = (metadata / "METADATA").read_text()
    (metadata / "METADATA").write_text(text.replace(f"Version: {VERSION}", "Version: 9.9.9", 1))
    return folder


def test_an_unknown_version_stays_stock_and_one_line_says_so(
    unknown_release: Path, tmp_path: Path
) -> None:
    code = f"import {LOADER} as loader; print('> ', {IS_OURS})"
    path = environment.sglang_environ(VERSION)["PYTHONPATH"]
    told = run(code, tmp_path, PYTHONPATH=f"{unknown_release}:{path}")
    assert ">  staticmethod function" in told
    (line,) = [line for line in told.splitlines() if "weightlift" in line]
    assert "sglang runs stock: sglang 9.9.9 is not in the tested range" in line
    assert "WEIGHTLIFT_UNTESTED_VERSIONS=1 patches it all the same" in line


def test_an_unknown_version_is_patched_on_request(unknown_release: Path, tmp_path: Path) -> None:
    code = f"import {LOADER} as loader; print('> ', {IS_OURS})"
    path = environment.sglang_environ(VERSION)["PYTHONPATH"]
    told = run(
        code,
        tmp_path,
        PYTHONPATH=f"{unknown_release}:{path}",
        WEIGHTLIFT_UNTESTED_VERSIONS="1",
    )
    assert ">  OurWrapper OurWrapper" in told


def test_status_tells_what_became_of_each_patch() -> None:
    command = Path(sys.executable).with_name("weightlift")
    ran = subprocess.run(
        [str(command), "status"],
        env={**environment.sglang_environ("0.5.23"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, (ran.stdout, ran.stderr)
    for text in ("0.5.23", LOADER, "sglang.srt.server_args", "sglang.srt.entrypoints.engine"):
        assert text in ran.stdout
    told = [line for line in ran.stdout.splitlines() if "sglang.srt" in line]
    assert len(told) >= 5 and all("applied" in line for line in told)
    diffusion = [line for line in ran.stdout.splitlines() if "multimodal_gen" in line]
    assert any("not-installed" in line for line in diffusion), "it needs more than is there"


MISFIT = f"""
import sys
from weightlift.hooks import bootstrap
from weightlift.compat import patch
patch._misfit = lambda record, module: "not what was expected" if "{LOADER}" == module.__name__ else ""
import {LOADER} as loader
print("> ", {IS_OURS}, bootstrap.results()["sglang {LOADER}"].outcome.value)
"""


def test_a_target_of_another_shape_stays_stock(tmp_path: Path) -> None:
    told = run(MISFIT, tmp_path)
    assert ">  staticmethod function shape" in told
    assert f"{LOADER} stays stock" in told and "not what was expected" in told


def test_a_target_of_another_shape_is_an_error_if_asked_for(tmp_path: Path) -> None:
    asked = f"import os; os.environ['WEIGHTLIFT_MULTITHREAD_LOAD'] = '1'\n{MISFIT}"
    code = "try:\n" + "".join(f"    {line}\n" for line in asked.splitlines())
    code += "except RuntimeError as error:\n    print('> ', error)\n"
    assert "multithread load was asked for and cannot be had" in run(code, tmp_path)
