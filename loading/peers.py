"""Ways to load a checkpoint into tensors: weightlift and its peers, each at its best settings."""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightlift.loading.checkpoint import shard_paths
from weightlift.loading.state_dict import load_into

Targets = dict[str, torch.Tensor]


def _weightlift(path: Path, targets: Targets, device: torch.device, state: str) -> None:
    load_into(targets, path)


def _safetensors(path: Path, targets: Targets, device: torch.device, state: str) -> None:
    """What the engines' loops do: map, and copy tensor by tensor."""
    from safetensors import safe_open

    for file in shard_paths(path):
        with safe_open(file, framework="pt", device="cpu") as shard:
            for name in shard.keys():  # noqa: SIM118 - it is no dict
                targets[name].copy_(shard.get_tensor(name))


def _safetensors_prefetch(path: Path, targets: Targets, device: torch.device, state: str) -> None:
    """Two files in flight: one alone waits for its last tensor before the next begins."""
    from safetensors import safe_open

    with ExitStack() as stack:
        under_way: deque[tuple[ExitStack, Any]] = deque()

        def finish_one() -> None:
            own, tensors = under_way.popleft()
            with own:
                for name, tensor in tensors:
                    targets[name].copy_(tensor)

        for file in shard_paths(path):
            own = stack.enter_context(ExitStack())
            shard = own.enter_context(safe_open(file, framework="pt"))
            tensors = own.enter_context(shard.prefetch(plan=None, device=str(device), threads=8))
            under_way.append((own, tensors))
            if len(under_way) > 1:
                finish_one()
        while under_way:
            finish_one()


def _fastsafetensors(path: Path, targets: Targets, device: torch.device, state: str) -> None:
    # Left to itself it reads a warm file at the disk's speed.
    os.environ["FASTSAFETENSORS_ODIRECT"] = str(int(state == "cold"))
    from fastsafetensors import ParallelLoader  # pyright: ignore[reportMissingImports]

    loader = ParallelLoader(
        None,
        [str(file) for file in shard_paths(path)],
        device=str(device),
        nogds=True,
        bbuf_size_kb=512 << 10,
        max_threads=16,
        use_tqdm_on_load=False,
    )
    for name, tensor in loader.iterate_weights():
        targets[name].copy_(tensor)
    loader.close()


def _instanttensor(path: Path, targets: Targets, device: torch.device, state: str) -> None:
    os.environ["INSTANTTENSOR_CACHE_BUFFER"] = "1"
    from instanttensor import (  # pyright: ignore[reportMissingImports]
        Backend,
        BackendPolicy,
        safe_open,
    )

    files = [str(file) for file in shard_paths(path)]
    how: dict[str, Any] = {"backend": BackendPolicy.BUFFERED, "chunk_size": 8 << 20, "io_depth": 32}
    if state == "cold":
        how = {"backend": [Backend.URING, Backend.AIO]}
    elif files[0].startswith("/dev/shm/"):
        how["backend"] = Backend.MMAP
    with safe_open(files, framework="pt", device=device.index or 0, copy=False, **how) as shards:
        for name, tensor in shards.tensors():
            targets[name].copy_(tensor)


def _runai_streamer(path: Path, targets: Targets, device: torch.device, state: str) -> None:
    os.environ.setdefault("RUNAI_STREAMER_CONCURRENCY", "16")
    from runai_model_streamer import SafetensorsStreamer  # pyright: ignore[reportMissingImports]

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in shard_paths(path)])
        for name, tensor in streamer.get_tensors():
            targets[name].copy_(tensor)


def _flashpack(path: Path, targets: Targets, device: torch.device, state: str) -> None:
    """It reads a format of its own, into memory of its own."""
    from flashpack.deserialization import (  # pyright: ignore[reportMissingImports]
        iterate_from_flash_tensor,
        read_flashpack_file,
    )

    storage, facts = read_flashpack_file(str(_flashpack_file(path)), device=str(device))
    for name, tensor in iterate_from_flash_tensor(storage, facts):
        targets[name].copy_(tensor)


def _flashpack_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.flashpack")


def _to_flashpack(path: Path) -> Path:
    from flashpack.serialization import pack_to_file  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    tensors = {
        name: tensor for file in shard_paths(path) for name, tensor in load_file(file).items()
    }
    pack_to_file(tensors, str(_flashpack_file(path)), None)
    return _flashpack_file(path)


@dataclass(frozen=True)
class Loader:
    """A way to load, and what it takes: a package, and a CUDA device or not.

    ``run`` gets the checkpoint, the tensors to fill, their device, and ``warm`` or ``cold``.
    ``convert`` writes the checkpoint as the file that it reads, which is not timed.
    """

    run: Callable[[Path, Targets, torch.device, str], None]
    package: str = ""
    needs_cuda: bool = False
    convert: Callable[[Path], Path] | None = None

    def is_available(self, device: torch.device) -> bool:
        """Whether it can run here, on this device."""
        if self.needs_cuda and device.type != "cuda":
            return False
        return not self.package or importlib.util.find_spec(self.package) is not None


def _has_prefetch() -> bool:
    import safetensors

    return hasattr(safetensors.safe_open, "prefetch")


LOADERS: dict[str, Loader] = {
    "weightlift": Loader(_weightlift),
    "safetensors": Loader(_safetensors),
    "fastsafetensors": Loader(_fastsafetensors, "fastsafetensors", needs_cuda=True),
    "instanttensor": Loader(_instanttensor, "instanttensor", needs_cuda=True),
    "runai-model-streamer": Loader(_runai_streamer, "runai_model_streamer"),
    "flashpack (own format)": Loader(_flashpack, "flashpack", True, _to_flashpack),
}
if _has_prefetch():
    LOADERS["safetensors prefetch"] = Loader(_safetensors_prefetch, needs_cuda=True)
