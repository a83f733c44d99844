"""What is shipped, and what runs at the start of every interpreter."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).resolve().parents[1]
FOLDERS = ("compat", "hooks", "loading", "patches")
START_UP = {"weightlift.pth", "weightlift.start"}
MAY_IMPORT = {
    "loading": {"loading"},
    "compat": {"compat", "loading"},
    "patches": {"patches", "compat", "loading"},
    "hooks": {"hooks", "patches", "compat", "loading"},
}


def project() -> dict[str, Any]:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    return tomllib.loads((TOP / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    found = {"weightlift"}
    for folder in FOLDERS:
        for init in (TOP / folder).rglob("__init__.py"):
            found.add(".".join(("weightlift", *init.parent.relative_to(TOP).parts)))
    assert set(project()["tool"]["setuptools"]["packages"]) == found


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_link_leads_to_its_folder(folder: str) -> None:
    assert (TOP / "weightlift" / folder).resolve() == TOP / folder


def test_the_version_stands_in_one_more_place_only() -> None:
    import weightlift

    assert project()["project"]["version"] == weightlift.__version__


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_imports_against_the_arrow(folder: str) -> None:
    for file in (TOP / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                parts = name.split(".")
                if parts[0] == "weightlift" and len(parts) > 1:
                    assert parts[1] in MAY_IMPORT[folder], f"{file} imports {name}"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel from the sdist, the sdist, and an editable wheel."""
    out = tmp_path_factory.mktemp("dist")
    code = (
        "import sys, setuptools.build_meta as build\n"
        "out = sys.argv[1]  # which the build changes\n"
        "build.build_sdist(out), build.build_wheel(out), build.build_editable(out + '/editable')\n"
    )
    (out / "editable").mkdir()
    copy = tmp_path_factory.mktemp("copy") / "weightlift"
    names = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True, check=True)
    for name in names.stdout.splitlines():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (TOP / name).is_symlink():
            target.symlink_to((TOP / name).readlink())
        elif (TOP / name).exists():
            target.write_bytes((TOP / name).read_bytes())
    subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=copy, check=True, capture_output=True
    )
    return out


def test_wheel_sdist_and_editable_install_carry_the_start_up_files(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    (editable,) = built.glob("editable/*.whl")
    for file in (wheel, editable):
        assert set(zipfile.ZipFile(file).namelist()) >= START_UP, file
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"weightlift/{folder}/__init__.py" for folder in FOLDERS} <= names
    assert not any(name.startswith(("tests", "scripts", *FOLDERS)) for name in names)
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= START_UP | {"CHANGELOG.md", "LICENSE", "loading/session.py", "scripts/test"}


def python(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    keep = {key: value for key, value in os.environ.items() if not key.startswith("WEIGHTLIFT")}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**keep, **environ}
    )


def test_the_start_of_an_interpreter_imports_os_and_sys_alone() -> None:
    ran = python("-X", "importtime", "-c", "pass")
    imported = [line.split("|")[-1].strip() for line in ran.stderr.splitlines()]
    ours = [name for name in imported if name.startswith("weightlift")]
    assert ours == ["weightlift", "weightlift.hooks", "weightlift.hooks.startup"]
    assert not {"wrapt", "torch", "logging", "importlib.metadata", "typing"} & set(imported)


def test_a_hook_that_fails_leaves_the_interpreter_and_the_import_alone(tmp_path: Path) -> None:
    engine = tmp_path / "sglang"
    engine.mkdir()
    (engine / "__init__.py").write_text("up = True\n")
    broken = "import weightlift.hooks, sys; sys.modules['weightlift.hooks.bootstrap'] = None\n"
    ran = python("-c", f"{broken}import sglang; print(sglang.up)", PYTHONPATH=str(tmp_path))
    assert ran.stdout == "True\n", ran.stderr
    assert "weightlift is off in this process: it failed to start" in ran.stderr


@pytest.mark.parametrize("word", ["0", "off", "False"])
def test_switched_off_it_says_so_once_and_patches_nothing(tmp_path: Path, word: str) -> None:
    engine = tmp_path / "sglang"
    engine.mkdir()
    (engine / "__init__.py").write_text("up = True\n")
    code = "import sglang, sys; print('weightlift.hooks.bootstrap' in sys.modules)"
    ran = python("-c", code, PYTHONPATH=str(tmp_path), WEIGHTLIFT=word)
    assert ran.stdout == "False\n"
    assert ran.stderr == f"weightlift: off in this process (WEIGHTLIFT={word})\n"


def test_the_root_folders_are_not_importable_by_their_own_names(tmp_path: Path) -> None:
    code = f"import importlib.util as u; print([u.find_spec(n) for n in {FOLDERS}])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.strip() == str([None] * len(FOLDERS))


def test_what_is_generated_is_up_to_date() -> None:
    ran = python(str(TOP / "scripts/docs.py"), "--check")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("group", ["sglang.srt.plugins", "sglang.multimodal_gen.plugins"])
def test_the_plugin_entry_points_install_without_an_engine(group: str) -> None:
    code = (
        "from importlib.metadata import entry_points\n"
        f"(plugin,) = entry_points(group='{group}', name='weightlift')\n"
        "install = plugin.load()\n"
        "install(), install()\n"
        "from weightlift.hooks import bootstrap\n"
        "print(bootstrap.results()['sglang'].outcome.value)\n"
    )
    ran = python("-c", code)
    assert ran.stdout == "not-installed\n", ran.stderr
