"""What ranks share of a load: the rounds that are worth it, and what each takes from them."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weightlift.loading.checkpoint import Shard
from weightlift.loading.errors import PlanAborted
from weightlift.loading.group import Group
from weightlift.loading.plan import Window
from weightlift.loading.rounds import Round, assign, cut
from weightlift.loading.settings import MIB
from weightlift.loading.steps import Step, Storages, step_of, steps
from weightlift.loading.transfer import Run, Transfer

ROUND_BYTES = 256 * MIB
"""Each costs half a millisecond of Python, with a dozen readers about."""

WORTH = 0.9
"""A round is shared if it is at most this part of what the ranks would read of it on their own."""

_Pieces = list[Run | Transfer]


@dataclass(frozen=True)
class SharedPlan:
    """What ranks share of a load, and what this one does in it.

    It can be followed again for files with the same headers, while parameters are where they were,
    by a load that has no other work: see ``nbytes``.

    Attributes:
        rounds: What is read together, in order; the same on all ranks.
        steps: What this rank takes from each.
        alone: This rank's other work, by number of the shard; offsets are those of the file.
        read_alone: Bytes that the ranks would read without sharing.
        nbytes: Bytes that this rank takes from the files.
        headers: Of the shards, in order. The same objects are the same headers.
        digest: Differs if the rounds do.
    """

    rounds: list[Round]
    steps: list[list[Step]]
    alone: dict[int, list[Step]]
    read_alone: int
    nbytes: int
    headers: tuple[object, ...]
    digest: str

    def fits(self, headers: Sequence[object]) -> bool:
        """Whether these shards have the headers that this was made for."""
        return len(headers) == len(self.headers) and all(map(operator.is_, headers, self.headers))


def plan_together(
    group: Group,
    shards: Sequence[Shard],
    windows: Sequence[Window],
    storages: Storages,
    *,
    is_forced: bool,
) -> SharedPlan:
    """Cut shards into rounds and see, with all ranks, which are worth sharing.

    Args:
        group: The ranks.
        shards: The same for all of them.
        windows: This rank's work.
        storages: Gets a tensor of each storage that is written to.
        is_forced: Share every round that some rank wants.

    Raises:
        PlanAborted: Another rank could not.
    """
    rounds = cut(shards, ROUND_BYTES)
    alone: dict[int, _Pieces] = {}
    all_steps: list[list[Step]] = []
    failure: Exception | None = None
    # The last number counts the ranks that fail here, for the others wait for them.
    read = torch.zeros(len(rounds) + 1, dtype=torch.int64)
    try:
        alone = _assigned(shards, rounds, windows)
        all_steps = [steps(shared.pieces, shared.start, storages) for shared in rounds]
        for number, shared in enumerate(rounds):
            read[number] = shared.read_alone
    except Exception as error:  # noqa: BLE001 - raised below, once the others know
        failure, read[-1] = error, 1
    *total, failures = group.add_up(read).tolist()
    if failure is not None:
        raise failure
    if failures:
        raise PlanAborted("another rank could not plan what to share")
    chosen, taken = [], []
    for shared, its_steps, wanted in zip(rounds, all_steps, total, strict=True):
        if wanted and (is_forced or shared.span <= WORTH * wanted):
            chosen.append(shared)
            taken.append(its_steps)
        else:
            alone[shared.shard] += shared.pieces
        shared.pieces = []
    rest = {
        number: [step_of(piece, piece.offset, storages) for piece in pieces]
        for number, pieces in alone.items()
    }
    told = repr([(shared.shard, shared.start, shared.stop) for shared in chosen])
    digest = hashlib.sha256(told.encode()).hexdigest()
    headers = tuple(shard.tensors for shard in shards)
    nbytes = sum(piece.nbytes for window in windows for piece in window.pieces)
    return SharedPlan(chosen, taken, rest, sum(total), nbytes, headers, digest)


def _assigned(
    shards: Sequence[Shard], rounds: list[Round], windows: Sequence[Window]
) -> dict[int, _Pieces]:
    """Give the rounds their pieces; those that lie in none, by number of the shard."""
    outside: dict[int, _Pieces] = {}
    for number, shard in enumerate(shards):
        mine = [shared for shared in rounds if shared.shard == number]
        pieces = [
            piece for window in windows if window.file is shard.file for piece in window.pieces
        ]
        outside[number] = assign(mine, pieces)
    return outside
