"""Fast load on the real SGLang: every architecture that declares its families, bit by bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from engines import environment
from engines.cases import STOCK, Case, expert_parallel_flags, run_cases
from engines.checkpoints import CONFIGS, MORE_CONFIGS, make_checkpoint

pytestmark = pytest.mark.engine

GENERATIONS = environment.releases("0.5.9", "0.5.23", more=["0.4.9.post2"])
FAST = ("--enable-fast-load",)
WITH_EXPERTS = ("qwen3moe", "deepseek", "glm4moe")
LAYERS = 6


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("deep")
    return {
        kind: (
            make_checkpoint(folder / f"{kind}-0", kind, 0, layers=LAYERS, shards=3),
            make_checkpoint(folder / f"{kind}-1", kind, 1, layers=LAYERS, shards=3),
        )
        for kind in (*CONFIGS, *MORE_CONFIGS)
    }


@pytest.mark.parametrize("version", GENERATIONS)
def test_what_is_derived_is_what_the_engine_loads(
    version: str, deep: dict[str, tuple[Path, Path]]
) -> None:
    cases = []
    for kind, (first, second) in deep.items():
        cases.append(Case(kind, first, (second, first), flags=FAST))
        flags = expert_parallel_flags(version) if kind in WITH_EXPERTS else ()
        cases.append(Case(f"{kind} on two", first, (second,), tp=2, flags=FAST, args=flags))
    for name, outcome in run_cases(version, cases).items():
        if outcome.error(STOCK):
            assert (version, name.split()[0]) in STOCK_FAILS, (name, outcome.error(STOCK))
            continue
        assert outcome.verdict == "same", (name, outcome.told, outcome.reports)
        ranks = 2 if "two" in name else 1
        assert outcome.each("plan")[: 2 * ranks] == ["fast"] * 2 * ranks, (name, outcome.reports)
        assert all(count > 0 for count in outcome.each("extrapolated")[: 2 * ranks]), name


STOCK_FAILS = {("0.4.9.post2", "deepseek"), ("0.4.9.post2", "glm4moe")}
"""What these releases cannot load on a CPU."""


def test_planning_does_not_grow_with_the_model(tmp_path: Path) -> None:
    cases = [
        Case(
            f"{layers} layers of {experts}",
            make_checkpoint(
                tmp_path / f"{layers}-{experts}", "qwen3moe", 0, layers=layers, experts=experts
            ),
            flags=FAST,
        )
        for layers, experts in ((6, 64), (12, 64), (6, 128))
    ]
    outcomes = run_cases("0.5.17", cases)
    assert {outcome.verdict for outcome in outcomes.values()} == {"same"}
    seen = {outcome.each("planned")[0] for outcome in outcomes.values()}
    assert len(seen) == 1, seen


def test_what_does_not_repeat_is_planned_in_full(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "shallow", "qwen3", 0)
    extra = ("--model-loader-extra-config", '{"enable_fast_load": true}')
    (outcome,) = run_cases("0.5.17", [Case("two layers", model, flags=extra)]).values()
    assert outcome.is_same
    assert outcome.each("plan") == ["full"]
    assert outcome.each("plan_note") == ["nothing repeats in it"]


def test_the_engines_own_configuration_can_ask_for_it(
    deep: dict[str, tuple[Path, Path]],
) -> None:
    first, second = deep["qwen3"]
    extra = ("--model-loader-extra-config", '{"enable_fast_load": true, "num_threads": 3}')
    (outcome,) = run_cases("0.5.17", [Case("extra", first, (second,), flags=extra)]).values()
    assert outcome.is_same, outcome.told
    assert outcome.each("plan") == ["fast", "fast"], "an update keeps the launch's configuration"
    assert outcome.each("threads") == [3, 3]


@pytest.mark.parametrize("asked", ["by flag", "by configuration"])
def test_a_model_that_it_does_not_know(
    asked: str, deep: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    model = shutil.copytree(deep["llama"][0], tmp_path / "mistral")
    config = json.loads((model / "config.json").read_text())
    config.update(architectures=["MistralForCausalLM"], model_type="mistral")
    (model / "config.json").write_text(json.dumps(config))
    extra = ("--model-loader-extra-config", '{"enable_fast_load": true}')
    flags = FAST if asked == "by flag" else extra
    (outcome,) = run_cases("0.5.17", [Case(asked, model, flags=flags)]).values()
    assert not outcome.error(STOCK)
    if asked == "by flag":
        error = outcome.error("weightlift")
        assert "not tested with MistralForCausalLM" in error and "Leave out" in error
    else:
        assert outcome.verdict == "same"
        assert outcome.each("plan") == ["full"]
