"""The core alone on this GPU: a checkpoint into final tensors, against the pinned-copy ceiling.

core.py CHECKPOINT
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from weightlift.loading.benchmark import empty_targets, is_equal
from weightlift.loading.settings import Settings
from weightlift.loading.state_dict import load_into

DEVICE = torch.device("cuda")
CALLS = 4


def ceiling() -> float:
    """Bytes a second of one long copy from pinned memory."""
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=DEVICE)
    target.copy_(source)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(8):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return 8 * source.numel() / (time.perf_counter() - started)


def main(path: Path) -> None:
    """Load with several thread counts, print seconds and rates, check equality."""
    targets = empty_targets(path, DEVICE)
    nbytes = sum(target.nbytes for target in targets.values())

    def timed(label: str, threads: int, calls: int) -> None:
        times = []
        for _ in range(calls):
            started = time.perf_counter()
            load_into(targets, path, Settings(num_load_threads=threads))
            times.append(time.perf_counter() - started)
        rates = " ".join(f"{nbytes / seconds / 1e9:.1f}" for seconds in times)
        print(f"{label:12s} {' '.join(f'{s:.3f}' for s in times)} s   {rates} GB/s", flush=True)

    timed("first call", 12, 1)
    for threads in (8, 10, 12, 14, 16):
        timed(f"{threads} threads", threads, CALLS)
    print(f"ceiling {ceiling() / 1e9:.1f} GB/s")
    if not is_equal(path, targets):
        raise SystemExit("a tensor differs from safetensors'")
    print("every tensor is equal to safetensors'")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
