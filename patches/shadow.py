"""A method replaced on one instance, for a while. What every release of an engine calls can be met
there when its callers differ."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def shadowed(instance: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Within this, a method of ``instance`` is another one, which gets the original first.

    Args:
        instance: Whose method it is; others of its class keep theirs.
        name: Of the method.
        replacement: Called with the original and what the method is called with.
    """
    original: Any = getattr(instance, name)
    own = vars(instance)
    before = own.get(name)
    own[name] = functools.wraps(original)(functools.partial(replacement, original))
    try:
        yield
    finally:
        del own[name]
        if before is not None:
            own[name] = before
