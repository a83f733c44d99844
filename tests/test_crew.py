"""Readers in processes of their own: the same bytes, the same errors, and nothing left behind."""

from __future__ import annotations

import collections
import ctypes
import errno
import fcntl
import gc
import logging
import mmap
import os
import platform
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightlift.loading import crew as crew_module
from weightlift.loading import crews as crews_module
from weightlift.loading import (
    feeder,
    pages,
    placement,
    reader_group,
    readers,
    ring,
    words,
    worker,
    writers,
)
from weightlift.loading.crew import Crew, cut
from weightlift.loading.crew_spec import CrewSpec, Way
from weightlift.loading.crews import Crews, crews
from weightlift.loading.errors import CheckpointError, PlanAborted
from weightlift.loading.files import ShardFile
from weightlift.loading.plan import Window
from weightlift.loading.reader_group import ReaderGroup
from weightlift.loading.report import LoadReport
from weightlift.loading.settings import Settings
from weightlift.loading.state_dict import load_into
from weightlift.loading.words import LINE, MOST_WINDOWS, NEVER, Words
from weightlift.loading.worker import part_of
from weightlift.loading.writers import CudaWriter, ThreadWriter

READERS = 2
SPEC = CrewSpec(READERS, 3, 1 << 20)
KINDS = pytest.mark.parametrize("in_processes", [True, False], ids=["processes", "threads"])


def no_thread(*_: Any) -> None:
    raise RuntimeError("can't start new thread")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crews]:
    """Crews of this test alone."""
    mine = Crews()
    monkeypatch.setattr(feeder, "crews", mine)
    yield mine
    mine.release()


def fill(path: str, weights: dict[str, torch.Tensor], **settings: Any) -> LoadReport:
    """Load through a crew, and see that every byte is right."""
    targets = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    chosen: dict[str, Any] = {"num_load_threads": READERS, "readers": "processes", **settings}
    report = load_into(targets, path, Settings(**chosen))
    assert all(torch.equal(targets[name], weights[name]) for name in weights)
    return report


@pytest.fixture
def waiting(save: Any, own: Crews) -> tuple[str, dict[str, torch.Tensor], Crew]:
    """A file, its weights, and the crew that has read it and waits for more."""
    weights = {"w": torch.randn(100, 100)}
    (path,) = save(weights)
    fill(path, weights)
    assert own._kept is not None
    return path, weights, own._kept


@pytest.fixture
def many(save: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, torch.Tensor]]:
    """A file that is read in 80 windows, and its weights."""
    weights = {f"w{number:02}": torch.randn(500, 1000) for number in range(40)}
    monkeypatch.setattr(placement, "HOST_WINDOW_BYTES", 1 << 20)
    return save(weights)[0], weights


def descriptors(pid: int) -> set[str]:
    """What a process has open."""
    return {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.exists()}


