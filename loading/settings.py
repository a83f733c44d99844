"""What a load may be told, with the defaults that hold where nothing is said."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20

# On one H200 with 16 cores more than 12 readers brought nothing, warm; see `placement`.
MOST_THREADS = 12


@dataclass(frozen=True)
class Settings:
    """Settings of a load.

    Attributes:
        multithread_load: Whether loads go through weightlift at all.
        fast_load: Whether plans are derived from one layer of each kind.
        num_load_threads: Reader threads of this process; 0 chooses by the cores it may use.
        staging_mib: Most host memory, in MiB, for bytes in flight to one device: the pinned ring
            on CUDA (strided sources take half as much again to be packed), scratch elsewhere.
        stage_gib: Host memory of each rank for the next checkpoint, in GiB; 0 for no staging.
        stage_watch: A directory whose new checkpoints are staged as they appear; empty for none.
        direct_io: Whether files are read past the page cache: ``auto`` for what is not in it, on a
            local filesystem; ``on`` or ``off``.
        exchange: Whether ranks of one host each read a part and pass it on: ``auto`` where that
            reads less, on CUDA devices; ``on`` or ``off``.
        report: A file that gets one JSON line a load; empty for none.
        untested_versions: Whether engine versions that weightlift was not tested with are patched.
        asked: Names of the settings that the user gave. Asked for and not to be had is an error.
    """

    multithread_load: bool = True
    fast_load: bool = False
    num_load_threads: int = 0
    staging_mib: int = 256
    stage_gib: int = 0
    stage_watch: str = ""
    direct_io: str = "auto"
    exchange: str = "auto"
    report: str = ""
    untested_versions: bool = False
    asked: frozenset[str] = field(default=frozenset())

    def threads(self) -> int:
        """Reader threads to start, at least one."""
        return self.num_load_threads or min(MOST_THREADS, max(2, usable_cores()))


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask, lowered by its cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no cgroup v2 here: the mask is all there is to know
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
