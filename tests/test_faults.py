"""Loads that go wrong: a clear error, nothing hangs, nothing is left open (see ``no_leaks``)."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightlift.loading.errors import CheckpointError
from weightlift.loading.report import LoadReport
from weightlift.loading.settings import Settings
from weightlift.loading.state_dict import load, load_into


def test_a_shard_that_shrinks_while_it_is_read(save: Any, open_session: Any) -> None:
    (path,) = save({"w": torch.randn(1024, 1024)})
    with pytest.raises(CheckpointError, match=r"model-00000\.safetensors: it ends at byte"):
        with open_session() as session:
            for _, lazy in session.guard(session.iterate([path])):
                os.truncate(path, 1 << 20)
                torch.zeros(1024, 1024).copy_(lazy)


def test_a_shard_that_shrinks_before_a_small_read(save: Any, open_session: Any) -> None:
    (path,) = save({"w": torch.randn(64)})
    with pytest.raises(CheckpointError, match="truncated while read"):
        with open_session() as session:
            for _, lazy in session.guard(session.iterate([path])):
                os.truncate(path, 100)
                torch.zeros(64).copy_(lazy)


def test_a_shard_that_is_deleted_while_it_is_read_is_read_to_its_end(
    save: Any, open_session: Any
) -> None:
    weight, target = torch.randn(256, 256), torch.zeros(256, 256)
    (path,) = save({"w": weight})
    with open_session() as session:
        for _, lazy in session.guard(session.iterate([path])):
            os.unlink(path)
            target.copy_(lazy)
    assert torch.equal(target, weight)


def test_a_directory_that_vanished_is_named(tmp_path: Path, open_session: Any) -> None:
    with open_session() as session, pytest.raises(CheckpointError, match="directory deleted"):
        list(session.iterate([str(tmp_path / "gone/model.safetensors")]))


# Readers in processes are out of a patch's reach; tests/test_crew.py has theirs.
@pytest.mark.parametrize("open_session", ["auto"], indirect=True)
def test_a_device_that_fails(save: Any, open_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = save({f"w{number}": torch.randn(64, 64) for number in range(50)})

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(CheckpointError, match="Input/output error"):
        with open_session() as session:
            for _, lazy in session.guard(session.iterate(paths)):
                monkeypatch.setattr(os, "preadv", fail)
                torch.zeros(64, 64).copy_(lazy)


def test_short_reads_are_continued(
    save: Any, open_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {f"w{number}": torch.randn(64, 64) for number in range(10)}
    paths, preadv = save(weights), os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    loaded = load(Path(paths[0]))
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=lambda kind: kind.__name__)
def test_a_loader_that_fails_half_way(
    error: type[BaseException], save: Any, open_session: Any
) -> None:
    paths = save({f"w{number}": torch.randn(64, 64) for number in range(20)})
    with pytest.raises(error, match="half way"):
        with open_session() as session, session.armed():
            for number, (_, lazy) in enumerate(session.guard(session.iterate(paths))):
                torch.zeros(64, 64).copy_(lazy)
                if number == 10:
                    raise error("half way")


def test_a_loader_that_stops_early_has_what_it_took(save: Any, open_session: Any) -> None:
    weights = {f"w{number}": torch.randn(64, 64) for number in range(20)}
    targets = []
    with open_session() as session:
        for _, lazy in session.guard(session.iterate(save(weights))):
            targets.append(torch.zeros(64, 64))
            targets[-1].copy_(lazy)
            if len(targets) == 5:
                break
        session.finish(torch.nn.Module())
    assert all(
        torch.equal(target, weights[name])
        for target, name in zip(targets, sorted(weights), strict=False)
    )


def test_a_session_that_nobody_iterates_ends(open_session: Any) -> None:
    with open_session() as session:
        session.flush()
        session.finish(torch.nn.Module())


def test_memory_for_one_reader_is_enough(save: Any) -> None:
    weights = {f"w{number}": torch.randn(512, 512) for number in range(40)}
    targets = {name: torch.zeros(512, 512) for name in weights}
    (path,) = save(weights)
    report = load_into(targets, path, Settings(num_load_threads=64, staging_mib=1))
    assert report.threads == 1
    assert all(torch.equal(targets[name], weights[name]) for name in weights)


def test_load_into_names_what_does_not_fit(save: Any) -> None:
    (path,) = save({"w": torch.randn(4, 4)})
    with pytest.raises(CheckpointError, match=r"'w'.*\(4, 4\).*\(4, 5\)"):
        load_into({"w": torch.zeros(4, 5)}, path)
    with pytest.raises(CheckpointError, match="'missing'.*not in the checkpoint"):
        load_into({"w": torch.zeros(4, 4), "missing": torch.zeros(1)}, path)


def test_of_a_name_in_two_files_the_last_one_counts(tmp_path: Path) -> None:
    for number, file in enumerate(("model", "model_ema")):
        weights = {f"w{each}": torch.full((64, 64), float(number)) for each in range(6)}
        save_file(weights, tmp_path / f"{file}.safetensors")
    targets = {f"w{each}": torch.full((64, 64), 7.0) for each in range(6)}
    report = load_into(targets, tmp_path)
    assert all(torch.equal(target, torch.ones(64, 64)) for target in targets.values())
    assert report.planned == 6, "each is read once"
    assert report.bytes_needed == sum(target.nbytes for target in targets.values())


def test_a_report_is_one_json_line_a_load(tmp_path: Path) -> None:
    file = tmp_path / "report.jsonl"
    for phase in ("launch", "update"):
        LoadReport(engine="sglang", phase=phase, bytes_needed=7).finish(Settings(report=str(file)))
    first, second = map(json.loads, file.read_text().splitlines())
    assert (first["phase"], second["phase"], first["bytes_needed"]) == ("launch", "update", 7)
    assert "started" not in first


def test_a_report_that_cannot_be_written_fails_no_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    LoadReport().finish(Settings(report=str(tmp_path / "no/such/folder")))
    assert "cannot write the report" in caplog.text
