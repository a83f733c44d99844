"""The core alone on this GPU: a checkpoint into final tensors, against the pinned-copy ceiling.

core.py CHECKPOINT
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

from weightlift.loading.checkpoint import Checkpoint, shard_paths
from weightlift.loading.settings import Settings
from weightlift.loading.state_dict import load_into


def ceiling() -> float:
    """Bytes a second of one long copy from pinned memory."""
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    target.copy_(source)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(8):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return 8 * source.numel() / (time.perf_counter() - started)


def main(path: Path) -> None:
    """Load with several thread counts, print seconds and rates, check equality once."""
    with Checkpoint.from_path(path) as checkpoint:
        nbytes = checkpoint.nbytes
        targets = {
            entry.name: torch.zeros(entry.shape, dtype=entry.dtype, device="cuda")
            for entry in checkpoint.entries()
        }
    first = True
    for threads in (12, 8, 10, 14, 16, 12):
        times = []
        for _ in range(1 if first else 4):
            started = time.perf_counter()
            load_into(targets, path, Settings(num_load_threads=threads))
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        rates = " ".join(f"{nbytes / seconds / 1e9:.1f}" for seconds in times)
        label = "first call" if first else f"{threads} threads"
        print(f"{label:12s} {' '.join(f'{s:.3f}' for s in times)} s   {rates} GB/s", flush=True)
        first = False
    print(f"ceiling {ceiling() / 1e9:.1f} GB/s")
    for file in shard_paths(path):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - it is no dict
                assert torch.equal(targets[name], shard.get_tensor(name).cuda()), name
    print("every tensor is equal to safetensors'")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