def family(pid: int) -> list[int]:
    """The readers that a process forked."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def supervisor(crew: Crew) -> int:
    assert crew.readers.process is not None
    return crew.readers.process.pid


def wait_until_read(crew: Crew, window: int, parts: int) -> None:
    line = window % crew.spec.slots * LINE
    until = time.monotonic() + 30
    while any(crew.words.read[line + part] < window for part in range(parts)):
        assert time.monotonic() < until
        time.sleep(0.001)


def ways(path: Path) -> tuple[ShardFile, Way]:
    file = ShardFile.open(str(path))
    return file, file.way(is_direct=False)


@KINDS
def test_a_crew_reads_what_it_is_asked_for_into_slots_that_are_free(
    tmp_path: Path, in_processes: bool
) -> None:
    data = os.urandom(9_000_000)
    (tmp_path / "file").write_bytes(data)
    file, way = ways(tmp_path / "file")
    crew = Crew(CrewSpec(READERS, 2, 3 << 20, in_processes=in_processes))
    crew.start()
    wanted = [(start, start + 3_000_007) for start in range(0, 5_000_000, 700_001)]
    asked = [(*crew.ask(way, way, *span), span) for span in wanted]
    assert [number for number, *_ in asked] == list(range(2, 2 + len(wanted)))
    for number, parts, place, (start, stop) in asked:
        assert parts == 2
        wait_until_read(crew, number, parts)
        time.sleep(0.02)  # nobody writes to it before it is free
        assert crew.ring.view[place : place + stop - start] == data[start:stop]
        crew.words.free[number % 2 * LINE] = number
    assert not any(crew.words.short)
    file.close()
    assert crew.release() == crew.spec.memory_bytes


@KINDS
def test_a_pipe_in_which_a_writer_might_wait_is_refused(
    in_processes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors(os.getpid())
    monkeypatch.setattr(fcntl, "F_GETPIPE_SZ", fcntl.F_GETFD)  # a small number
    crew = Crew(CrewSpec(READERS, 3, 1 << 20, in_processes=in_processes))
    with pytest.raises(OSError, match="too many pipes"):
        crew.start()
    crew.release()
    assert descriptors(os.getpid()) == before


def test_readers_of_another_version_are_not_spoken_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker, "LAYOUT", "another")
    crew = Crew(SPEC)
    crew.start()
    assert crew.is_started and not crew.in_processes, "threads of this version read"
    assert "upgraded meanwhile" in caplog.text
    crew.release()


def test_windows_of_many_parts_are_asked_for_again_and_again(tmp_path: Path) -> None:
    window = 3 << 20
    data = os.urandom(window + 2 * MOST_WINDOWS * 1000)
    (tmp_path / "file").write_bytes(data)
    file, way = ways(tmp_path / "file")
    crew = Crew(CrewSpec(READERS, 3, window))
    crew.start()
    for start in range(0, 2 * MOST_WINDOWS * 1000, 1000):
        number, parts, place = crew.ask(way, way, start, start + window)
        assert parts == 2
        wait_until_read(crew, number, parts)
        assert crew.ring.view[place : place + window] == data[start : start + window]
        crew.words.free[number % 3 * LINE] = number
    file.close()
    crew.release()


@pytest.mark.parametrize("start", [0, 12353, 1 << 20])
def test_reads_past_the_page_cache_are_larger(tmp_path: Path, start: int) -> None:
    data = os.urandom(start + (12 << 20))
    (tmp_path / "file").write_bytes(data)
    file, plain = ways(tmp_path / "file")
    file.direct_io = "on"
    direct = file.way(is_direct=True)
    if direct.descriptor < 0:
        pytest.skip("this filesystem has no reads past the page cache")
    crew = Crew(CrewSpec(READERS, 3, 12 << 20))
    crew.start()
    for way, expected in ((plain, 6), (direct, 3)):
        window, parts, place = crew.ask(way, plain, start, len(data))
        assert parts == expected
        wait_until_read(crew, window, parts)
        assert crew.ring.view[place : place + (12 << 20)] == data[start:]
    file.close()
    crew.release()


def test_what_is_not_read_past_the_page_cache_is_read_through_it(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    (tmp_path / "file").write_bytes(data)
    file, way = ways(tmp_path / "file")
    with (tmp_path / "other").open("wb") as unreadable:
        crew = Crew(SPEC)
        crew.start()
        bad = Way(way.number + 1_000_000, unreadable.fileno(), 4096)
        window, parts, place = crew.ask(bad, way, 5_000, 100_000)
        wait_until_read(crew, window, parts)
    assert crew.ring.view[place : place + 95_000] == data[5_000:] and not any(crew.words.short)
    window, parts, _ = crew.ask(way, way, 5_000, 100_001)
    wait_until_read(crew, window, parts)
    assert crew.words.short[window % crew.spec.slots * LINE] == window
    file.close()
    crew.release()


def test_the_table_of_jobs_is_filled_again_and_again(tmp_path: Path) -> None:
    data = os.urandom(3 * MOST_WINDOWS)
    (tmp_path / "file").write_bytes(data)
    file, way = ways(tmp_path / "file")
    crew = Crew(CrewSpec(READERS, 2, 1 << 12))
    crew.start()
    asked: list[tuple[int, int, int]] = []
    for start in range(len(data)):
        asked.append(crew.ask(way, way, start, start + 1))
        if len(asked) == MOST_WINDOWS or start == len(data) - 1:
            for number, parts, place in asked:
                wait_until_read(crew, number, parts)
                assert crew.ring.view[place] == data[number - 2]
                crew.words.free[number % 2 * LINE] = number
            asked.clear()
    file.close()
    crew.release()


def test_more_files_than_wait_for_a_reader_are_closed_between(
    save: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_module, "MOST_FILES", 2)
    shards = [{f"w{number}": torch.randn(300, 100)} for number in range(20)]
    folder = Path(save(*shards)[0]).parent
    fill(str(folder), {name: weight for shard in shards for name, weight in shard.items()})


def test_descriptors_that_are_too_many_on_their_way_are_sent_again(
    save: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [{f"w{number}": torch.randn(300, 100)} for number in range(3)]
    folder = Path(save(*shards)[0]).parent
    tell_each, refused = ReaderGroup.tell_each, [0]

    def refuse_once(self: ReaderGroup, message: bytes, along: Any = ()) -> None:
        tell_each(self, message, along)  # as far as it came
        if along and not refused[0]:
            refused[0] += 1
            raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")

    monkeypatch.setattr(ReaderGroup, "tell_each", refuse_once)
    fill(str(folder), {name: weight for shard in shards for name, weight in shard.items()})
    assert refused == [1]


def test_nobody_waits_for_a_reader_that_was_killed(tmp_path: Path) -> None:
    crew = Crew(SPEC)
    crew.start()
    os.kill(family(supervisor(crew))[0], signal.SIGKILL)
    until = time.monotonic() + 30
    while not all(word == NEVER for word in (*crew.words.read, *crew.words.free)):
        assert time.monotonic() < until
        time.sleep(0.001)
    with pytest.raises(PlanAborted, match="a reader process died"):
        crew.readers.check()
    crew.release()


@pytest.fixture
def broken_pipes_kill() -> Iterator[None]:
    """As in programs that end in silence when what they write to does."""
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGPIPE, before)


def test_to_ask_readers_that_were_killed_does_not_end_this_process(
    tmp_path: Path, broken_pipes_kill: None
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(mmap.PAGESIZE))
    crew = Crew(SPEC)
    crew.start()
    file, way = ways(path)
    window, parts, _ = crew.ask(way, way, 0, mmap.PAGESIZE)
    wait_until_read(crew, window, parts)
    for reader in family(supervisor(crew)):
        os.kill(reader, signal.SIGKILL)
    assert crew.readers.process is not None
    crew.readers.process.wait(30)
    crew.ask(way, way, 0, mmap.PAGESIZE)
    with pytest.raises(PlanAborted, match="a reader process died"):
        crew.readers.check()
    crew.release()
    file.close()


def test_the_same_processes_serve_the_next_load_and_have_no_file_open(
    save: Any, own: Crews
) -> None:
    weights = {f"w{number}": torch.randn(300, 1000) for number in range(12)}
    (path,) = save(weights)
    seen = []
    for _ in range(3):
        assert fill(path, weights).threads == READERS
        crew = own._kept
        assert crew is not None
        seen.append(sorted(family(supervisor(crew))))
        assert len(seen[-1]) == READERS
        for pid in (supervisor(crew), *seen[-1]):
            assert not [name for name in descriptors(pid) if name.endswith(".safetensors")]
    assert seen[0] == seen[1] == seen[2]


class WatchedReader(worker.Reader):
    """Says whether descriptors wait for it when it answers."""

    def __init__(self, *args: Any) -> None:
        self.found: list[bool] = []
        super().__init__(*args)

    def _answer(self, answer: int) -> None:
        assert self._own is not None
        self.found.append(bool(select.select([self._own], [], [], 0)[0]))
        super()._answer(answer)


def test_a_file_that_a_reader_never_needed_is_closed_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    memory = memoryview(mmap.mmap(-1, words.words_bytes(1)))
    jobs, numbers = os.pipe()
    answers, done = os.pipe()
    ours, theirs = socket.socketpair()
    reader = WatchedReader(jobs, theirs, done, memory, 1)
    ours.send(words.FILE.pack(0))
    file = os.open(tmp_path / "file", os.O_RDONLY)
    for number in range(1, 4):
        socket.send_fds(ours, [words.FILE.pack(number)], [file])
    os.write(numbers, words.NUMBER.pack(words.CLOSE))
    thread = threading.Thread(target=reader.serve)
    thread.start()
    while len(reader.found) < 2 and thread.is_alive():
        time.sleep(0.001)
    ours.send(words.FILE.pack(0))
    os.close(numbers)
    thread.join()
    for descriptor in (file, jobs, answers, done):
        os.close(descriptor)
    ours.close()
    theirs.close()
    assert reader.found == [True, False], "none waits when it says that all are closed"
    assert not reader.files


def test_each_byte_is_read_once(save: Any, own: Crews) -> None:
    weights = {f"w{number:02d}": torch.randn(number * 100 + 1, 257) for number in range(12)}
    (path,) = save(weights)
    assert fill(path, weights).bytes_read == os.path.getsize(path)


def test_processes_without_work_end_and_are_started_again(
    save: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"w": torch.randn(100, 100)}
    (path,) = save(weights)
    monkeypatch.setattr(crews_module, "IDLE_SECONDS", 0.2)
    fill(path, weights)
    kept = own._kept
    assert kept is not None
    until = time.monotonic() + 30
    while kept.is_started and time.monotonic() < until:
        time.sleep(0.02)
    assert not kept.is_started and kept.ring.memory.numel(), "only the memory stays"
    fill(path, weights)
    assert own._kept is kept


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
def test_readers_that_do_not_answer_are_given_up_and_their_memory_too(
    save: Any, own: Crews, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    weights = {"w": torch.randn(100, 100)}
    (path,) = save(weights)
    fill(path, weights)
    before = own._kept
    assert before is not None
    monkeypatch.setattr(reader_group, "ANSWER_SECONDS", 2.0)
    os.kill(family(supervisor(before))[0], how)
    fill(path, weights)
    assert own._kept is not before
    assert not before.is_started and not before.ring.memory.numel()


def test_a_load_may_pause_for_longer_than_readers_are_kept(
    save: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {f"w{number}": torch.randn(100, 100) for number in range(3)}
    (path,) = save(weights)
    monkeypatch.setattr(crews_module, "IDLE_SECONDS", 0.1)
    begin = feeder.CrewReaders._begin

    def pause(self: Any, window: Window) -> None:
        time.sleep(0.5)
        begin(self, window)

    monkeypatch.setattr(feeder.CrewReaders, "_begin", pause)
    fill(path, weights)


def test_who_offers_windows_hands_them_out_and_the_feeder_what_is_left(
    many: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, weights = many
    monkeypatch.setattr(feeder, "MOST_WINDOWS", 2)
    begun: collections.Counter[str] = collections.Counter()
    start, begin = feeder.CrewReaders.start, feeder.CrewReaders._begin

    def start_and_be_ready(self: Any, *arguments: Any) -> None:
        start(self, *arguments)
        while not self._is_ready:
            time.sleep(0.001)

    def note(self: Any, window: Window) -> None:
        begun[threading.current_thread().name] += 1
        assert len(self._asked) < 2
        begin(self, window)

    monkeypatch.setattr(feeder.CrewReaders, "start", start_and_be_ready)
    monkeypatch.setattr(feeder.CrewReaders, "_begin", note)
    fill(path, weights)
    assert begun.total() >= 2 * len(weights)
    assert begun.keys() == {"MainThread", "weightlift-feeder-0"}


def test_a_crew_that_is_kept_is_taken_by_who_opens_readers(waiting: Any, own: Crews) -> None:
    _, _, kept = waiting
    settings = Settings(num_load_threads=READERS, readers="processes")
    pool = readers.open_readers(torch.device("cpu"), settings)
    assert isinstance(pool, feeder.CrewReaders)
    assert pool._is_ready and pool._crew is kept, "nobody waited for the feeder"
    pool.close()
    assert own._kept is kept


def test_a_crew_that_does_not_answer_before_ctrl_c_is_ended(
    waiting: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, kept = waiting

    def interrupt(_: Crew) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(crews_module, "_is_sound", interrupt)
    with pytest.raises(KeyboardInterrupt):
        own.take(kept.spec)
    assert not kept.is_started and not own._out and own._kept is None


def test_a_crew_that_was_taken_is_given_back_where_no_thread_can_be_started(
    waiting: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, weights, kept = waiting
    with monkeypatch.context() as patched:
        patched.setattr(feeder.CrewReaders, "start", no_thread)
        with pytest.raises(RuntimeError, match="can't start"):
            fill(path, weights)
    assert own._kept is kept and not own._out
    fill(path, weights)


def test_readers_that_nobody_could_end_later_end_at_once(
    waiting: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, weights, kept = waiting
    monkeypatch.setattr(threading.Timer, "start", no_thread)
    fill(path, weights)
    assert not kept.is_started and own._kept is kept


@pytest.mark.parametrize("nbytes", [3 * mmap.PAGESIZE, 2 * pages.HUGE_PAGE + mmap.PAGESIZE])
@pytest.mark.parametrize("how", ["madvise", "no huge pages", "memset", "no threads"])
def test_all_pages_of_the_memory_are_there_before_it_is_used(
    monkeypatch: pytest.MonkeyPatch, how: str, nbytes: int
) -> None:
    memory = ring.SharedRing(nbytes)
    if how in ("no huge pages", "memset"):
        monkeypatch.setattr(pages, "COLLAPSE", -1)
    if how == "memset":
        monkeypatch.setattr(pages, "POPULATE_WRITE", -1)
    elif how == "no threads":
        monkeypatch.setattr(threading.Thread, "start", no_thread)
    memory.find_pages(2)
    assert os.fstat(memory.descriptor).st_blocks * 512 == nbytes
    memory.release()


def test_what_readers_fill_is_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PATIENCE", 30.0)
    nbytes, before = 4 * pages.HUGE_PAGE, huge_bytes("self")
    memory = ring.SharedRing(nbytes + 3 * mmap.PAGESIZE)
    assert memory.memory.data_ptr() % pages.HUGE_PAGE == 0
    memory.find_pages(2)
    assert os.fstat(memory.descriptor).st_blocks * 512 == memory.memory.numel()
    if not can_collapse():
        pytest.skip("this kernel makes no huge pages of shared memory")
    assert huge_bytes("self") == before + nbytes
    memory.release()


def can_collapse() -> bool:
    """Whether the kernel does it, by memory of this test's own."""
    file, libc = pages.memory_file(), ctypes.CDLL(None, use_errno=True)
    os.ftruncate(file, pages.HUGE_PAGE)
    room = pages.map_shared(file, pages.HUGE_PAGE)
    os.close(file)
    room[0] = 1
    where, size = ctypes.c_void_p(pages.address_of(room)), ctypes.c_size_t(pages.HUGE_PAGE)
    return not libc.madvise(where, size, pages.COLLAPSE)


