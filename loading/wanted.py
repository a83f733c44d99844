"""Which bytes of a checkpoint a load like those before will take."""

from __future__ import annotations

from collections.abc import Iterable

from weightlift.loading.checkpoint import Checkpoint
from weightlift.loading.plan import MAX_GAP
from weightlift.loading.recording import Recording
from weightlift.loading.stage import Range
from weightlift.loading.transfer import extent


def wanted_ranges(
    recordings: Iterable[Recording], checkpoint: Checkpoint
) -> dict[str, list[Range]]:
    """The bytes that loads like these take from a checkpoint, by path of the shard.

    Neighbours are joined as the windows of a plan are.
    """
    recordings = list(recordings)
    wanted: dict[str, list[Range]] = {}
    for shard in checkpoint.shards:
        ranges: list[Range] = []
        for entry in shard.tensors.values():
            for recording in recordings:
                recipe = recording.recipes.get(entry.name)
                if entry.name in recording.for_engine:
                    ranges.append((entry.offset, entry.offset + entry.nbytes))
                for move in recipe.moves if recipe else ():
                    nbytes = move.nbytes
                    if move.layout is not None:
                        nbytes = extent(move.layout.shape, move.layout.stride)
                        nbytes *= move.layout.dtype.itemsize
                    start = entry.offset + move.start
                    ranges.append((start, min(start + nbytes, entry.offset + entry.nbytes)))
        wanted[shard.file.path] = _joined(sorted(ranges))
    return wanted


def _joined(ranges: list[Range]) -> list[Range]:
    joined: list[Range] = []
    for start, stop in ranges:
        if joined and start - joined[-1][1] <= MAX_GAP:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        elif stop > start:
            joined.append((start, stop))
    return joined
