"""The header of a safetensors file: where its tensors are.

Headers come from files that anyone may have written. Every size and offset is bounded before it
is used, with the rules of the safetensors format (https://github.com/huggingface/safetensors):
8 bytes header length, a JSON header of at most 100 MB, then tensor data without holes.
"""

from __future__ import annotations

import json
import math
import os
import threading
from typing import Any, NamedTuple

import torch

from weightlift.loading.errors import CheckpointError, UnsupportedCheckpoint
from weightlift.loading.files import ShardFile

MAX_HEADER_BYTES = 100_000_000
MOST_DIMENSIONS = 64
"""Of a tensor, as most of torch takes. Some megabytes of sizes would take hours to multiply."""

MOST_KEPT_BYTES = 64_000_000
"""Of headers that are kept; that of Qwen3-30B-A3B takes 2.3 MB."""

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


class TensorEntry(NamedTuple):
    """One tensor of a shard: ``nbytes`` bytes from byte ``offset`` of the file, row-major."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_entries(file: ShardFile) -> dict[str, TensorEntry]:
    """The tensors of a file by name, in file order.

    The checkpoints of a training run have the same headers time and again: those of a file with
    the same bytes before its data, and as long, are not parsed again.

    Raises:
        CheckpointError: The file is truncated, or its header lies.
        UnsupportedCheckpoint: A dtype or shape that this torch does not have.
    """
    text = _text(file)
    known = _kept.get((text, file.size))
    if known is None:
        known = _entries(file, _json(file, text), 8 + len(text))
        with _keeping:
            if sum(len(kept) for kept, _ in _kept) + len(text) > MOST_KEPT_BYTES:
                _kept.clear()
            _kept[text, file.size] = known
    return known


_kept: dict[tuple[bytes, int], dict[str, TensorEntry]] = {}
_keeping = threading.Lock()


def _forget() -> None:
    """A forked child may have been made while another thread held the lock."""
    global _keeping
    _keeping = threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _text(file: ShardFile) -> bytes:
    """The header, as it stands in the file."""
    if file.size < 8:
        raise CheckpointError(file.path, f"{file.size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(MAX_HEADER_BYTES, file.size - 8):
        raise CheckpointError(
            file.path, f"its header claims {length} bytes, the file has {file.size}"
        )
    return bytes(file.read(8, length))


def _json(file: ShardFile, text: bytes) -> dict[str, Any]:
    # Called once a number or a name, these would take half of the time of parsing.
    parse_int = _whole_number if b"-0" in text else None
    pairs_hook = _as_text if b"\\u" in text else _without_duplicates
    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=pairs_hook,
            parse_int=parse_int,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file.path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(file.path, "its header is not a JSON object")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def _as_text(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = _without_duplicates(pairs)
    for key in found:
        key.encode()  # half a surrogate pair, which only an escape can give, is no text
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
    problem = _problem(facts)
    if problem:
        raise CheckpointError(file.path, problem, tensor=name)
    shape, (begin, end) = facts["shape"], facts["data_offsets"]
    dtype = DTYPES.get(facts["dtype"]) if isinstance(facts["dtype"], str) else None
    if dtype is None:
        raise UnsupportedCheckpoint(f"{file.path}, tensor {name!r}: dtype {facts['dtype']!r}")
    if len(shape) > MOST_DIMENSIONS:
        raise UnsupportedCheckpoint(f"{file.path}, tensor {name!r}: {len(shape)} dimensions")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != end - begin:
        problem = f"{facts['dtype']} of shape {shape} takes {nbytes} bytes, not {end - begin}"
        raise CheckpointError(file.path, problem, tensor=name)
    if not nbytes and math.prod(size for size in shape if size) * dtype.itemsize >= 1 << 63:
        raise UnsupportedCheckpoint(f"{file.path}, tensor {name!r}: shape {shape}")
    return TensorEntry(name, dtype, tuple(shape), start + begin, nbytes)


def _problem(facts: Any) -> str:
    """What is wrong with a tensor's entry, its dtype and size apart; '' if nothing is."""
    try:
        shape, offsets, _ = facts["shape"], facts["data_offsets"], facts["dtype"]
    except (KeyError, TypeError):
        return "its header entry lacks dtype, shape or data_offsets"
    if not _are_sizes(shape):
        return f"its shape {shape!r} is not a list of sizes"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"its data_offsets {offsets!r} are not a range of bytes"
    return ""


def _are_sizes(values: Any) -> bool:
    if type(values) is not list:
        return False
    for value in values:
        if type(value) is not int or not 0 <= value < 1 << 63:
            return False
    return True
