"""Options: one table; flag, then environment, then YAML, then default; nonsense is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from weightlift.hooks.options import OPTIONS, OptionError, settings
from weightlift.loading.settings import Settings


def test_every_option_is_a_setting_and_every_setting_an_option() -> None:
    names = {field.name for field in dataclasses.fields(Settings)} - {"asked"}
    assert names == {option.name for option in OPTIONS}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_explains_itself(option: object) -> None:
    assert option.help.endswith(".") and option.env.startswith("WEIGHTLIFT_")  # type: ignore[attr-defined]


def test_defaults_hold_where_nothing_is_said() -> None:
    assert settings({}) == Settings()
    assert settings({}).multithread_load


def test_environment_beats_yaml(tmp_path: Path) -> None:
    file = tmp_path / "weightlift.yaml"
    file.write_text("num_load_threads: 3\nstaging_mib: 64\nmultithread_load: false\n")
    found = settings({"WEIGHTLIFT_CONFIG": str(file), "WEIGHTLIFT_NUM_LOAD_THREADS": "5"})
    assert (found.num_load_threads, found.staging_mib, found.multithread_load) == (5, 64, False)
    assert found.asked == {"num_load_threads", "staging_mib", "multithread_load"}


@pytest.mark.parametrize("word", ["on", "off", "auto", "'on'"])
def test_yaml_takes_the_words_of_a_mode_without_quotes(word: str, tmp_path: Path) -> None:
    file = tmp_path / "weightlift.yaml"
    file.write_text(f"direct_io: {word}\nexchange: {word}\n")
    found = settings({"WEIGHTLIFT_CONFIG": str(file)})
    assert found.direct_io == found.exchange == word.strip("'")


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("WEIGHTLIFT_NUM_LOAD_THREADS", "many", "whole number from 1 to 256"),
        ("WEIGHTLIFT_NUM_LOAD_THREADS", "0", "whole number from 1 to 256"),
        ("WEIGHTLIFT_NUM_LOAD_THREADS", "257", "whole number from 1 to 256"),
        ("WEIGHTLIFT_MULTITHREAD_LOAD", "perhaps", "must be 1, true, on, 0, false or off"),
        ("WEIGHTLIFT_STAGING_MIB", "-1", "whole number from 16"),
        ("WEIGHTLIFT_LOAD_TIMELINE", "here.txt", r"ends in \.html, \.png or \.json"),
    ],
)
def test_nonsense_names_the_variable_and_what_is_allowed(
    variable: str, text: str, message: str
) -> None:
    with pytest.raises(OptionError, match=f"{variable}='{text}' .*{message}"):
        settings({variable: text})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("threads: 3", "unknown key threads; the keys are multithread_load"),
        ("- 3", "must map keys to values"),
        ("num_load_threads: lots", "num_load_threads='lots' must be"),
        ("a: [", "cannot read it"),
    ],
)
def test_a_yaml_file_that_makes_no_sense(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "weightlift.yaml"
    file.write_text(content)
    with pytest.raises(OptionError, match=message):
        settings({"WEIGHTLIFT_CONFIG": str(file)})


def test_a_watch_without_memory_is_refused() -> None:
    with pytest.raises(OptionError, match="give stage_gib"):
        settings({"WEIGHTLIFT_STAGE_WATCH": "/weights"})
    assert settings({"WEIGHTLIFT_STAGE_WATCH": "/w", "WEIGHTLIFT_STAGE_GIB": "1"}).stage_gib == 1


def test_a_yaml_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"gone\.yaml: cannot read it"):
        settings({"WEIGHTLIFT_CONFIG": str(tmp_path / "gone.yaml")})


def test_an_empty_yaml_file_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "weightlift.yaml"
    file.write_text("")
    assert settings({"WEIGHTLIFT_CONFIG": str(file)}) == Settings()
