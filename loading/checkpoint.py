"""The index of a checkpoint: which bytes of which file are which tensor.

Headers come from files that anyone may have written. Every size and offset is bounded before it
is used, with the rules of the safetensors format (https://github.com/huggingface/safetensors):
8 bytes header length, a JSON header of at most 100 MB, then tensor data without holes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightlift.loading.errors import CheckpointError, UnsupportedCheckpoint
from weightlift.loading.files import ShardFile

MAX_HEADER_BYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"
_OPEN_THREADS = 8

_DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, attribute in _DTYPE_NAMES.items()
    if hasattr(torch, attribute)
}
"""Safetensors dtype names that this torch has."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a shard: ``nbytes`` bytes from byte ``offset`` of the file, row-major."""

    name: str
    file: ShardFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file and its tensors, by name in file order."""

    file: ShardFile
    tensors: dict[str, TensorEntry]


class Checkpoint:
    """The open shards of a checkpoint. A context manager: leaving it closes every file."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards

    @classmethod
    def open(cls, files: Iterable[str | os.PathLike[str]]) -> Checkpoint:
        """Open these shards and check every header.

        Raises:
            CheckpointError: A file is missing, truncated, or its header lies.
            UnsupportedCheckpoint: A dtype that this torch does not have.
        """
        paths = [os.fspath(file) for file in files]
        with ThreadPoolExecutor(_OPEN_THREADS) as pool:
            opening = [pool.submit(open_shard, path) for path in paths]
        failed = next((job for job in opening if job.exception()), None)
        if failed:
            for job in opening:
                if not job.exception():
                    job.result().file.close()
            raise failed.exception() or AssertionError
        checkpoint = cls([job.result() for job in opening])
        try:
            checkpoint._check_index()
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    @classmethod
    def from_path(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a directory, indexed or not, or a single file.

        Raises:
            CheckpointError: As for :meth:`open`, or there is no safetensors file.
        """
        return cls.open(shard_paths(Path(path)))

    def entries(self) -> Iterator[TensorEntry]:
        """Every tensor, shard by shard, in file order."""
        for shard in self.shards:
            yield from shard.tensors.values()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries())

    def close(self, *, drop_cache: bool = False) -> None:
        """Close every file; with ``drop_cache``, take it out of the page cache first."""
        for shard in self.shards:
            if drop_cache:
                shard.file.drop_cache()
            shard.file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_index(self) -> None:
        """Every file that an index beside these shards names must exist, with its tensors."""
        opened = {os.path.realpath(shard.file.path): shard for shard in self.shards}
        for folder in {os.path.dirname(shard.file.path) for shard in self.shards}:
            index = Path(folder, INDEX_NAME)
            weight_map = _weight_map(index) if index.is_file() else {}
            for file in sorted(set(weight_map.values())):
                if not os.path.exists(os.path.join(folder, file)):
                    raise CheckpointError(os.path.join(folder, file), f"it is missing; {_TWO}")
            for name, file in weight_map.items():
                shard = opened.get(os.path.realpath(os.path.join(folder, file)))
                if shard and name not in shard.tensors:
                    problem = f"it is not in the file; {_TWO}"
                    raise CheckpointError(shard.file.path, problem, tensor=name)


_TWO = (
    f"{INDEX_NAME} places it there, so the index and the shards are of two checkpoints. "
    "WEIGHTLIFT=0 leaves this check to the engine"
)


def shard_paths(path: Path) -> list[Path]:
    """The safetensors files of a directory, by its index if it has one; or the file itself."""
    if path.is_file():
        return [path]
    index = path / INDEX_NAME
    if index.is_file():
        return [path / name for name in sorted(set(_weight_map(index).values()))]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        remedy = "Name a directory that holds *.safetensors, or one such file."
        raise CheckpointError(str(path), "no safetensors file is here", remedy=remedy)
    return found


def open_shard(path: str) -> Shard:
    """Open one file and check its header.

    Raises:
        CheckpointError: The file is missing, truncated, or its header lies.
        UnsupportedCheckpoint: A dtype that this torch does not have.
    """
    file = ShardFile.open(path)
    try:
        return Shard(file, _entries(file, *_header(file)))
    except BaseException:
        file.close()
        raise


def _header(file: ShardFile) -> tuple[dict[str, Any], int]:
    """The parsed header, and the byte of the file where tensor data starts."""
    if file.size < 8:
        raise CheckpointError(file.path, f"{file.size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(MAX_HEADER_BYTES, file.size - 8):
        raise CheckpointError(
            file.path, f"its header claims {length} bytes, the file has {file.size}"
        )
    try:
        text = file.read(8, length).decode("utf-8")
        header = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_int=_whole_number,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file.path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(file.path, "its header is not a JSON object")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands in it twice")
    for key in found:
        key.encode()  # half a surrogate pair is no text
    return found


def _whole_number(digits: str) -> int:
    if digits == "-0":
        raise ValueError("-0 is no size")
    return int(digits)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _entries(file: ShardFile, header: dict[str, Any], start: int) -> dict[str, TensorEntry]:
    """The tensors of a header, in file order, once they are found to cover the data exactly."""
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
        raise CheckpointError(file.path, "its __metadata__ is not a map of strings")
    entries = [_entry(file, name, facts, start) for name, facts in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    position = start
    for entry in entries:
        if entry.offset != position:
            what = "overlaps another tensor" if entry.offset < position else "leaves a hole"
            problem = f"its data starts at byte {entry.offset}, which {what} (expected {position})"
            raise CheckpointError(file.path, problem, tensor=entry.name)
        position += entry.nbytes
    if position != file.size:
        kind = "truncated" if position > file.size else "followed by other data"
        problem = f"its tensors end at byte {position}, the file at {file.size}: it is {kind}"
        raise CheckpointError(file.path, problem)
    return {entry.name: entry for entry in entries}


def _entry(file: ShardFile, name: str, facts: Any, start: int) -> TensorEntry:
    """One tensor of the header; offsets in it count from the start of the data."""

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(file.path, problem, tensor=name)

    if not isinstance(facts, dict) or not facts.keys() >= {"dtype", "shape", "data_offsets"}:
        raise fail("its header entry lacks dtype, shape or data_offsets")
    shape, offsets = facts["shape"], facts["data_offsets"]
    if not _are_sizes(shape):
        raise fail(f"its shape {shape!r} is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail(f"its data_offsets {offsets!r} are not a range of bytes")
    dtype = DTYPES.get(facts["dtype"]) if isinstance(facts["dtype"], str) else None
    if dtype is None:
        raise UnsupportedCheckpoint(f"{file.path}, tensor {name!r}: dtype {facts['dtype']!r}")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != offsets[1] - offsets[0]:
        raise fail(f"{facts['dtype']} of shape {shape} takes {nbytes} bytes, not {offsets}")
    if math.prod(size for size in shape if size) * dtype.itemsize >= 1 << 63:
        raise UnsupportedCheckpoint(f"{file.path}, tensor {name!r}: shape {shape}")
    return TensorEntry(name, file, dtype, tuple(shape), start + offsets[0], nbytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )


def _weight_map(index: Path) -> dict[str, str]:
    """The index's map of tensor names to files of its own folder."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        for file in weight_map.values():
            os.fsencode(file)
            if os.path.basename(file) != file or file in ("", "..") or "\0" in file:
                raise ValueError(f"it names {file!r}, which is no file of its folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(str(index), f"not a checkpoint index ({error!r})") from error
    return dict(weight_map)
