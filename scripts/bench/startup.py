"""What the start-up hook costs: CPU time of ``python -c pass`` with weightlift and without.

startup.py PYTHON_WITH PYTHON_WITHOUT    medians of 50, interleaved
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys

RUNS = 50


def cpu_ms(python: str, **environ: str) -> float:
    """CPU milliseconds, user and system, of one interpreter's life."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([python, "-c", "pass"], check=True, env={**os.environ, **environ})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return (user + system) * 1000


def main() -> None:
    """Measure and print."""
    with_hook, without = sys.argv[1:]
    kinds = {
        "without weightlift": (without, {}),
        "with weightlift": (with_hook, {}),
        "with WEIGHTLIFT=0": (with_hook, {"WEIGHTLIFT": "0"}),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(RUNS):
        for name, (python, environ) in kinds.items():
            times[name].append(cpu_ms(python, **environ))
    base = statistics.median(times["without weightlift"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:20s} {median:6.2f} ms  {median - base:+.2f} ms")


if __name__ == "__main__":
    main()
