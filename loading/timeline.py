"""When each load and each of its shards was read: a JSON file, or a picture for where people look.

JSON is written after each load of a process. A picture is drawn when no load has ended for a while, or
at the end: that takes a second, which the next load would wait for. Ranks have a file each.
"""

from __future__ import annotations

import atexit
import html
import io
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from weightlift.loading.report import LoadReport

logger = logging.getLogger("weightlift")

KINDS = (".json", ".html", ".png")
MOST_LOADS = 200
"""The last ones are kept: a server that is trained against updates for weeks."""

MOST_SHARD_ROWS = 60
"""Shards that get a row of their own in a picture; JSON has them all."""

_COLOURS = {"build": "#b8c4d6", "read": "#2f6db3", "finish": "#e0a458", "engine": "#9a9a9a"}
_LABELS = {
    "build": "built and planned, nothing read yet",
    "read": "read and put in place",
    "finish": "finished by the engine",
    "engine": "loaded by the engine itself",
}

QUIET_SECONDS = 3.0

_lock = threading.Lock()
_drawing = threading.Lock()
_waiting: list[threading.Timer] = []
_due: list[tuple[int, Path]] = []

_loads: list[dict[str, Any]] = []
_origin: list[float] = []
"""When the first load of this process began, by ``perf_counter``."""


def record(report: LoadReport, file: str) -> None:
    """Add a load that has ended, and write what this process has to a file.

    A timeline that cannot be written is worth a warning, never a failed load.

    Args:
        report: The load.
        file: Ends in one of ``KINDS``; ranks but the first write beside it.
    """
    if not _origin:
        _origin.append(report.started)
    _loads.append(_times(report))
    del _loads[:-MOST_LOADS]
    path = Path(file)
    if report.rank:
        path = path.with_name(f"{path.stem}-rank{report.rank}{path.suffix}")
    if path.suffix == ".json":
        _write(path)
        return
    with _lock:
        for waiting in _waiting:
            waiting.cancel()
        timer = threading.Timer(QUIET_SECONDS, draw)
        timer.daemon = True
        _waiting[:] = [timer]
        _due[:] = [(os.getpid(), path)]
        timer.start()


@atexit.register
def draw() -> None:
    """Draw now what is still to be drawn."""
    with _lock:
        due, _due[:] = list(_due), []
    with _drawing:  # a load that ends meanwhile does not wait
        for process, path in due:
            if process == os.getpid():  # and not a child's, whose loads these are not
                _write(path)


def _write(path: Path) -> None:
    try:
        content = _RENDERERS[path.suffix](list(_loads))
        replacement = path.with_name(f".{path.name}.{os.getpid()}")
        replacement.write_bytes(content)
        replacement.replace(path)
    except Exception as error:  # noqa: BLE001 - whatever the drawing library has
        logger.warning("weightlift: cannot write the timeline to %s: %s", path, error)


def _times(report: LoadReport) -> dict[str, Any]:
    """A load as the JSON file has it: seconds since the first load of this process began."""
    origin = _origin[0]
    shards: list[dict[str, Any]] = [
        {"file": name, "from": began - origin, "until": ended - origin, "bytes": nbytes}
        for name, began, ended, nbytes in report.shards
    ]
    began = report.started - origin
    return {
        "load": f"{report.phase or 'load'} of {report.architecture or 'weights'}",
        "from": began,
        "until": time.perf_counter() - origin,
        "mode": report.mode,
        "reason": report.fallback_reason,
        "read_from": min((shard["from"] for shard in shards), default=None),
        "read_until": max((shard["until"] for shard in shards), default=None),
        "bytes": report.bytes_read,
        "shards": shards,
    }


def _as_json(loads: list[dict[str, Any]]) -> bytes:
    return json.dumps({"process": os.getpid(), "loads": loads}, indent=1).encode()


def _as_png(loads: list[dict[str, Any]]) -> bytes:
    return _drawn(_figure(loads), "png")


def _as_html(loads: list[dict[str, Any]]) -> bytes:
    picture = _drawn(_figure(loads), "svg").decode()
    picture = picture[picture.index("<svg") :]  # without the declaration, for it stands within HTML
    rows = "".join(
        f"<tr><td>{html.escape(load['load'])}<td>{load['from']:.2f}<td>{load['until']:.2f}"
        f"<td>{load['bytes'] / 1e9:.2f}<td>{html.escape(load['reason'] or load['mode'])}</tr>"
        for load in loads
    )
    return (
        "<!doctype html><meta charset=utf-8><title>weightlift: load timeline</title>"
        "<style>body{font:14px sans-serif;margin:2em}td,th{padding:2px 12px;text-align:left}"
        f"</style><h1>When what was loaded</h1>{picture}<table><tr><th>load<th>from, s"
        f"<th>until, s<th>GB read<th>by</tr>{rows}</table>"
    ).encode()


_RENDERERS = {".json": _as_json, ".png": _as_png, ".html": _as_html}


def _figure(loads: list[dict[str, Any]]) -> Figure:
    """A row a load, and below it one for each of its shards."""
    import matplotlib
    from matplotlib.figure import Figure

    has_shards = sum(len(load["shards"]) for load in loads) <= MOST_SHARD_ROWS
    count = sum(1 + len(load["shards"]) * has_shards for load in loads)
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 1.5 + 0.28 * count), layout="constrained")
        axes = figure.add_subplot()
        labels: list[str] = []
        for load in loads:
            for kind, start, stop in _parts(load):
                axes.barh(len(labels), stop - start, left=start, color=_COLOURS[kind])
            labels.append(load["load"])
            for shard in load["shards"] if has_shards else ():
                span = shard["until"] - shard["from"]
                axes.barh(len(labels), span, 0.4, left=shard["from"], color=_COLOURS["read"])
                labels.append(shard["file"])
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("seconds since the first load began")
        for kind, label in _LABELS.items():
            axes.barh(0, 0, color=_COLOURS[kind], label=label)
        figure.legend(fontsize=8, loc="outside upper center", ncols=4)
        return figure


def _parts(load: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What a load consists of: kind, from, until."""
    began, ended = load["from"], load["until"]
    if load["read_from"] is None:
        return [("engine", began, ended)]
    read_from, read_until = load["read_from"], load["read_until"]
    return [
        ("build", began, read_from),
        ("read", read_from, read_until),
        ("finish", read_until, ended),
    ]


def _drawn(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind)
    return file.getvalue()
