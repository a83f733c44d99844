"""Patches: all of a module or none, each once, off again by handle."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wrapt
from packaging.version import Version

from weightlift.compat.engines import Engine, find_engine
from weightlift.compat.patch import Outcome, Patch, put_on, take_off
from weightlift.patches import INTEGRATIONS, SGLANG
from weightlift.patches.sglang import flags, keywords, loader

ALL = [*loader.PATCHES, *flags.PATCHES, *keywords.PATCHES]


def louder(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    return f"{wrapped(*args, **kwargs)}!"


def make_module() -> Any:
    """A module as engines have them: a function, and a class with every kind of method."""
    module = types.ModuleType("engine")

    def greet(name: str) -> str:
        return f"hello {name}"

    class Loader:
        def method(self, name: str) -> str:
            return f"method {name}"

        @staticmethod
        def static(name: str) -> str:
            return f"static {name}"

        @classmethod
        def cls(cls, name: str) -> str:
            return f"{cls.__name__} {name}"

    module.greet, module.Loader, module.number = greet, Loader, 3  # type: ignore[attr-defined]
    return module


def patch(path: str, **changes: Any) -> Patch:
    notes = {"why": "why", "how": "how", "upstream": "upstream", "drop_when": "then"}
    facts = {"target": f"engine:{path}", "versions": ">=1", "parameters": ("name",), **notes}
    return Patch(**{**facts, "wrapper": louder, **changes})


PATHS = ("greet", "Loader.method", "Loader.static", "Loader.cls")


def call(module: Any) -> list[str]:
    return [
        module.greet("x"),
        module.Loader().method("x"),
        module.Loader.static("x"),
        module.Loader.cls("x"),
    ]


PLAIN = ["hello x", "method x", "static x", "Loader x"]


def test_every_kind_of_function_is_patched_and_put_back() -> None:
    module = make_module()
    before = dict(vars(module.Loader))
    result, handles = put_on([patch(path) for path in PATHS], module)
    assert result.outcome is Outcome.APPLIED
    assert call(module) == [f"{text}!" for text in PLAIN]
    take_off(handles)
    assert call(module) == PLAIN
    assert dict(vars(module.Loader)) == before


def test_a_second_time_changes_nothing() -> None:
    module = make_module()
    _, first = put_on([patch("greet")], module)
    result, second = put_on([patch("greet")], module)
    assert result.outcome is Outcome.APPLIED and second == []
    assert module.greet("x") == "hello x!"
    take_off(first)
    assert module.greet("x") == "hello x"


@pytest.mark.parametrize(
    ("wrong", "detail"),
    [
        (patch("Loader.gone"), "engine:Loader.gone: there is no such name"),
        (patch("number"), "engine:number: it is a int, not a function"),
        (patch("Loader.static", parameters=("name", "extra")), "it takes no extra"),
    ],
)
def test_one_misfit_and_none_is_put_on(wrong: Patch, detail: str) -> None:
    module = make_module()
    result, handles = put_on([patch("greet"), wrong], module)
    assert (result.outcome, handles) == (Outcome.SHAPE, [])
    assert detail in result.detail
    assert call(module) == PLAIN


def test_a_patch_that_fails_takes_the_others_off() -> None:
    module = make_module()
    module.Fixed = int  # whose attributes cannot be set
    fixed = patch("Fixed.bit_length", parameters=("self",))
    result, handles = put_on([patch("greet"), fixed], module)
    assert (result.outcome, handles) == (Outcome.FAILED, [])
    assert "bit_length" in result.detail or "immutable" in result.detail
    assert call(module) == PLAIN


def test_off_from_under_a_foreign_wrapper() -> None:
    module = make_module()
    _, handles = put_on([patch("greet")], module)
    wrapt.wrap_function_wrapper(module, "greet", lambda w, i, a, k: f"({w(*a, **k)})")
    assert module.greet("x") == "(hello x!)"
    take_off(handles)
    assert module.greet("x") == "(hello x)"


@pytest.mark.parametrize("record", ALL, ids=lambda record: record.target)
def test_the_notes_of_every_patch_are_filled(record: Patch) -> None:
    for note in (record.why, record.how, record.upstream, record.drop_when):
        assert len(note) > 20 and note.endswith(".")
    assert record.versions and record.parameters


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("0.4.9.post2", True),
        ("0.4.9.post1", False),
        ("0.5.18.dev3+g1a2b3c", True),
        ("0.5.23", True),
        ("0.5.23.post1", True),
        ("0.5.24.dev1", False),
        ("0.6.0rc1", False),
        ("main", False),
        ("", False),
    ],
)
def test_the_versions_that_are_patched(version: str, fits: bool) -> None:
    engine = Engine("sglang", version, "")
    assert (SGLANG.selected_version(engine, untested=False) is not None) == fits
    assert SGLANG.selected_version(engine, untested=True) is not None


def test_each_release_gets_one_multi_thread_iterator() -> None:
    for version in ("0.4.9.post2", "0.5.8.post1", "0.5.9", "0.5.23"):
        names = [item.path for item in loader.PATCHES if item.fits(Version(version))]
        assert sum("multi_thread" in name for name in names) == 1
        assert len(names) == 7


def test_engines_that_are_not_here_are_not_found() -> None:
    assert {find_engine(integration.engine) for integration in INTEGRATIONS} == {None}


def test_a_stand_in_is_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's environments may have a package that is called vllm and is not."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_engine("vllm") is None
    (tmp_path / "vllm/model_executor/model_loader").mkdir(parents=True)
    assert find_engine("vllm") is not None
