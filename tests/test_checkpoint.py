"""The index of a checkpoint: good files are found, bad ones refused with file, tensor and remedy."""

from __future__ import annotations

import gc
import json
import os
import random
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from weightlift.loading import checkpoint
from weightlift.loading.checkpoint import Checkpoint, open_shard, shard_paths
from weightlift.loading.errors import CheckpointError, UnsupportedCheckpoint
from weightlift.loading.uncollected import uncollected

F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def write(path: Path, header: Any, data: bytes = b"\0" * 16) -> Path:
    """A shard with this header, given as bytes or as what JSON makes of it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def test_entries_tell_where_each_tensor_is(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 4), "a": torch.arange(5), "empty": torch.zeros(0, 7)}
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.from_path(tmp_path) as checkpoint:
        entries = {entry.name: entry for entry in checkpoint.entries()}
        for name, tensor in tensors.items():
            entry = entries[name]
            assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
            file = checkpoint.locate()[entry.name][0]
            assert file.read(entry.offset, entry.nbytes) == tensor.numpy().tobytes()
        assert checkpoint.nbytes == 3 * 4 * 4 + 5 * 8


def write_index(folder: Path, stem: str, **weight_map: str) -> None:
    content = json.dumps({"weight_map": weight_map})
    (folder / f"{stem}.safetensors.index.json").write_text(content)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_a_directory_is_read_by_its_index(stem: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    write_index(tmp_path, stem, a="one.safetensors")
    assert shard_paths(tmp_path) == [tmp_path / "one.safetensors"]


@pytest.mark.parametrize("stem", ["consolidated", "diffusion_pytorch_model.fp16", "._model"])
def test_an_index_that_no_engine_goes_by_does_not_count(stem: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "model.safetensors.index.json").symlink_to(tmp_path / "gone")
    write_index(tmp_path, stem, one="two.safetensors", three="three.safetensors")
    with Checkpoint.from_path(tmp_path) as found:
        assert [entry.name for entry in found.entries()] == ["one", "two"]
    (tmp_path / f"{stem}.safetensors.index.json").write_text("version https://git-lfs")
    Checkpoint.from_path(tmp_path).close()


def test_of_two_indices_the_models_own_counts(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    write_index(tmp_path, "diffusion_pytorch_model", a="two.safetensors")
    write_index(tmp_path, "model", a="one.safetensors")
    assert shard_paths(tmp_path) == [tmp_path / "one.safetensors"]


def test_a_diffusers_index_of_files_that_are_gone_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({"a": torch.ones(1)}, path)
    write_index(tmp_path, "diffusion_pytorch_model", a="gone.safetensors")
    assert shard_paths(tmp_path) == [path]


@pytest.mark.parametrize("weight_map", [{}, {"a": "gone.safetensors"}])
def test_an_index_none_of_whose_files_is_here_is_named(
    weight_map: dict[str, str], tmp_path: Path
) -> None:
    write_index(tmp_path, "model", **weight_map)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors\.index\.json: none of the files"
    ):
        shard_paths(tmp_path)


def test_a_directory_without_an_index_is_all_its_shards(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    assert [path.name for path in shard_paths(tmp_path)] == ["a.safetensors", "b.safetensors"]


BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "no json": (b"{nonsense", b"", "not valid JSON"),
    "no object": ([], b"", "not a JSON object"),
    "not utf-8": (b"\xff\xfe{}", b"", "not valid JSON"),
    "deep nesting": (b"[" * 100_000, b"", "not valid JSON"),
    "twice": (b'{"a":{},"a":{}}', b"", "twice"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, "lacks"),
    "entry is a list": ({"a": [1]}, b"", "lacks"),
    "negative size": ({"a": {**F32, "shape": [-2, -2]}}, b"\0" * 16, "not a list of sizes"),
    "size is a float": ({"a": {**F32, "shape": [2.0, 2]}}, b"\0" * 16, "not a list of sizes"),
    "size is a bool": ({"a": {**F32, "shape": [True]}}, b"\0" * 4, "not a list of sizes"),
    "huge size": ({"a": {**F32, "shape": [1 << 62, 1 << 62]}}, b"\0" * 16, "takes"),
    "negative offset": ({"a": {**F32, "data_offsets": [-16, 0]}}, b"\0" * 16, "not a range"),
    "backward range": ({"a": {**F32, "data_offsets": [16, 0]}}, b"\0" * 16, "not a range"),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 8, 16]}}, b"\0" * 16, "not a range"),
    "size and offsets differ": ({"a": {**F32, "data_offsets": [0, 8]}}, b"\0" * 8, "takes"),
    "overlap": (
        {"a": F32, "b": {**F32, "data_offsets": [8, 24]}},
        b"\0" * 24,
        "overlaps another tensor",
    ),
    "hole": ({"a": F32, "b": {**F32, "data_offsets": [20, 36]}}, b"\0" * 36, "leaves a hole"),
    "truncated": ({"a": F32}, b"\0" * 12, "truncated"),
    "more data": ({"a": F32}, b"\0" * 20, "followed by other data"),
    "empty metadata list": ({"__metadata__": [], "a": F32}, b"\0" * 16, "__metadata__"),
    "utf-16": (json.dumps({"a": F32}).encode("utf-16"), b"\0" * 16, "not valid JSON"),
    "half a surrogate": (
        b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
        "not valid JSON",
    ),
    "NaN": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":NaN}}', b"\0", "NaN"),
    "minus zero": (b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', b"", "-0"),
    "metadata is a list": ({"__metadata__": [1], "a": F32}, b"\0" * 16, "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_a_header_that_lies_is_refused(case: tuple[Any, bytes, str], tmp_path: Path) -> None:
    header, data, problem = case
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=problem) as raised:
        Checkpoint.open([path])
    assert str(path) in str(raised.value) and "again" in str(raised.value)
    with pytest.raises(SafetensorError):
        with safe_open(path, framework="pt"):
            pass


@pytest.mark.parametrize("length", [0, 3, 7])
def test_a_file_without_a_header_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(b"\0" * length)
    with pytest.raises(CheckpointError, match="too few"):
        Checkpoint.open([path])


@pytest.mark.parametrize("length", [17, 100_000_001, (1 << 64) - 1])
def test_a_header_length_beyond_the_file_allocates_nothing(length: int, tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" * 8)
    with pytest.raises(CheckpointError, match="its header claims"):
        Checkpoint.open([path])


def test_a_dtype_that_torch_lacks_is_unsupported_not_broken(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    path = write(tmp_path / "f4.safetensors", header, b"\0" * 2)
    with pytest.raises(UnsupportedCheckpoint, match="F4"):
        Checkpoint.open([path])


def test_a_shape_beyond_what_torch_holds_is_unsupported(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}
    with pytest.raises(UnsupportedCheckpoint, match="shape"):
        Checkpoint.open([write(tmp_path / "huge.safetensors", header, b"")])


def test_a_shape_of_more_sizes_than_tensors_have_is_not_multiplied_out(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [1 << 62] * 300, "data_offsets": [0, 0]}}
    with pytest.raises(UnsupportedCheckpoint, match="300 dimensions"):
        Checkpoint.open([write(tmp_path / "deep.safetensors", header, b"")])


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open([tmp_path / "pipe.safetensors"])


def test_the_index_is_found_beside_links_to_blobs(tmp_path: Path) -> None:
    """As the Hugging Face cache lays it out."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    save_file({"a": torch.ones(1)}, blobs / "0123")
    (snapshot / "one.safetensors").symlink_to(blobs / "0123")
    write_index(snapshot, "model", b="one.safetensors")
    with pytest.raises(CheckpointError, match="'b'.*not in the file"):
        Checkpoint.open([snapshot / "one.safetensors"])


