"""Ways to load a checkpoint into tensors: weightlift and its peers, each at its best settings."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from weightlift.loading.checkpoint import shard_paths
from weightlift.loading.state_dict import load_into

Targets = dict[str, torch.Tensor]


def _weightlift(path: Path, targets: Targets, device: torch.device) -> None:
    load_into(targets, path)


def _safetensors(path: Path, targets: Targets, device: torch.device) -> None:
    """What the engines' loops do: map, and copy tensor by tensor."""
    from safetensors import safe_open

    for file in shard_paths(path):
        with safe_open(file, framework="pt", device="cpu") as shard:
            for name in shard.keys():  # noqa: SIM118 - it is no dict
                targets[name].copy_(shard.get_tensor(name))


def _safetensors_prefetch(path: Path, targets: Targets, device: torch.device) -> None:
    from safetensors import safe_open

    for file in shard_paths(path):
        with safe_open(file, framework="pt") as shard:
            with shard.prefetch(plan=None, device=str(device), threads=8) as tensors:
                for name, tensor in tensors:
                    targets[name].copy_(tensor)


def _fastsafetensors(path: Path, targets: Targets, device: torch.device) -> None:
    os.environ["FASTSAFETENSORS_ODIRECT"] = "0"  # else it reads a warm file at the disk's speed
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


def _instanttensor(path: Path, targets: Targets, device: torch.device) -> None:
    os.environ["INSTANTTENSOR_CACHE_BUFFER"] = "1"
    from instanttensor import BackendPolicy, safe_open  # pyright: ignore[reportMissingImports]

    files = [str(file) for file in shard_paths(path)]
    how = {"device": device.index or 0, "copy": False, "backend": BackendPolicy.BUFFERED}
    with safe_open(files, framework="pt", chunk_size=8 << 20, io_depth=32, **how) as shards:
        for name, tensor in shards.tensors():
            targets[name].copy_(tensor)


def _runai_streamer(path: Path, targets: Targets, device: torch.device) -> None:
    os.environ.setdefault("RUNAI_STREAMER_CONCURRENCY", "16")
    from runai_model_streamer import SafetensorsStreamer  # pyright: ignore[reportMissingImports]

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in shard_paths(path)])
        for name, tensor in streamer.get_tensors():
            targets[name].copy_(tensor)


@dataclass(frozen=True)
class Loader:
    """A way to load, and what it takes: a package, and a CUDA device or not."""

    run: Callable[[Path, Targets, torch.device], None]
    package: str = ""
    needs_cuda: bool = False

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
}
if _has_prefetch():
    LOADERS["safetensors prefetch"] = Loader(_safetensors_prefetch, needs_cuda=True)
