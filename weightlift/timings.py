"""What ``weightlift bench`` shows: a table, and a chart for where people would rather look."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from weightlift.loading.benchmark import CEILING, Timing


def timings_table(timings: list[Timing]) -> Table:
    """A row a loader and state of the page cache; the reason where there are no numbers."""
    base = _median_by_state(timings, "safetensors")
    floor = _median_by_state(timings, CEILING)
    columns = ("first call", "median", "GB/s", "of ceiling", "speed-up", "equal")
    table = Table("loader", "page cache", *columns)
    for item in timings:
        if item.problem:
            table.add_row(item.loader, item.state, item.problem)
            continue
        ratio = f"{base[item.state] / item.median_s:.2f}" if item.state in base else "-"
        share = f"{floor[item.state] / item.median_s:.0%}" if item.state in floor else "-"
        rate = f"{_rate(item):.2f}"
        first, median = f"{item.first_s:.3f} s", f"{item.median_s:.3f} s"
        equal = "-" if item.is_equal is None else "yes" if item.is_equal else "NO"
        table.add_row(item.loader, item.state, first, median, rate, share, ratio, equal)
    return table


def _median_by_state(timings: list[Timing], loader: str) -> dict[str, float]:
    return {
        item.state: item.median_s for item in timings if item.loader == loader and not item.problem
    }


def bar_chart(timings: list[Timing], path: Path) -> None:
    """GB/s of each loader that has numbers, warm and cold, and the ceilings. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    floor = _median_by_state(timings, CEILING)
    timings = [item for item in timings if not item.problem and item.loader != CEILING]
    timings.sort(key=lambda item: item.median_s)
    loaders = list(dict.fromkeys(item.loader for item in timings))
    states = sorted({item.state for item in timings}, reverse=True)
    figure, axes = pyplot.subplots(figsize=(8, 1.6 + 0.6 * len(loaders)), layout="constrained")
    thickness = 0.8 / len(states)
    for number, state in enumerate(states):
        rates = {item.loader: _rate(item) for item in timings if item.state == state}
        places = [loaders.index(name) + number * thickness for name in rates]
        bars = axes.barh(places, list(rates.values()), thickness, label=state)
        axes.bar_label(bars, fmt="%.1f", padding=3)
        if state in floor:
            limit, colour = timings[0].nbytes / floor[state] / 1e9, bars.patches[0].get_facecolor()
            axes.axvline(limit, ls="--", color=colour, label=f"ceiling, {state}: {limit:.1f}")
    axes.set_yticks([number + 0.4 - thickness / 2 for number in range(len(loaders))], loaders)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s, median of the calls after the first")
    axes.margins(x=0.12)
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _rate(timing: Timing) -> float:
    """GB/s."""
    return timing.nbytes / timing.median_s / 1e9
