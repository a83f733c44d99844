"""Files of /dev/shm that stay page-locked: nothing is read, and never are old bytes taken for new ones."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from weightlift.loading import pages, placement, readers, ring, shared_file, shared_files
from weightlift.loading.crew_spec import CrewSpec
from weightlift.loading.delivery import Delivery
from weightlift.loading.errors import CheckpointError
from weightlift.loading.memory import release
from weightlift.loading.report import LoadReport
from weightlift.loading.residency import is_in_memory
from weightlift.loading.session import LoadSession
from weightlift.loading.settings import Settings
from weightlift.loading.shared_files import SharedFiles
from weightlift.loading.state_dict import load_into

pytestmark = pytest.mark.skipif(
    not (os.path.isdir("/dev/shm") and is_in_memory(os.stat("/dev/shm").st_dev)),
    reason="needs a tmpfs at /dev/shm",
)

SHAPES = {"embedding": (700, 300), "norm": (300,), "projection": (300, 900)}
NBYTES = sum(4 * torch.Size(shape).numel() for shape in SHAPES.values())


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.fixture
def file() -> Iterator[Path]:
    """A checkpoint in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "model.safetensors"
        save_file(weights(0), path)
        yield path


class Host:
    """A host whose page-locking maps pages, as a real one does, and is counted."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.can_lock = True

    def register(self, memory: torch.Tensor) -> bool:
        if self.can_lock:
            self.locked[memory.data_ptr()] = memory.numel()
            pages.map_for_reading(memory.data_ptr(), memory.numel())
        return self.can_lock

    def unregister(self, memory: torch.Tensor) -> None:
        del self.locked[memory.data_ptr()]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """No device: the writer's thread copies from what is page-locked, as a device would."""
    made = Host()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(shared_files, "_files", SharedFiles())
    monkeypatch.setattr(shared_file, "register", made.register)
    monkeypatch.setattr(shared_file, "unregister", made.unregister)
    monkeypatch.setattr(ring, "register", lambda _: True)
    monkeypatch.setattr(ring, "unregister", lambda _: None)
    crew_for = readers.crew_for

    def pinned(*arguments: Any) -> CrewSpec:
        return dataclasses.replace(crew_for(*arguments), pinned=True)

    monkeypatch.setattr(readers, "crew_for", pinned)
    yield made
    made.can_lock = True
    release()


def load(
    path: Path, expected: dict[str, torch.Tensor], dtype: torch.dtype | None = None
) -> LoadReport:
    """Load, and see that every byte is right."""
    targets = {name: torch.zeros(w.shape, dtype=dtype or w.dtype) for name, w in expected.items()}
    settings = Settings(num_load_threads=2, readers="processes", shared_gib=1)
    report = load_into(targets, path, settings)
    for name, weight in expected.items():
        assert torch.equal(targets[name], weight.to(targets[name].dtype)), name
    return report


def wait_until(is_so: Callable[[], object]) -> None:
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def kept() -> list[shared_file.SharedFile]:
    return list(shared_files.shared_files()._files.values())


def wait_for_locking() -> None:
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "weightlift-lock"])


def load_and_wait(path: Path, seed: int) -> LoadReport:
    """A load, and what is page-locked after it."""
    report = load(path, weights(seed))
    wait_for_locking()
    assert [file.path for file in kept()] == [str(path)]
    return report


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as stored", "cast"])
def test_nothing_is_read_of_what_is_written_over_in_place(
    file: Path, host: Host, dtype: torch.dtype | None
) -> None:
    assert load_and_wait(file, 0).bytes_read > NBYTES
    assert sum(host.locked.values()) == file.stat().st_size
    for seed in range(2):
        with file.open("r+b") as writing:
            writing.write(save(weights(seed)))
        report = load(file, weights(seed), dtype)
        assert report.bytes_staged == NBYTES
        assert report.bytes_read == file.stat().st_size - NBYTES, "the header alone"
    assert len(host.locked) == 1


