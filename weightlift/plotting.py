"""Charts, for where people would rather look."""

from __future__ import annotations

from pathlib import Path

from weightlift.loading.benchmark import Timing


def bar_chart(timings: list[Timing], path: Path) -> None:
    """GB/s of each loader, warm and cold side by side.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'weightlift[plot]'") from error
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
