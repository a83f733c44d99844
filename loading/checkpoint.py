"""A checkpoint: its shards, opened and checked, with an index or without."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from weightlift.loading.errors import CheckpointError
from weightlift.loading.files import ShardFile
from weightlift.loading.header import TensorEntry, read_entries
from weightlift.loading.uncollected import uncollected

MODEL_INDEX = "model.safetensors.index.json"
INDEX_NAMES = (MODEL_INDEX, "diffusion_pytorch_model.safetensors.index.json")
"""Those that engines go by. Others may lie beside them, of another form of the model or out of date."""

_OPEN_THREADS = 8


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
    def open(cls, files: Iterable[str | os.PathLike[str]], *, is_whole: bool = True) -> Checkpoint:
        """Open these shards and check every header.

        Args:
            files: Their paths.
            is_whole: Whether they are meant to be all of a checkpoint, as an index beside them
                has it.

        Raises:
            CheckpointError: A file is missing, truncated, or its header lies.
            UnsupportedCheckpoint: A dtype that this torch does not have.
        """
        paths = [os.fspath(file) for file in files]
        opened: dict[int, Shard] = {}

        def open_one(number: int) -> None:
            opened[number] = open_shard(paths[number])

        try:
            with uncollected(), ThreadPoolExecutor(_OPEN_THREADS) as pool:
                opening = [pool.submit(open_one, number) for number in range(len(paths))]
            for job in opening:
                job.result()
            checkpoint = cls([opened[number] for number in range(len(paths))])
            if is_whole:
                checkpoint._check_index()
        except BaseException:
            for shard in opened.values():
                shard.file.close()
            raise
        return checkpoint

    @classmethod
    def from_path(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a directory, indexed or not, or a single file.

        Raises:
            CheckpointError: As for :meth:`open`, or there is no safetensors file.
        """
        return cls.open(shard_paths(Path(path)), is_whole=Path(path).is_dir())

    def entries(self) -> Iterator[TensorEntry]:
        """Every tensor, shard by shard, in file order."""
        for shard in self.shards:
            yield from shard.tensors.values()

    def locate(self) -> dict[str, tuple[ShardFile, TensorEntry]]:
        """Every tensor and its file, by name."""
        return {
            name: (shard.file, entry)
            for shard in self.shards
            for name, entry in shard.tensors.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries())

    @property
    def bytes_read(self) -> int:
        """Bytes that were read from its files, headers included."""
        return sum(shard.file.bytes_read for shard in self.shards)

    def check(self) -> None:
        """See that what a device copied from page-locked files was theirs.

        Raises:
            CheckpointError: One was cut off meanwhile.
        """
        for shard in self.shards:
            if shard.file.locked is not None:
                shard.file.locked.check()

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
        """These shards and the indices beside them must belong together."""
        opened = {os.path.realpath(shard.file.path): shard for shard in self.shards}
        for folder in {os.path.dirname(shard.file.path) for shard in self.shards}:
            for index in (Path(folder, name) for name in INDEX_NAMES):
                if index.is_file():
                    _compare(index, opened)


def _compare(index: Path, opened: Mapping[str, Shard]) -> None:
    """See that the files that an index names exist and, but in diffusers' folders, have what it places there.

    Of those, engines take whatever the files hold: stale names do no harm.

    Args:
        index: One of other files, as of consolidated ones, does not count.
        opened: Shards by their real paths.

    Raises:
        CheckpointError: Index and shards do not belong together.
    """
    weight_map = _weight_map(index)
    paths = {file: index.parent / file for file in sorted(set(weight_map.values()))}
    shards = {file: opened.get(os.path.realpath(path)) for file, path in paths.items()}
    if not any(shards.values()):
        return
    two = (
        f"{index.name} places it there, so the index and the shards are of two checkpoints. "
        "In an engine, WEIGHTLIFT=0 leaves this check to it"
    )
    for path in paths.values():
        if not path.exists():
            raise CheckpointError(str(path), f"it is missing; {two}")
    if index.name != MODEL_INDEX:
        return
    for name, file in weight_map.items():
        shard = shards[file]
        if shard and name not in shard.tensors:
            raise CheckpointError(shard.file.path, f"it is not in the file; {two}", tensor=name)


def shard_paths(path: Path) -> list[Path]:
    """The safetensors files of a directory, by its index if it has one; or the file itself."""
    if path.is_file():
        return [path]
    for index in (path / name for name in INDEX_NAMES):
        if index.is_file():
            files = [path / name for name in sorted(set(_weight_map(index).values()))]
            if any(file.exists() for file in files):
                return files
            if index.name == MODEL_INDEX:
                raise CheckpointError(str(index), "none of the files that it names is here")
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
        return Shard(file, read_entries(file))
    except BaseException:
        file.close()
        raise


def _weight_map(index: Path) -> dict[str, str]:
    """The index's map of tensor names to files of its own folder."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        for file in set(weight_map.values()):
            os.fsencode(file)
            if os.path.basename(file) != file or file in ("", "..") or "\0" in file:
                raise ValueError(f"it names {file!r}, which is no file of its folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(str(index), f"not a checkpoint index ({error!r})") from error
    return dict(weight_map)
