"""``DefaultModelLoader``'s weights: lazy within a planned load, and such that they can be restarted.

``load_weights_and_postprocess`` gets an iterator that can be run once. A load that turns out
not to be plannable after half of it was seen has to start over, so the iterator's maker is kept.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from weightlift.compat.patch import Patch
from weightlift.loading.errors import PlanAborted
from weightlift.loading.session import NamedWeights, active_session
from weightlift.loading.transaction import active_transaction
from weightlift.patches import SGLANG

MODULE = "sglang.srt.model_loader.loader"

VERSIONS = SGLANG.versions

FAST_LOAD = "enable_fast_load"
_FAST = "_weightlift_fast_load"
_COMMON_KEYS = {"enable_multithread_load", "num_threads", FAST_LOAD}
"""What every loader of files takes. Others are for one load format alone."""


@dataclass
class RestartableWeights:
    """An iterator over named weights that knows how it was made.

    Attributes:
        make: Makes the stock iterator.
        loader: The engine's loader that made it.
        model_path: Where the weights come from.
        phase: ``launch`` or ``update``.
        iterator: The one that is being run.
    """

    make: Callable[[], NamedWeights]
    loader: Any
    model_path: str
    phase: str
    iterator: NamedWeights = field(repr=False)

    def __iter__(self) -> RestartableWeights:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        return next(self.iterator)

    def restart(self) -> NamedWeights:
        """The weights from the first on, whatever was taken from this iterator."""
        return iter(self.make())


def extra_config(loader: Any) -> Mapping[str, Any]:
    """What the user gave this loader of the engine as ``--model-loader-extra-config``."""
    given = loader.load_config.model_loader_extra_config
    return given if isinstance(given, Mapping) else {}


def load_format(loader: Any) -> str:
    """The format that this loader of the engine is for."""
    wanted = loader.load_config.load_format
    return str(getattr(wanted, "value", wanted))


def _get_all_weights(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> RestartableWeights:
    """The weights of a launch, restartable."""
    path = inspect.signature(wrapped).bind(*args, **kwargs).arguments["model_config"].model_path
    make = functools.partial(wrapped, *args, **kwargs)
    return RestartableWeights(make, instance, str(path), "launch", make())


def _get_weights_iterator(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> RestartableWeights:
    """The weights of one source, restartable; an update gets these."""
    source = inspect.signature(wrapped).bind(*args, **kwargs).arguments["source"]
    make = functools.partial(wrapped, *args, **kwargs)
    transaction = active_transaction()
    if transaction and transaction.failure:  # the engine rolls back; see the patch of its load
        make = functools.partial(iter, ())
    return RestartableWeights(make, instance, str(source.model_or_path), "update", make())


def _init_loader(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Give the loader of an update the configuration that the server was launched with.

    ``enable_fast_load`` in it is ours, and taken out: the engine's loaders refuse such keys.
    """
    config = inspect.signature(wrapped).bind(*args, **kwargs).arguments["load_config"]
    given = config.model_loader_extra_config
    if not _launched_with:  # the first loader of a process is that of its launch
        common = dict(given) if isinstance(given, Mapping) else {}
        _launched_with.append({key: common[key] for key in _COMMON_KEYS & common.keys()})
    elif active_transaction() is not None and not given:
        config.model_loader_extra_config = given = dict(_launched_with[0])
    if isinstance(given, Mapping) and FAST_LOAD in given:
        rest = {key: value for key, value in given.items() if key != FAST_LOAD}
        config.model_loader_extra_config = rest
        setattr(instance, _FAST, bool(given[FAST_LOAD]))
    wrapped(*args, **kwargs)


_launched_with: list[dict[str, Any]] = []


def wants_fast_load(loader: Any) -> bool | None:
    """What this loader's ``--model-loader-extra-config`` says of fast load, or None."""
    wanted: bool | None = getattr(loader, _FAST, None)
    return wanted


def _safetensors_iterator(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> NamedWeights:
    """Lazy tensors if a session is armed when the first is asked for, else the stock iterator.

    An update makes its iterator before the load starts, so the choice cannot be made sooner;
    LoRA and the expert backup ask outside of any load, and need real tensors.
    """
    session = active_session()
    if session is None:
        yield from wrapped(*args, **kwargs)
        return
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    if call.get("decryption_key"):
        raise session.abort(PlanAborted("its files are encrypted"))
    if call.get("prefetch"):
        raise session.abort(PlanAborted("--weight-loader-prefetch-checkpoints was asked for"))
    drop_cache = bool(call.get("drop_cache_after_load"))
    yield from session.iterate(call["hf_weights_files"], drop_cache=drop_cache)


_ITERATOR_NOTES = {
    "why": "The iterator maps the shards and hands out views: the reading happens page by page in "
    "the engine's copy, on one thread, into pageable memory, also in the multi-thread variant.",
    "how": "Within a planned load it yields lazy tensors whose copies become reads of file windows "
    "by several threads. Outside of one it is the stock iterator.",
    "upstream": "sgl-project/sglang#39472 is open for updates; reads stay page faults (#37806).",
    "drop_when": "The engine's iterator reads just the bytes a rank needs, without page faults.",
}

PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{MODULE}:DefaultModelLoader._get_all_weights",
        versions=VERSIONS,
        wrapper=_get_all_weights,
        parameters=("model_config", "model"),
        why="The weights of a launch are a generator: seen once, gone.",
        how="Keeps how it was made beside it.",
        upstream="Nothing of the kind is proposed.",
        drop_when="The patch of `load_weights_and_postprocess` goes.",
    ),
    Patch(
        target=f"{MODULE}:DefaultModelLoader._get_weights_iterator",
        versions=VERSIONS,
        wrapper=_get_weights_iterator,
        parameters=("source",),
        why="The weights of an update are a generator: seen once, gone.",
        how="Keeps how it was made beside it.",
        upstream="Nothing of the kind is proposed.",
        drop_when="The patch of `load_weights_and_postprocess` goes.",
    ),
    Patch(
        target=f"{MODULE}:BaseModelLoader.__init__",
        versions=VERSIONS,
        wrapper=_init_loader,
        parameters=("load_config",),
        why="An update makes a loader from the load format alone: `--model-loader-extra-config` "
        "of the launch is dropped.",
        how="Keeps it at launch, and gives it to the loaders of updates.",
        upstream="sgl-project/sglang#39472 is open.",
        drop_when="The engine passes it on.",
    ),
    Patch(
        target=f"{MODULE}:safetensors_weights_iterator",
        versions=VERSIONS,
        wrapper=_safetensors_iterator,
        parameters=("hf_weights_files",),
        **_ITERATOR_NOTES,
    ),
    Patch(
        target=f"{MODULE}:multi_thread_safetensors_weights_iterator",
        versions=">=0.4.9.post2,<0.5.9",
        wrapper=_safetensors_iterator,
        parameters=("hf_weights_files", "max_workers"),
        **_ITERATOR_NOTES,
    ),
    Patch(
        target=f"{MODULE}:buffered_multi_thread_safetensors_weights_iterator",
        versions=">=0.5.9,<0.5.24",
        wrapper=_safetensors_iterator,
        parameters=("hf_weights_files", "max_workers"),
        **_ITERATOR_NOTES,
    ),
)
