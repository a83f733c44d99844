"""No garbage collection for a while."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_switched_off: list[None] = []
"""An entry for each block that will switch collection on again."""


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection: headers and plans are objects by the ten thousand, none in a cycle.

    To look through them time and again takes as long as to make them.
    """
    was_on = gc.isenabled()
    gc.disable()
    if was_on:
        _switched_off.append(None)
    try:
        yield
    finally:
        if was_on:
            del _switched_off[-1:]
            gc.enable()


def _collect_again() -> None:
    """A child that another thread forked has nobody to switch collection on."""
    if _switched_off:
        _switched_off.clear()
        gc.enable()


os.register_at_fork(after_in_child=_collect_again)