def test_a_missing_file_is_named_and_the_others_are_closed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "there.safetensors")
    with pytest.raises(CheckpointError, match=r"gone\.safetensors.*Check the path"):
        Checkpoint.open([tmp_path / "there.safetensors", tmp_path / "gone.safetensors"])


def test_no_file_stays_open_where_no_more_threads_can_be_started(
    tmp_path: Path, one_thread_more: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(tmp_path / f"{number}.safetensors", {"a": F32}) for number in range(3)]
    is_refused = threading.Event()  # the first file is opened no sooner
    submit = ThreadPoolExecutor.submit

    def watch(*arguments: Any) -> Any:
        try:
            return submit(*arguments)
        except RuntimeError:
            is_refused.set()
            raise

    def open_late(path: str) -> Any:
        assert is_refused.wait(20)
        return open_shard(path)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", watch)
    monkeypatch.setattr(checkpoint, "open_shard", open_late)
    with pytest.raises(RuntimeError, match="can't start"):
        Checkpoint.open(paths)
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert not {str(path) for path in paths}.intersection(links)


def test_a_directory_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors file"):
        Checkpoint.from_path(tmp_path)


def test_an_index_of_other_files_does_not_count(tmp_path: Path) -> None:
    consolidated = write(tmp_path / "consolidated.safetensors", {"a": F32})
    write_index(tmp_path, "model", a="model-00001-of-00001.safetensors")
    with Checkpoint.open([consolidated]) as checkpoint:
        assert [entry.name for entry in checkpoint.entries()] == ["a"]


