"""What ``weightlift bench`` shows: a table, and a chart for where people would rather look."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from weightlift.loading.benchmark import Timing


def timings_table(timings: list[Timing]) -> Table:
    """A row a loader and state of the page cache; the reason where there are no numbers."""
    base = {item.state: item.median_s for item in timings if item.loader == "safetensors"}
    table = Table("loader", "page cache", "first call", "median", "GB/s", "speed-up", "equal")
    for item in timings:
        if item.problem:
            table.add_row(item.loader, item.state, item.problem)
            continue
        ratio = f"{base[item.state] / item.median_s:.2f}" if base.get(item.state) else "-"
        rate = f"{item.nbytes / item.median_s / 1e9:.2f}"
        first, median = f"{item.first_s:.3f} s", f"{item.median_s:.3f} s"
        equal = "yes" if item.is_equal else "NO"
        table.add_row(item.loader, item.state, first, median, rate, ratio, equal)
    return table


def bar_chart(timings: list[Timing], path: Path) -> None:
    """GB/s of each loader that has numbers, warm and cold side by side. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timings = [item for item in timings if not item.problem]
    loaders = list(dict.fromkeys(item.loader for item in timings))
    states = list(dict.fromkeys(item.state for item in timings))
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.7 * len(loaders)), layout="constrained")
    thickness = 0.8 / len(states)
    for number, state in enumerate(states):
        rates = {
            item.loader: item.nbytes / item.median_s / 1e9
            for item in timings
            if item.state == state
        }
        places = [loaders.index(name) + number * thickness for name in rates]
        bars = axes.barh(places, list(rates.values()), thickness, label=state)
        axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_yticks([number + 0.4 - thickness / 2 for number in range(len(loaders))], loaders)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s, median of the calls after the first")
    axes.margins(x=0.12)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
