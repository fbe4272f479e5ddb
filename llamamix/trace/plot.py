"""The timeline of a run, drawn with matplotlib."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from .. import drawing
from .events import Event, EventKind
from .recording import End, Header, Progress, TraceError
from .summary import Summary, printable


def check_matplotlib() -> None:
    """Raise TraceError when there is none."""
    drawing.check_matplotlib(TraceError)


def plot(header: Header, records: Iterable[Event | Progress | End], path: str | os.PathLike[str]) -> None:
    """Draw the use of hot and cold over time, the migrations and, where measured, their error.

    The ending of the path says in which format. Raises TraceError, and OSError when it can not be written.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    summary = Summary(header)
    use = [(0.0, summary.hot_used, summary.cold_used)]
    migrations = []
    for record in records:
        summary.add(record)
        use.append((summary.t, summary.hot_used, summary.cold_used))
        if isinstance(record, Event) and record.kind is EventKind.MIGRATE:
            migrations.append(record)
    has_error = any(event.rmse_k is not None for event in migrations)

    figure = Figure(figsize=(10, 7.5 if has_error else 5.5), layout="constrained")
    axes = figure.subplots(3 if has_error else 2, 1, sharex=True, height_ratios=[3, 1, 1] if has_error else [3, 1])
    title = printable(f"{header.model or 'KV cache'}  ({header.kv_mixed})")
    figure.suptitle(title, fontsize=10, parse_math=False)
    _draw_use(axes[0], summary, use, migrations)
    _draw_durations(axes[1], migrations)
    if has_error:
        _draw_error(axes[2], [event for event in migrations if event.rmse_k is not None])
    axes[-1].set_xlabel("seconds")
    drawing.save(figure, path, TraceError)


def _draw_use(axis: Any, summary: Summary, use: list[tuple[float, int, int]], migrations: list[Event]) -> None:
    t, hot, cold = zip(*use, strict=True)
    cache = summary.header.cache
    for name, kind, used, size, color in (
        ("hot", summary.type_hot, hot, cache.hot_size, "tab:red"),
        ("cold", summary.type_cold, cold, cache.cold_size, "tab:blue"),
    ):
        axis.plot(t, used, color=color, label=f"{name} ({kind}), {size} cells")
        axis.axhline(size, color=color, linewidth=0.8, linestyle=":")
    for event in migrations:
        # from where it began; the width is the time it took
        axis.axvspan(event.t - event.duration, event.t, color="tab:green", alpha=0.25, linewidth=0.5)
    axis.set_ylabel("cells in use")
    axis.legend(loc="upper left")


def _draw_durations(axis: Any, migrations: list[Event]) -> None:
    axis.vlines([e.t for e in migrations], 0, [1e6 * e.duration for e in migrations], color="tab:green")
    axis.plot([e.t for e in migrations], [1e6 * e.duration for e in migrations], "o", color="tab:green", markersize=4)
    axis.set_ylabel("µs per migration")
    axis.set_ylim(bottom=0)


def _draw_error(axis: Any, migrations: list[Event]) -> None:
    t = [event.t for event in migrations]
    for label, color in (("K", "tab:purple"), ("V", "tab:orange")):
        sides = ((getattr(e, f"rmse_{label.lower()}"), getattr(e, f"rms_{label.lower()}")) for e in migrations)
        axis.plot(t, [100 * rmse / (rms or 1.0) for rmse, rms in sides], "o-", label=label, color=color, markersize=4)
    axis.set_ylabel("error, % of the rows")
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper left")
