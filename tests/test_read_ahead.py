"""Files are brought into the page cache while nobody else reads."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from engines.page_cache import cached

from weightlift.loading.benchmark import make_cold
from weightlift.loading.read_ahead import CHUNK_BYTES, ReadAhead
from weightlift.loading.settings import Settings
from weightlift.patches.sglang_diffusion.pipeline_load import PipelineLoad

SIZE = 3 * CHUNK_BYTES + 100


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files that are not cached."""
    made = [tmp_path / "one", tmp_path / "two"]
    for path in made:
        path.write_bytes(os.urandom(SIZE))
        make_cold(path)
        if cached(path):
            pytest.skip("this filesystem keeps its files in memory")
    return made


def wait_for(ahead: ReadAhead, nbytes: int) -> None:
    """Return once so much was read."""
    until = time.monotonic() + 20
    while ahead.bytes_read < nbytes:
        assert time.monotonic() < until, ahead.bytes_read
        time.sleep(0.001)


def test_files_are_read_in_order(files: list[Path]) -> None:
    with ReadAhead(lambda: False) as ahead:
        ahead.add([files[0].with_name("gone"), *files])
        wait_for(ahead, 2 * SIZE)
    assert [cached(file) for file in files] == [SIZE, SIZE]
    assert "weightlift-read-ahead" not in {thread.name for thread in threading.enumerate()}


def test_what_is_added_when_all_was_read_is_read_too(files: list[Path]) -> None:
    with ReadAhead(lambda: False) as ahead:
        for count, file in enumerate(files, 1):
            ahead.add([file])
            wait_for(ahead, count * SIZE)
            assert ahead._thread is not None
            ahead._thread.join(20)
            assert not ahead._thread.is_alive()
    assert [cached(file) for file in files] == [SIZE, SIZE]


def test_nothing_is_read_while_somebody_is_busy_and_the_end_does_not_wait(
    files: list[Path],
) -> None:
    asked = threading.Event()

    def is_busy() -> bool:
        asked.set()
        return True

    with ReadAhead(is_busy) as ahead:
        ahead.add(files)
        assert asked.wait(20)
    assert ahead.bytes_read == 0 and cached(files[0]) == 0


def test_no_more_is_read_than_there_is_room_for(files: list[Path]) -> None:
    with ReadAhead(lambda: False, most=CHUNK_BYTES) as ahead:
        ahead.add(files)
        wait_for(ahead, CHUNK_BYTES)
    assert ahead.bytes_read == CHUNK_BYTES


def test_what_others_read_now_is_left_to_them(files: list[Path]) -> None:
    with ReadAhead(lambda: False) as ahead:
        ahead.drop([str(files[0])])
        ahead.add(files)
        wait_for(ahead, SIZE)
    assert ahead.bytes_read == SIZE and cached(files[0]) == 0


def test_what_is_cached_is_not_read_again(files: list[Path]) -> None:
    files[0].read_bytes()
    with ReadAhead(lambda: False) as ahead:
        ahead.add(files)
        wait_for(ahead, SIZE)
    assert ahead.bytes_read == SIZE


def test_a_pipeline_has_the_files_of_all_components_read(files: list[Path]) -> None:
    root = files[0].parent
    for component, file in zip(("vae", "transformer"), files, strict=True):
        (root / component).mkdir()
        file.rename(root / component / "model.safetensors")
    components = ["vae", "scheduler", "transformer"]
    with PipelineLoad(components, Settings(), None, by_size=True) as load:
        load.begin(str(root / "scheduler"))
        load.begin(str(root / "vae"))
        wait_for(load.ahead, 2 * SIZE)
    assert load.ahead.bytes_read == 2 * SIZE