def test_a_window_of_two_pieces_is_read(
    file: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_file, "PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(placement, "HOST_WINDOW_BYTES", 256 << 10)
    load_and_wait(file, 0)
    assert len(host.locked) == 2 and sum(host.locked.values()) == file.stat().st_size
    report = load(file, weights(0))
    assert 0 < report.bytes_staged < NBYTES
    assert report.bytes_staged + report.bytes_read == file.stat().st_size


@pytest.mark.parametrize("how", ["cut off", "replaced"])
def test_what_has_other_pages_is_read_and_locked_anew(file: Path, host: Host, how: str) -> None:
    load_and_wait(file, 0)
    (before,) = kept()
    if how == "cut off":
        file.write_bytes(save(weights(1)))
    else:
        save_file(weights(1), file.with_name("new"))
        os.replace(file.with_name("new"), file)
    assert load_and_wait(file, 1).bytes_staged == 0
    (after,) = kept()
    assert after is not before
    assert sum(host.locked.values()) == file.stat().st_size, "the old pages are free"
    assert load(file, weights(1)).bytes_staged == NBYTES


def test_a_file_that_is_cut_off_while_it_is_copied_is_an_error(
    file: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_and_wait(file, 0)
    flush = Delivery.flush

    def flush_and_cut_off(self: Delivery) -> None:
        flush(self)  # before: here it is the host that copies, and maps what it copies
        file.write_bytes(save(weights(1)))

    with monkeypatch.context() as patched:
        patched.setattr(Delivery, "flush", flush_and_cut_off)
        with pytest.raises(CheckpointError, match=r"model\.safetensors.*cut off.*Load again"):
            load(file, weights(0))
    load_and_wait(file, 1)


def test_without_the_setting_nothing_is_kept(file: Path, host: Host) -> None:
    targets = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    load_into(targets, file, Settings(num_load_threads=2, readers="processes"))
    wait_for_locking()
    assert not kept() and not host.locked


def test_a_file_on_a_disk_is_not_kept(tmp_path: Path, host: Host) -> None:
    if is_in_memory(tmp_path.stat().st_dev):
        pytest.skip("temporary files are in memory here")
    save_file(weights(0), tmp_path / "model.safetensors")
    load(tmp_path / "model.safetensors", weights(0))
    assert not kept() and not host.locked


@pytest.mark.parametrize("why", ["too large", "not lockable", "read-only"])
def test_what_cannot_be_kept_is_read_and_said_so(
    file: Path,
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: str,
) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_RDWR and str(path) == str(file):
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *more)

    if why == "too large":
        little = property(lambda _: 1000, lambda *_: None)
        monkeypatch.setattr(SharedFiles, "most_bytes", little, raising=False)
    elif why == "not lockable":
        host.can_lock = False
    else:
        monkeypatch.setattr(os, "open", refuse)
    with caplog.at_level(logging.WARNING, "weightlift"):
        for _ in range(3):
            assert load(file, weights(0)).bytes_staged == 0
            wait_for_locking()
    assert caplog.text.count("is not kept page-locked") == 1
    assert not kept() and not host.locked


def test_release_frees_what_is_kept(file: Path, host: Host) -> None:
    load_and_wait(file, 0)
    assert str(file) in Path("/proc/self/maps").read_text()
    assert release() >= file.stat().st_size
    assert not host.locked and str(file) not in Path("/proc/self/maps").read_text()
    assert load_and_wait(file, 0).bytes_staged == 0, "it is kept once more"


@pytest.mark.parametrize("what", ["released", "cut off"])
def test_what_happens_to_a_file_while_it_is_locked_is_seen(
    file: Path, host: Host, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Between two pieces it is cut off and has its length again, or all is released."""
    monkeypatch.setattr(shared_file, "PIECE_BYTES", 1 << 20)
    shared, register = SharedFiles(), host.register
    shared.most_bytes = 1 << 30

    def register_and_happen(memory: torch.Tensor) -> bool:
        found = register(memory)
        if len(host.locked) == 1 and what == "released":
            assert shared.release() == 0
        elif len(host.locked) == 1:
            os.truncate(file, 4096)
            file.write_bytes(save(weights(1)))
        return found

    monkeypatch.setattr(shared_file, "register", register_and_happen)
    facts = file.stat()
    identity = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    shared._add(str(file), identity, 0)
    assert not shared._files and not host.locked


def test_locking_is_no_change_of_the_file(file: Path, host: Host) -> None:
    before = file.stat().st_mtime_ns
    load_and_wait(file, 0)
    assert file.stat().st_mtime_ns == before


def test_nothing_is_locked_after_a_launch(file: Path, host: Host) -> None:
    with LoadSession(Settings(shared_gib=1), LoadReport(phase="launch")) as session:
        session.open([str(file)])
    wait_for_locking()
    assert not kept() and not host.locked


def test_what_is_released_within_a_load_is_free_after_it(file: Path, host: Host) -> None:
    load_and_wait(file, 0)
    with LoadSession(Settings(shared_gib=1), LoadReport(phase="launch")) as session:
        session.open([str(file)])
        assert shared_files.shared_files().release() == 0 and host.locked
    assert not kept() and not host.locked


def test_a_forked_child_has_no_such_files_open(file: Path, host: Host) -> None:
    load_and_wait(file, 0)
    child = os.fork()
    if not child:
        links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        os._exit(int(str(file) in links or bool(kept())))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert load(file, weights(0)).bytes_staged == NBYTES


def test_what_was_deleted_is_free_with_the_next_load(file: Path, host: Host) -> None:
    load_and_wait(file, 0)
    other = file.with_name("other.safetensors")
    save_file(weights(1), other)
    file.unlink()
    load(other, weights(1))
    wait_for_locking()
    assert [kept_file.path for kept_file in kept()] == [str(other)]


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["in place", "cut off"])
def test_a_device_copies_from_the_file(file: Path, how: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here; scripts/gpu runs this on one")
    settings = Settings(num_load_threads=2, shared_gib=1)
    targets = {name: torch.zeros(shape, device="cuda") for name, shape in SHAPES.items()}
    staged = []
    for seed in range(4):
        with file.open("r+b" if how == "in place" else "wb") as writing:
            writing.write(save(weights(seed)))
        staged.append(load_into(targets, file, settings).bytes_staged)
        assert all(torch.equal(targets[name].cpu(), w) for name, w in weights(seed).items())
        wait_for_locking()
    assert staged == [0, *[NBYTES if how == "in place" else 0] * 3]
    release()
