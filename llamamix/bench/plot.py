"""Decode speed over depth and over memory, drawn with matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .. import drawing
from .records import BenchError, Row
from .summary import Summary

_MIB = 1 << 20


def check_matplotlib() -> None:
    """Raise BenchError when there is none."""
    drawing.check_matplotlib(BenchError)


def plot(summaries: Sequence[Summary], path: str | os.PathLike[str]) -> None:
    """Draw the speed of decoding token by token over depth, and at the deepest depth over the memory of the KV cache.

    The ending of the path says in which format. Raises BenchError, also when nothing was decoded token by token, and
    OSError when it can not be written.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    lines = _lines(summaries)
    if not lines:
        raise BenchError("There is nothing to draw: no test decodes token by token (tg).")

    figure = Figure(figsize=(12, 5), layout="constrained")
    over_depth, over_memory = figure.subplots(1, 2)
    models = ", ".join(dict.fromkeys(line[0].row.model_type for line in lines.values()))
    figure.suptitle(models, fontsize=10, parse_math=False)
    deepest = max(line[-1].row.n_depth for line in lines.values())
    for label, line in lines.items():
        drawn = over_depth.errorbar(
            [s.row.n_depth for s in line], [s.median_ts for s in line], [s.spread_ts for s in line],
            marker="o", markersize=4, capsize=3, label=label,
        )  # fmt: skip
        if line[-1].row.n_depth == deepest:
            _draw_point(over_memory, line[-1], label, drawn[0].get_color())
    over_depth.set_xlabel("depth (tokens in the KV cache)")
    over_depth.set_ylabel("decode, tokens/s")
    over_depth.set_title("speed over depth", fontsize=10)
    over_depth.legend(fontsize=8)
    over_memory.set_xlabel("KV cache, MiB")
    over_memory.set_ylabel("decode, tokens/s")
    over_memory.set_title(f"speed at depth {deepest} over memory", fontsize=10)
    over_memory.margins(x=0.25, y=0.15)
    for axis in (over_depth, over_memory):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    over_memory.set_xlim(left=0)
    drawing.save(figure, path, BenchError)


def _lines(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Summaries of token by token tests by label, in the order of their depths."""
    decoded = [s for s in summaries if s.row.n_gen > 0 and s.row.n_prompt == 0]
    parts = [part for part in _PARTS if len({part(s.row) for s in decoded}) > 1]
    lines: dict[str, list[Summary]] = {}
    for s in decoded:
        lines.setdefault(", ".join([s.row.cache, *(part(s.row) for part in parts)]), []).append(s)
    return {label: sorted(line, key=lambda s: s.row.n_depth) for label, line in lines.items()}


def _model(row: Row) -> str:
    return row.model_type


def _backend(row: Row) -> str:
    return row.backends


def _threads(row: Row) -> str:
    return f"{row.n_threads} threads"


def _tokens(row: Row) -> str:
    return f"tg{row.n_gen}"


# a label names these where they are not the same everywhere
_PARTS = (_model, _backend, _threads, _tokens)


def _draw_point(axis: Any, summary: Summary, label: str, color: str) -> None:
    x = summary.row.kv_bytes / _MIB
    axis.errorbar([x], [summary.median_ts], [summary.spread_ts], marker="o", capsize=3, color=color)
    axis.annotate(
        label, (x, summary.median_ts), xytext=(6, 6), textcoords="offset points", fontsize=8, color=color,
        parse_math=False,
    )  # fmt: skip