def huge_bytes(process: int | str) -> int:
    """Bytes of shared memory that a process has mapped by huge pages."""
    text = Path(f"/proc/{process}/smaps").read_text()
    found = re.findall(r"^ShmemPmdMapped: +([0-9]+) kB$", text, re.MULTILINE)
    return sum(map(int, found)) << 10


def test_a_device_that_fails_does_not_hang_the_load(
    save: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {f"w{number}": torch.randn(500, 1000) for number in range(20)}
    (path,) = save(weights)

    def fail(_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(ThreadWriter, "_synchronize", fail)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            fill(path, weights)
    assert not own._out
    fill(path, weights)


def test_a_load_that_failed_says_so_however_long_it_takes_to_let_go(
    many: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, weights = many
    let_go = Words.let_go

    def fail(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def let_go_slowly(self: Words) -> None:
        time.sleep(0.05)
        let_go(self)

    monkeypatch.setattr(ThreadWriter, "write", lambda self, _: self.run(fail))
    monkeypatch.setattr(Words, "let_go", let_go_slowly)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fill(path, weights)


def test_who_waits_for_a_window_hears_of_it_where_the_device_fails(
    save: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"w": torch.randn(500, 1000)}
    (path,) = save(weights)
    heard: list[Any] = []
    begin = feeder.CrewReaders._begin

    def ask_to_hear(self: Any, window: Window) -> None:
        window.issued = heard.append
        begin(self, window)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(feeder.CrewReaders, "_begin", ask_to_hear)
    for what in ("tell", "_synchronize"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
            patch.setattr(ThreadWriter, what, fail)
            fill(path, weights)
    assert heard == [None, None]


def test_threads_take_no_descriptors_of_their_own(
    save: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [{f"w{number}": torch.randn(100, 100)} for number in range(20)]
    folder = Path(save(*shards)[0]).parent
    monkeypatch.setattr(sys, "executable", "")
    most = [0]
    begin = feeder.CrewReaders._begin

    def count(self: Any, window: Window) -> None:
        names = [name for name in descriptors(os.getpid()) if name.endswith(".safetensors")]
        links = len(os.listdir("/proc/self/fd"))
        most[0] = max(most[0], links if names else 0)
        begin(self, window)

    monkeypatch.setattr(feeder.CrewReaders, "_begin", count)
    before = len(os.listdir("/proc/self/fd"))
    fill(str(folder), {name: weight for shard in shards for name, weight in shard.items()})
    assert most[0] - before < 2 * len(shards) + 10


def test_a_crew_that_cannot_start_leaves_nothing_behind(
    own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(ReaderGroup, "await_answers", fail)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            own.take(SPEC)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before, "a crew of a test before may end meanwhile"
    assert not own._out and own._kept is None


@pytest.mark.skipif(
    tuple(map(int, platform.release().split(".")[:2])) < (5, 14), reason="needs Linux 5.14"
)
def test_readers_have_their_memory_mapped_before_they_read(
    own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "PATIENCE", 30.0)
    before = huge_bytes("self")
    crew = own.take(CrewSpec(READERS, 8, 4 << 20))
    crew.close_files()  # it answers once it has
    for pid in family(supervisor(crew)):
        assert _shared_bytes(pid) >= crew.ring.memory.numel()
        assert huge_bytes(pid) == huge_bytes("self") - before
    own.give(crew)


def _shared_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[2]) * os.sysconf("SC_PAGESIZE")


def test_readers_end_with_the_process_that_they_read_for(tmp_path: Path) -> None:
    program = (
        "import os\n"
        "from weightlift.loading.crew import Crew\n"
        "from weightlift.loading.crew_spec import CrewSpec\n"
        "crew = Crew(CrewSpec(2, 3, 1 << 20)); crew.start()\n"
        "print(crew.readers.process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    pid = int(found.stdout)
    until = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break  # nobody collects orphans here
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("killed", [1, READERS])
def test_a_reader_that_is_killed_fails_at_most_the_load_that_is_on(
    save: Any, own: Crews, monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    weights = {f"w{number}": torch.randn(500, 1000) for number in range(20)}
    (path,) = save(weights)
    ask = Crew.ask

    def kill_first(self: Crew, *arguments: Any) -> Any:
        monkeypatch.setattr(Crew, "ask", ask)
        for reader in family(supervisor(self))[:killed]:
            os.kill(reader, signal.SIGKILL)
        time.sleep(0.05)
        return ask(self, *arguments)

    monkeypatch.setattr(Crew, "ask", kill_first)
    try:
        fill(path, weights)
    except PlanAborted as error:
        assert "a reader process died" in str(error)
    else:
        assert killed < READERS, "the others may have read all of it before that was seen"
    fill(path, weights)


def test_a_reader_that_is_killed_while_it_reads_is_no_damage(
    many: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, weights = many
    ask, asked = Crew.ask, [0]

    def kill_later(self: Crew, *arguments: Any) -> Any:
        asked[0] += 1
        if asked[0] == 10:
            os.kill(family(supervisor(self))[0], signal.SIGKILL)
            time.sleep(0.05)
        return ask(self, *arguments)

    monkeypatch.setattr(Crew, "ask", kill_later)
    with pytest.raises(PlanAborted):
        fill(path, weights)


def test_a_file_that_is_cut_short_is_named_though_others_were_read_into_the_slot(
    many: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, weights = many
    monkeypatch.setattr(feeder, "_NAP", 0.05)
    monkeypatch.setattr(feeder, "_SHORT_NAP", 0.05)
    begin, begun = feeder.CrewReaders._begin, [0]

    def shorten(self: Any, window: Window) -> None:
        begun[0] += 1
        if begun[0] == 1:
            os.truncate(path, 20_000_000)
        begin(self, window)

    monkeypatch.setattr(feeder.CrewReaders, "_begin", shorten)
    with pytest.raises(CheckpointError, match="it ends at byte 20000000: truncated while read"):
        fill(path, weights)


@pytest.mark.parametrize("executable", ["/bin/false", "/no/such/python", "", None])
def test_without_processes_threads_read(
    executable: str | None,
    save: Any,
    own: Crews,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    weights = {f"w{number}": torch.randn(500, 100) for number in range(20)}
    (path,) = save(weights)
    monkeypatch.setattr(sys, "executable", executable)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            fill(path, weights)
    assert [record.levelname for record in caplog.records] == ["WARNING"], "it is said once"
    assert "WEIGHTLIFT_READERS=threads" in caplog.text


@KINDS
def test_a_truncated_file_is_named(
    save: Any, own: Crews, monkeypatch: pytest.MonkeyPatch, in_processes: bool
) -> None:
    weights = {f"w{number}": torch.randn(500, 1000) for number in range(4)}
    (path,) = save(weights)
    begin = feeder.CrewReaders._begin

    def shorten(self: Any, window: Window) -> None:
        os.truncate(path, 1_000_000)
        begin(self, window)

    monkeypatch.setattr(feeder.CrewReaders, "_begin", shorten)
    if not in_processes:
        monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CheckpointError, match="it ends at byte 1000000: truncated while read"):
        fill(path, weights)


def test_a_device_that_fails_is_named(
    save: Any, own: Crews, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {f"w{number}": torch.randn(500, 1000) for number in range(4)}
    (path,) = save(weights)
    monkeypatch.setattr(sys, "executable", "/bin/false")  # threads, which a patch can reach
    begin = feeder.CrewReaders._begin

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def spoil(self: Any, window: Window) -> None:
        monkeypatch.setattr(os, "preadv", fail)
        begin(self, window)

    monkeypatch.setattr(feeder.CrewReaders, "_begin", spoil)
    with pytest.raises(CheckpointError, match="Input/output error"):
        fill(path, weights)


def test_two_loads_at_once_have_a_crew_each_and_one_is_kept(own: Crews) -> None:
    both = [own.take(SPEC) for _ in range(2)]
    assert both[0] is not both[1]
    for crew in both:
        own.give(crew)
    assert own._kept is both[0]
    assert both[1].ring.memory.numel() == 0
    other = own.take(CrewSpec(READERS + 1, 3, 1 << 20))
    assert both[0].ring.memory.numel() == 0, "of another size, it is of no use"
    own.give(other)


def test_a_forked_child_leaves_the_parents_readers_alone(save: Any, own: Crews) -> None:
    crew = crews.take(SPEC)
    child = os.fork()
    if not child:
        os._exit(int(crew.is_started or bool(crews_module.crews._out)))
    _, status = os.waitpid(child, 0)
    assert status == 0
    crew.close_files()  # they still answer
    crews.give(crew)
    crews.release()


@given(
    start=st.integers(0, 9 * mmap.PAGESIZE),
    length=st.integers(1, 99 * mmap.PAGESIZE),
    alignment=st.sampled_from([1, mmap.PAGESIZE]),
    limit=st.integers(1, 20).map(lambda number: number * mmap.PAGESIZE),
)
def test_parts_hold_every_byte_once_and_in_order(
    start: int, length: int, alignment: int, limit: int
) -> None:
    stop = start + length
    first, end, most = cut(start, stop, alignment, limit)
    each = [part_of(part, first, stop, end, most) for part in range(-(-(end - first) // most))]
    assert len(each) <= -(-length // limit), "no more than if it began with a page"
    parts = [(first + before, nbytes, must) for before, nbytes, must in each]
    assert parts[0][0] <= start < parts[0][0] + alignment
    needed = sum(part[2] for part in parts)
    assert parts[0][0] + needed == stop, "nothing after the last byte that is wanted must come"
    for (position, nbytes, must), after in zip(parts, [*parts[1:], None], strict=True):
        assert position % alignment == nbytes % alignment == 0
        assert 0 < must <= nbytes <= most
        assert after is None or after[0] == position + nbytes == position + must


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here; scripts/gpu runs this on one")
    return torch.device("cuda")


@pytest.mark.gpu
def test_the_device_itself_waits_for_readers(
    save: Any, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = save({"w": torch.randn(1000, 5000)})
    made: list[Any] = []

    def make(*given: Any) -> Any:
        made.append(writers.make_writer(*given))
        return made[-1]

    monkeypatch.setattr(feeder, "make_writer", make)
    target = torch.empty(1000, 5000, device=cuda)
    load_into({"w": target}, path)
    assert [type(writer) for writer in made] == [CudaWriter]


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["pageable", "threads", "no words"])
def test_where_the_device_cannot_wait_a_thread_does(
    save: Any, cuda: torch.device, monkeypatch: pytest.MonkeyPatch, own: Crews, way: str
) -> None:
    weights = {f"w{number}": torch.randn(500, 3000) for number in range(20)}
    (path,) = save(weights)
    if way == "pageable":
        monkeypatch.setattr(ring, "register", lambda _: False)
    if way == "no words":
        monkeypatch.setattr(writers, "stream_words", lambda: None)
    for dtype in (torch.float32, torch.bfloat16):
        targets = {name: torch.empty(500, 3000, device=cuda, dtype=dtype) for name in weights}
        load_into(targets, path, Settings(readers="threads" if way == "threads" else "auto"))
        assert all(torch.equal(targets[name].cpu(), weights[name].to(dtype)) for name in weights)
