"""Page-locked host memory for one who asks for it piece by piece, as layers do that leave a device.

What is asked for a second time is going to be asked for again: threads make more of it meanwhile.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from weightlift.loading.host_blocks import lock, unlock
from weightlift.loading.pages import touch
from weightlift.loading.report import human
from weightlift.loading.staging import page_aligned
from weightlift.loading.threads import submit

logger = logging.getLogger("weightlift")

AHEAD_BYTES = 1 << 30
"""Of one size, the most that is made before it is asked for; one piece in any case."""

PART_BYTES = 64 << 20
"""Of a piece, what one thread has the kernel find."""


class HostSupply:
    """Gives out memory. A context manager: leaving it frees what nobody asked for.

    Args:
        device: What is copied to and from it: page-locked for a CUDA device.
        threads: How many make it ready.
        most: Of one size, how many are likely to be asked for: no more are made ahead.
    """

    def __init__(self, device: torch.device, threads: int, most: int) -> None:
        self._device = device
        self._most = most
        self._given: collections.Counter[int] = collections.Counter()
        self._ready: dict[int, collections.deque[Future[torch.Tensor]]] = {}
        self._blocks: list[torch.Tensor] = []
        self._locked: dict[int, torch.Tensor] = {}  # by address, until somebody takes them
        self._pool = ThreadPoolExecutor(threads, "weightlift-pin")

    def take(self, nbytes: int) -> torch.Tensor:
        """A piece of its own, flat uint8; it is page-locked until :meth:`release`.

        Raises:
            OSError: The host has no such memory.
        """
        ready = self._ready.setdefault(nbytes, collections.deque())
        if not ready:
            ready.append(self._make(nbytes))
        block = ready.popleft().result()
        self._locked.pop(block.data_ptr(), None)
        self._blocks.append(block)
        self._given[nbytes] += 1
        given = self._given[nbytes]
        ahead = min(given - 1, self._most - given, max(1, AHEAD_BYTES // nbytes))
        with contextlib.suppress(OSError):  # whoever asks for it is told
            while len(ready) < ahead:
                ready.append(self._make(nbytes))
        return block

    def release(self) -> None:
        """Nothing that was given is page-locked any more; call it before the memory goes."""
        unlock(self._device, self._blocks)

    def __enter__(self) -> HostSupply:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        unlock(self._device, list(self._locked.values()))
        self._locked.clear()
        self._ready.clear()

    def _make(self, nbytes: int) -> Future[torch.Tensor]:
        block = page_aligned(nbytes)

        def find(start: int) -> None:
            touch(block.data_ptr() + start, min(PART_BYTES, nbytes - start))

        starts = range(0, nbytes if self._device.type == "cuda" else 0, PART_BYTES)
        touched = [submit(self._pool, find, start) for start in starts]
        return submit(self._pool, self._lock, block, touched)

    def _lock(self, block: torch.Tensor, touched: list[Future[None]]) -> torch.Tensor:
        for part in touched:  # all of them began before this did
            part.result()
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            lock(block)
            self._locked[block.data_ptr()] = block
        return block


class Supplied(TorchFunctionMode):
    """Within it, page-locked tensors that torch is asked for come from a supply.

    Args:
        supply: Gives the memory. Once it cannot, one line says so, and torch makes its own.
    """

    def __init__(self, supply: HostSupply) -> None:
        super().__init__()
        self._supply: HostSupply | None = supply

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation; ``empty`` and ``empty_strided`` in memory of the supply."""
        kwargs = kwargs or {}
        if func in _MAKERS and kwargs.get("pin_memory") and kwargs.get("device") is None:
            like = func(*args, **{**kwargs, "pin_memory": False, "device": "meta"})
            memory = self._memory(like.untyped_storage().nbytes())
            if memory is not None:
                empty = torch.empty(0, dtype=like.dtype)
                return empty.set_(memory.untyped_storage(), 0, like.shape, like.stride())
        return func(*args, **kwargs)

    def _memory(self, nbytes: int) -> torch.Tensor | None:
        if self._supply is None or not nbytes:
            return None
        try:
            return self._supply.take(nbytes)
        except OSError as error:
            logger.warning(
                "weightlift: no page-locked memory of %s (%s); torch makes its own",
                *(human(nbytes), error),
            )
            self._supply = None
            return None


_MAKERS = (torch.empty, torch.empty_strided)
