"""One checkpoint into the parameters of several ranks: weightlift, its peers, and the ceilings.

ranks.py CHECKPOINT OUT.json [RANKS] [LOADER ...]    RANKS: GPUs here if left out; 2 on a CPU

Each loader runs in processes of its own, one a GPU, into parameters that are there. A call is timed
from a barrier to the last rank's end. The page cache is warm; the first call is told apart.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model import Sharded
from rank_loaders import LOADERS, Load

CALLS = 4
LIMIT_S = 150


@dataclasses.dataclass
class Row:
    """A line of the table; seconds, bytes."""

    loader: str
    first_s: float = 0.0
    median_s: float = 0.0
    seconds: list[float] = dataclasses.field(default_factory=list)
    bytes_read: int = 0
    device_scratch: int = 0
    host_memory: int = 0
    is_equal: bool | None = None
    note: str = ""


def rank_main(name: str, path: str, rank: int, size: int, folder: str) -> None:
    """One rank of one loader; writes what it found to a file."""
    told: dict[str, Any] = {}
    try:
        told = measure(name, Path(path), rank, size, folder)
    except Exception:  # noqa: BLE001 - a peer's trouble is a row of the table
        told["problem"] = traceback.format_exc()
    Path(folder, f"told-{rank}.json").write_text(json.dumps(told))
    if "problem" in told:
        os._exit(1)  # others may wait for it in a collective
    dist.barrier()
    os._exit(0)


def measure(name: str, path: Path, rank: int, size: int, folder: str) -> dict[str, Any]:
    """The calls of one loader on one rank."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size // 2))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    wait = datetime.timedelta(seconds=LIMIT_S)
    dist.init_process_group(
        backend, f"file://{folder}/store", rank=rank, world_size=size, timeout=wait
    )
    model = Sharded(path, device, rank, size)
    warm = torch.zeros(size, device=device)
    dist.all_reduce(warm)  # NCCL's start-up is no loader's
    load = LOADERS[name](Load(path, device, rank, size, model))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    host = anonymous_bytes()
    seconds, scratch = [], 0
    with torch.no_grad():
        for _ in range(CALLS):
            model.clear()
            synchronise(device)
            dist.barrier()
            started = time.perf_counter()
            load.run()
            synchronise(device)
            dist.barrier()
            seconds.append(time.perf_counter() - started)
    if device.type == "cuda":
        torch_scratch = torch.cuda.max_memory_allocated(device) - allocated
        scratch = max(torch_scratch, free - torch.cuda.mem_get_info(device)[0])
    return {
        "seconds": seconds,
        "bytes_read": load.bytes_read,
        "note": load.note,
        "device_scratch": scratch,
        "host_memory": anonymous_bytes() - host,
        "digest": model.digest() if load.fills else None,
    }


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def anonymous_bytes() -> int:
    """Resident memory of this process that is of no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def run(name: str, path: Path, size: int) -> tuple[Row, list[Any]]:
    """All ranks of one loader; its row and its digests."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=rank_main, args=(name, str(path), rank, size, folder))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        until = time.monotonic() + LIMIT_S
        for process in ranks:
            process.join(max(0.0, until - time.monotonic()))
            process.kill()
        files = [Path(folder, f"told-{rank}.json") for rank in range(size)]
        told = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    problems = [
        item.get("problem", "it did not end in time") for item in told if "seconds" not in item
    ]
    if problems:
        return Row(name, note=problems[0].strip().splitlines()[-1]), []
    seconds = [max(times) for times in zip(*(item["seconds"] for item in told), strict=True)]
    row = Row(
        name,
        seconds[0],
        statistics.median(seconds[1:]),
        seconds,
        sum(item["bytes_read"] for item in told),
        max(item["device_scratch"] for item in told),
        max(item["host_memory"] for item in told),
        note=told[0]["note"],
    )
    return row, [item["digest"] for item in told]


def show(rows: list[Row], nbytes: int) -> None:
    """Print the table, in Markdown."""
    print("| loader | first call | median | GB/s | read | scratch | host | equal |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        if not row.median_s:
            print(f"| {row.loader} | {row.note[:100]} |")
            continue
        print(
            f"| {row.loader} | {row.first_s:.3f} s | {row.median_s:.3f} s "
            f"| {nbytes / row.median_s / 1e9:.1f} | {row.bytes_read / 1e9:.1f} GB "
            f"| {row.device_scratch / 1e9:.2f} GB | {row.host_memory / 1e9:.2f} GB | {row.is_equal} |"
        )


def main(path: Path, out: Path, ranks: str = "", *names: str) -> None:
    """Run every loader that there is, print a table, write JSON."""
    size = int(ranks or torch.cuda.device_count() or 2)
    nbytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    for file in path.glob("*.safetensors"):  # into the page cache
        with file.open("rb", buffering=0) as stream:
            while stream.read(64 << 20):
                pass
    rows: list[Row] = []
    digests: dict[str, list[Any]] = {}
    for name in names or LOADERS:
        row, digests[name] = run(name, path, size)
        rows.append(row)
        print(
            f"{name}: first {row.first_s:.3f} s, then {row.median_s:.3f} s {row.note[:200]}",
            flush=True,
        )
    expected = digests.get("native loop")
    for row in rows:
        if expected and any(digests[row.loader]):
            row.is_equal = digests[row.loader] == expected
    show(rows, nbytes)
    facts = {
        "date": datetime.date.today().isoformat(),
        "checkpoint_bytes": nbytes,
        "ranks": size,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    out.write_text(json.dumps(facts, indent=1))
    if any(row.is_equal is False for row in rows):
        raise SystemExit("a loader's parameters differ from the native loop's")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
