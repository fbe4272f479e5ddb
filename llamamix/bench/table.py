"""Results as tables for people: Markdown, or rich on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ..grid import Column, Grid, grid, size
from .plan import N_BATCH, N_UBATCH
from .records import Row
from .summary import Fit, Summary

_MIB = 1 << 20


def results_grid(summaries: Sequence[Summary]) -> Grid:
    """A line for every configuration and test; columns that no line has something for are left out."""
    baselines = {s.baseline for s in summaries}
    caption, setting = _setting([s.row for s in summaries])
    columns = [
        *setting,
        ("cache", False, [s.row.cache for s in summaries]),
        ("KV MiB", True, [f"{s.row.kv_bytes / _MIB:.1f}" for s in summaries]),
        ("test", True, [s.row.test for s in summaries]),
        ("t/s", True, [f"{s.median_ts:.2f} ± {s.spread_ts:.2f}" for s in summaries]),
        (f"× {baselines.pop() if len(baselines) == 1 else 'baseline'}", True, [_ratio(s) for s in summaries]),
        ("p50 ms", True, [_milliseconds(s.p50_ms) for s in summaries]),
        ("p99 ms", True, [_milliseconds(s.p99_ms) for s in summaries]),
        ("migrate", True, [_percent(s.migrate_share) for s in summaries]),
    ]
    return grid(caption, columns)


def fit_grid(fits: Sequence[Fit]) -> Grid:
    """A line for every fit."""
    _, setting = _setting([fit.row for fit in fits])
    columns = [
        *setting,
        ("cache", False, [fit.row.cache for fit in fits]),
        ("test", True, [fit.test for fit in fits]),
        ("depths", True, [f"{fit.n_depths}" for fit in fits]),
        ("base ms", True, [f"{fit.base_ms:.3f}" for fit in fits]),
        ("slope µs / 1000", True, [f"{fit.slope_us:.1f}" for fit in fits]),
        ("× slope", True, ["" if fit.ratio is None else f"{fit.ratio:.3f}" for fit in fits]),
        ("R²", True, [f"{fit.r2:.4f}" for fit in fits]),
    ]
    return grid("time per token = base + slope × depth", columns)


#
# cells
#

def _setting(rows: Sequence[Row]) -> tuple[str, list[Column]]:
    """What all rows have in common as a text, and columns for the rest."""
    values = {
        "model": [row.model_type for row in rows],
        "size": [size(row.model_size) for row in rows],
        "params": [_count(row.model_n_params) for row in rows],
        "backend": [row.backends for row in rows],
    }
    if any(row.backends != "CPU" for row in rows):
        values["ngl"] = [f"{row.n_gpu_layers}" for row in rows]
    values["threads"] = [f"{row.n_threads}" for row in rows]
    for name, usual in (("n_batch", N_BATCH), ("n_ubatch", N_UBATCH)):
        if any(getattr(row, name) != usual for row in rows):
            values[name] = [f"{getattr(row, name)}" for row in rows]
    caption = ", ".join(f"{name}: {cells[0]}" for name, cells in values.items() if len(set(cells)) == 1)
    return caption, [(name, False, cells) for name, cells in values.items() if len(set(cells)) > 1]


def _count(n: int) -> str:
    return f"{n / 1e6:.2f} M" if n < 1e9 else f"{n / 1e9:.2f} B"


def _ratio(summary: Summary) -> str:
    if summary.ratio_min == summary.ratio_max:
        return f"{summary.ratio:.2f}"
    return f"{summary.ratio:.2f} ({summary.ratio_min:.2f}–{summary.ratio_max:.2f})"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
