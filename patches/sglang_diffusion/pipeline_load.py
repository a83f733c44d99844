"""The load of a pipeline: what its components share, and what is read of later ones meanwhile."""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from weightlift.loading.budget import page_cache_share
from weightlift.loading.checkpoint import shard_paths
from weightlift.loading.errors import WeightliftError
from weightlift.loading.pools import Pools
from weightlift.loading.read_ahead import ReadAhead, shards_in
from weightlift.loading.session import LoadSession
from weightlift.loading.settings import Settings
from weightlift.patches.planned import report_of

logger = logging.getLogger("weightlift")

DEVICES = ("cuda",)
"""Which have a link that would be idle, and memory that is not the host's."""

_LOADERS = "sglang.multimodal_gen.runtime.loader.component_loaders"


class PipelineLoad:
    """The load of a pipeline, component by component. A context manager; leaving it ends its readers.

    Args:
        components: Their names, in the order of the pipeline.
        settings: What holds for it.
        server_args: The engine's.
        by_size: Whether the engine loads the largest first.

    Attributes:
        session: The load of the component that is on, if it goes by plan.
        device: Where that is read before the loader asks for it, if it is.
        pools: The readers that its components share.
        ahead: What brings the files of later ones into the page cache.
    """

    def __init__(
        self, components: Sequence[str], settings: Settings, server_args: Any, *, by_size: bool
    ) -> None:
        self.session: LoadSession | None = None
        self.device: torch.device | None = None
        self.pools = Pools(settings)
        self.ahead = ReadAhead(self._is_busy, page_cache_share())
        self._components = components
        self._settings = settings
        self._server_args = server_args
        self._by_size = by_size
        self._to_come: list[list[Path]] | None = None  # once it is known
        self._next: tuple[Path, LoadSession] | None = None
        self._ahead_of_time: LoadSession | None = None

    def begin(self, component: str) -> None:
        """A component begins to load from this folder; the first one tells where the others are."""
        folder = Path(component)
        if self._to_come is None:
            found = [shards_in(folder.parent / name) for name in self._components]
            if self._by_size:
                found.sort(key=lambda files: -sum(file.stat().st_size for file in files))
            self._to_come = [files for files in found if files]
            if os.environ.get("LOCAL_RANK", "0") == "0":
                self.ahead.add(file for files in found for file in files)
        is_one = any(files[0].parent == folder for files in self._to_come)
        self._to_come = [files for files in self._to_come if files[0].parent != folder]
        self.device = None
        if is_one and self._next is not None and self._next[0] != folder:
            self._end_next()  # what was taken for the next one was not

    def begin_next(self) -> None:
        """Begin to read a text encoder that comes next, behind what is still read of this component.

        The link to the device would be idle while the engine builds it. It is read to memory of its
        own, and the loader copies from there.
        """
        device, folder = self.device, self._to_come[0][0].parent if self._to_come else None
        if device is None or device.type not in DEVICES or self._next is not None:
            return
        if folder is None or not self._is_read_behind(folder):
            return
        if self.session is not None:
            self.session.delivery.hand_on()  # or it would wait for its last bytes behind these
        self._next = folder, self._session(folder)
        try:
            files = [str(file) for file in shard_paths(folder)]
            room = _element_size(self._server_args, folder.name)
            if self._next[1].begin(files, device, None, room):
                self.ahead.drop(files)
                return
        except WeightliftError as error:  # the load of that component will tell
            logger.debug("weightlift: %s is not read ahead: %s", folder, error)
        self._end_next()

    def _is_read_behind(self, folder: Path) -> bool:
        """Whether this is a text encoder that goes to the device as it is stored, whole."""
        distributed, name = torch.distributed, folder.name
        if not name.startswith("text_encoder") or refusal_of(folder):
            return False
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            return False  # ranks of any kind may share it
        is_elsewhere = name in (getattr(self._server_args, "component_paths", None) or {})
        return not (is_elsewhere or _starts_on_host(self._server_args, name))

    def session_for(self, component: str) -> LoadSession:
        """The load of a component that begins now, or has begun."""
        folder = Path(component)
        if self._next is None or self._next[0] != folder:
            return self._session(folder)
        (_, self._ahead_of_time), self._next = self._next, None
        assert self._ahead_of_time is not None
        return self._ahead_of_time

    @contextmanager
    def on(self, session: LoadSession) -> Iterator[None]:
        """Within this, a session is the load that is on; it ends within."""
        self.session = session
        try:
            yield
        finally:
            self.session = None
            if session is self._ahead_of_time:
                self._ahead_of_time = None
                torch.cuda.empty_cache()  # the memory that it was copied from

    def _session(self, folder: Path) -> LoadSession:
        report = report_of("sglang", str(folder), "launch")
        return LoadSession(self._settings, report, pools=self.pools, all_wait=True)

    def _end_next(self) -> None:
        """Let go of what was begun and is not loaded."""
        begun = [self._ahead_of_time, self._next[1] if self._next else None]
        self._next = self._ahead_of_time = None
        for session in filter(None, begun):
            has_memory = not session.delivery.is_idle
            with session:
                pass
            if has_memory:
                torch.cuda.empty_cache()

    def _is_busy(self) -> bool:
        sessions = (self.session, self._next[1] if self._next else None)
        return any(session and not session.delivery.is_idle for session in sessions)

    def __enter__(self) -> PipelineLoad:
        _current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.remove(self)
        with self.ahead, ExitStack() as closing:
            closing.callback(self._end_next)
            closing.callback(self.pools.__exit__)  # first: nothing that waits is read


_current: list[PipelineLoad] = []


def current_load() -> PipelineLoad | None:
    """The load of a pipeline that is on in this process, if one is."""
    return _current[-1] if _current else None


def refusal_of(folder: Path) -> str:
    """Why a component is left to the engine, or ''."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):  # a scheduler, a single file; or the engine will tell
        return ""
    if isinstance(config, dict) and config.get("quantization_config"):
        return "quantised weights were not tested with planned loading"
    return ""


def _element_size(server_args: Any, component: str) -> int:
    """Bytes that the engine has for each element of a text encoder; the most if it does not say."""
    config = getattr(server_args, "pipeline_config", None)
    precisions = getattr(config, "text_encoder_precisions", ())
    number = component.removeprefix("text_encoder").lstrip("_")
    place = int(number) - 1 if number.isdecimal() else 0
    is_known = 0 <= place < len(precisions)
    return 2 if is_known and precisions[place] in ("bf16", "fp16") else 4


def _starts_on_host(server_args: Any, component: str) -> bool:
    """Whether the engine loads a text encoder to the host, at least at first."""
    asks = getattr(server_args, "should_start_component_on_cpu", None)  # from 0.5.18 on
    if asks is not None:
        return bool(asks(component))
    try:
        loader = importlib.import_module(f"{_LOADERS}.component_loader").ComponentLoader
    except ImportError:  # up to 0.5.8
        loader = None
    in_layers = getattr(loader, "_is_component_set_as_layerwise_load", None)  # from 0.5.13 on
    is_in_layers = in_layers is not None and in_layers(server_args, component)
    return bool(server_args.text_encoder_cpu_offload or is_in_layers)
