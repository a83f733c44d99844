"""A load that a model does in its own ``load_weights``: by plan if it can be, else as the engine does.

What vLLM's and vLLM-Omni's loaders have in common. SGLang's knows updates and ways back besides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from weightlift.compat.context import context_of
from weightlift.loading.errors import CheckpointError
from weightlift.loading.leftovers import meta_names
from weightlift.loading.report import LoadReport
from weightlift.loading.session import LoadSession, NamedWeights, active_session
from weightlift.loading.settings import Settings
from weightlift.patches.shadow import shadowed


@dataclass(frozen=True)
class ModelLoad:
    """One load of an engine.

    Attributes:
        engine: Its import name.
        model: What is loaded; its ``load_weights`` is called once.
        path: Where the weights come from.
        load: Loads it as the engine does. Can be called again.
        all_wait: Whether small copies wait for readers too; see :class:`LoadSession`.
    """

    engine: str
    model: torch.nn.Module
    path: str
    load: Callable[[], Any]
    all_wait: bool = False

    def run(self, settings: Settings, refusal: str) -> Any:
        """What the engine's load returns; a report is made of it.

        Args:
            settings: What holds for this load.
            refusal: Why it is left to the engine, or ''.

        Raises:
            WeightliftError: It would be left to the engine, and the user asked for something else.
            CheckpointError: A shard is damaged.
        """
        report = report_of(self.engine, self.path, "launch", type(self.model).__name__)
        if refusal:
            report.fall_back(settings.insist(refusal))
            result = self.load()
        else:
            result = self._by_plan(settings, report)
        report.finish(settings)
        return result

    def _by_plan(self, settings: Settings, report: LoadReport) -> Any:
        """Load with lazy tensors; if the model cannot do with them, load again with real ones."""
        session = LoadSession(settings, report, all_wait=self.all_wait)
        try:
            with planned_by(session, self.model):
                result = self.load()
        except Exception as error:
            # A damaged file stays damaged. Anything else may be a lazy tensor's fault; what is not
            # fails again, with this error as its context.
            if session.is_finished or isinstance(error, CheckpointError):
                raise
            report.fall_back(settings.insist(str(session.aborted or repr(error))))
            return self.load()
        if not report.tensors:
            report.fall_back(settings.insist("it has no safetensors files"))
        return result


def rank() -> int:
    """Of this process among those of the engine."""
    distributed = torch.distributed
    is_one_of_many = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if is_one_of_many else 0


def report_of(engine: str, path: str, phase: str, architecture: str = "") -> LoadReport:
    """The report of a load that begins, of this rank; see :class:`LoadReport`."""
    version = context_of(engine).engine.version
    return LoadReport(engine, version, phase, path, rank(), architecture)


def planned_by(session: LoadSession, model: torch.nn.Module) -> AbstractContextManager[None]:
    """Within this, ``model.load_weights`` gets lazy tensors and returns with all in place."""

    def load_weights(original: Any, weights: NamedWeights, *args: Any, **kwargs: Any) -> Any:
        was_meta = meta_names(model)
        with session:
            with session.armed():
                result = original(session.guard(weights), *args, **kwargs)
            session.finish(model, was_meta)
        return result

    return shadowed(model, "load_weights", load_weights)


def safetensors_iterator(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> NamedWeights:
    """Lazy tensors if a session is armed when the first is asked for, else the stock iterator."""
    session = active_session()
    if session is None:
        yield from wrapped(*args, **kwargs)
        return
    call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    yield from session.iterate(call["hf_weights_files"])


ITERATOR_NOTES = {
    "why": "The iterator maps the shards and hands out views: the reading happens page by page in "
    "the engine's copy, on one thread, into pageable memory, also in the multi-thread variant.",
    "how": "Within a planned load it yields lazy tensors whose copies become reads of file windows "
    "by several readers. Outside of one it is the stock iterator.",
    "upstream": "vllm-project/vllm#57973 (safetensors' prefetch) is open.",
    "drop_when": "The engine's iterator reads just the bytes a rank needs, without page faults.",
}
"""What the records of the patched iterators say."""
