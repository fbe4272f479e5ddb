"""Results as tables for people: Markdown, or rich on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import markdown
from .plan import N_BATCH, N_UBATCH
from .records import Row
from .summary import Fit, Summary

if TYPE_CHECKING:
    from rich.table import Table

_MIB, _GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of text.

    caption  what all rows have in common
    columns  headings
    right    for each column whether it is aligned to the right
    rows     cells, as many as columns
    """

    caption: str
    columns: tuple[str, ...]
    right: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Caption and table."""
        return f"{self.caption}\n\n{markdown.table(self.columns, self.rows, self.right)}"

    def rich(self) -> Table:
        """Caption and table for a rich console."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(self.caption), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
        )
        for column, right in zip(self.columns, self.right, strict=True):
            table.add_column(Text(column), justify="right" if right else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table


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
    return _grid(caption, columns)


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
    return _grid("time per token = base + slope × depth", columns)


#
# cells
#

_Column = tuple[str, bool, list[str]]  # heading, aligned to the right, cells


def _setting(rows: Sequence[Row]) -> tuple[str, list[_Column]]:
    """What all rows have in common as a text, and columns for the rest."""
    values = {
        "model": [row.model_type for row in rows],
        "size": [_size(row.model_size) for row in rows],
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


def _grid(caption: str, columns: Sequence[_Column]) -> Grid:
    kept = [column for column in columns if any(column[2])]
    names, right, cells = zip(*kept, strict=True)
    return Grid(
        _printable(caption), names, right, tuple(tuple(map(_printable, row)) for row in zip(*cells, strict=True))
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / _MIB:.2f} MiB" if n_bytes < _GIB else f"{n_bytes / _GIB:.2f} GiB"


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


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
