"""What this process may use of its host: cores and memory, shared with the ranks beside it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")

MOST_READERS = 12
"""On one H200 with 16 cores more readers brought nothing, warm; see ``placement``."""

MEMORY_SHARE = 16
"""Staging takes at most this part of the memory that the ranks of a host may use together."""


def reader_count() -> int:
    """Readers for a process that was told no number: one a core of its share, from 2 to 12."""
    return min(MOST_READERS, max(2, usable_cores() // ranks_here()))


def staging_limit() -> int | None:
    """Most bytes that a process should take for staging; None where memory is not limited."""
    limit = memory_limit()
    return None if limit is None else limit // MEMORY_SHARE // ranks_here()


def page_cache_share() -> int:
    """Bytes that a process may bring into the page cache for later: half of its memory."""
    pages: int = os.sysconf("SC_PHYS_PAGES")
    return (memory_limit() or pages * os.sysconf("SC_PAGE_SIZE")) // 2


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device, or of the host, that this process could still take; 0 for other devices."""
    if device.type != "cuda":
        return available_memory() if device.type == "cpu" else 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def available_memory() -> int:
    """Bytes that this process could still take without swapping, by the host and by its cgroup."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    free = int(facts["MemAvailable"].split()[0]) << 10
    limit = memory_limit()
    if limit is None:
        return free
    used = _read("memory.current") or _read("memory/memory.usage_in_bytes") or "0"
    counts = (_read("memory.stat") or _read("memory/memory.stat")).split()
    cached = dict(zip(counts[::2], counts[1::2], strict=True)).get("inactive_file", "0")
    return min(free, limit - int(used) + int(cached))


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask, lowered by its cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    words = _read("cpu.max").split() or [
        _read("cpu/cpu.cfs_quota_us"),
        _read("cpu/cpu.cfs_period_us"),
    ]
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return cores  # 'max', -1, or no cgroup: the mask is all there is to know
    return max(1, min(cores, int(words[0]) // max(1, int(words[1]))))


def memory_limit() -> int | None:
    """Bytes that the cgroup of this process allows; None without a limit."""
    text = _read("memory.max") or _read("memory/memory.limit_in_bytes")
    limit = int(text) if text.isdecimal() else 0
    return limit if 0 < limit < 1 << 60 else None  # version 1 says "none" by a huge number


def ranks_here() -> int:
    """Ranks of this process's engine that are taken to be on this host."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    ranks = distributed.get_world_size()
    return min(ranks, torch.cuda.device_count() or ranks)


def _read(name: str) -> str:
    """A file of the cgroup, of version 2 or 1; '' if there is none."""
    try:
        return (CGROUP / name).read_text().strip()
    except OSError:
        return ""