def test_a_child_that_is_forked_while_headers_are_parsed_collects_garbage() -> None:
    with uncollected():
        assert not gc.isenabled()
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_a_file_that_an_index_promises_must_be_there(stem: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    write_index(tmp_path, stem, a="one.safetensors", b="two.safetensors")
    with pytest.raises(CheckpointError, match=rf"two\.safetensors: it is missing; {stem}"):
        Checkpoint.open([tmp_path / "one.safetensors"])


def test_a_name_that_the_models_index_promises_must_be_there(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    write_index(tmp_path, "diffusion_pytorch_model", a="one.safetensors", b="one.safetensors")
    Checkpoint.open([tmp_path / "one.safetensors"]).close()
    write_index(tmp_path, "model", a="one.safetensors", b="one.safetensors")
    with pytest.raises(CheckpointError, match="'b'.*not in the file; model"):
        Checkpoint.open([tmp_path / "one.safetensors"])


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"weight_map": {"a": "../../etc/passwd"}}', '{"weight_map": {"a": ".."}}',
     '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": "x\\u0000y"}}',
     '{"weight_map": {"a": "x\\ud800y"}}'],
)  # fmt: skip
def test_an_index_that_lies_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a checkpoint index"):
        Checkpoint.from_path(tmp_path)


def test_ten_thousand_fuzzed_files_are_judged_as_safetensors_judges_them(tmp_path: Path) -> None:
    """Whatever is accepted here, safetensors accepts, and the other way round."""
    random_ = random.Random(2)
    path = tmp_path / "fuzzed.safetensors"
    save_file({"a": torch.ones(2, 3), "bc": torch.ones(4, dtype=torch.int8)}, path)
    good = path.read_bytes()
    judged = {True: 0, False: 0}
    for _ in range(10_000):
        path.write_bytes(_mutated(good, random_))
        ours, theirs = _is_accepted_here(path), _is_accepted_there(path)
        if ours is not None:
            assert ours == theirs, path.read_bytes()
            judged[ours] += 1
    assert judged[False] > 5000 and judged[True] > 100


def _mutated(good: bytes, random_: random.Random) -> bytes:
    data = bytearray(good)
    for _ in range(random_.choice((1, 1, 2, 5))):
        place = random_.randrange(len(data) or 1)
        action = random_.randrange(4)
        if action == 0 and data:
            data[place % len(data)] = random_.choice(b'0123456789"{}[],:-FISU8eE \x00\xff')
        elif action == 1:
            del data[place : place + random_.choice((1, 1, 4, 40))]
        elif action == 2:
            data[place:place] = random_.choice((b"0", b"-", b",", b'"x":', b"[", b"1e3", b"  "))
        else:
            data[place:place] = data[place : place + random_.randrange(30)]
    if random_.random() < 0.5:  # let the length agree, to get past it
        data[:8] = struct.pack("<Q", max(0, data.rfind(b"}") + 1 - 8))
    return bytes(data)


def _is_accepted_here(path: Path) -> bool | None:
    try:
        Checkpoint.open([path]).close()
    except UnsupportedCheckpoint:
        return None
    except CheckpointError:
        return False
    return True


def _is_accepted_there(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False
