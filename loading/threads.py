"""Threads, where there may be too many: Python raises what torch raises for a device that failed."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def submit(
    pool: Executor, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
) -> Future[_T]:
    """What a pool will have done.

    Raises:
        OSError: It needs one more thread, and there are too many. Others may do the work all the same.
    """
    try:
        return pool.submit(work, *args, **kwargs)
    except RuntimeError as error:
        raise _too_many(error) from error


def start_thread(work: Callable[[], object], name: str) -> threading.Thread:
    """A thread that does this, begun; it does not keep its process from ending.

    Raises:
        OSError: There are too many.
    """
    thread = threading.Thread(target=work, name=f"weightlift-{name}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise _too_many(error) from error
    return thread


def _too_many(error: RuntimeError) -> OSError:
    return OSError(errno.EAGAIN, f"no thread can be started: {error}")
