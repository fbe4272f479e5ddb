"""Evaluations as tables for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from ..bench.plan import N_BATCH, N_UBATCH
from ..grid import Column, Grid, grid
from .records import Row

KLD_UNIT = 1e-3  # nats; tables have thousandths
_N_DIGITS = 3  # of a value whose error is not known
_PARTS = 4  # distances of lookups are told apart by quarters of the context


def results_grids(rows: Sequence[Row]) -> list[Grid]:
    """A table for every model, text, context and leg."""
    return [_results(group) for group in grouped(rows, _unit)]


def overview_grids(rows: Sequence[Row]) -> list[Grid]:
    """A table for every model and context: the mean divergence of each cache by text and leg."""
    return [_overview(group) for group in grouped(rows, _context)]


def lookup_grids(rows: Sequence[Row]) -> list[Grid]:
    """A table for every model and context with lookups: how many each cache finds, by how far back they are."""
    return [_lookups(group) for group in grouped([row for row in rows if row.lookup_found], _context)]


def grouped(rows: Iterable[Row], key: Callable[[Row], tuple[object, ...]]) -> list[list[Row]]:
    """Rows with the same key together, in the order in which they come."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _context(row: Row) -> tuple[object, ...]:
    return row.model_sha256, row.n_ctx, row.reference


def _unit(row: Row) -> tuple[object, ...]:
    return *_context(row), row.text, row.text_sha256, row.leg, row.n_decode, row.stride


#
# tables
#


def _results(rows: Sequence[Row]) -> Grid:
    first = rows[0]
    counts = {row.n_positions for row in rows}
    where = f"{first.text}, {first.n_ctx} tokens, {first.leg}"
    many = f"{_count(max(counts), 'position')} in {_count(max(row.n_chunks for row in rows), 'chunk')}"
    columns: list[Column] = [
        ("cache", False, [row.cache for row in rows]),
        ("of F16", True, [f"{row.share:.3f}" for row in rows]),
        ("mean KLD", True, [_kld(row.kld_mean, row.kld_mean_err) for row in rows]),
        ("median", True, [_kld(row.kld_median, row.kld_median_err) for row in rows]),
        ("99 %", True, [_kld(row.kld_p99, row.kld_p99_err) for row in rows]),
        ("99.9 %", True, [_kld(row.kld_p999, row.kld_p999_err) for row in rows]),
        ("same top %", True, [_percent(row.same_top, row.same_top_err) for row in rows]),
        ("PPL ratio", True, [uncertain(row.ppl_ratio, row.ppl_ratio_err) for row in rows]),
        ("positions", True, [f"{row.n_positions}" for row in rows] if len(counts) > 1 else []),
        ("found", True, [_found(row.lookup_found) for row in rows]),
    ]
    return grid(f"{where}: {many}. {_setting(first)}", columns)


def _overview(rows: Sequence[Row]) -> Grid:
    first = rows[0]
    units = list(dict.fromkeys((row.text, row.leg) for row in rows))
    caches = list(dict.fromkeys(row.cache for row in rows if row.kld_mean is not None))
    cells = {(row.cache, row.text, row.leg): row for row in rows}
    shares = {row.cache: f"{row.share:.3f}" for row in rows}

    def cell(cache: str, unit: tuple[str, str]) -> str:
        row = cells.get((cache, *unit))
        return "" if row is None else _kld(row.kld_mean, row.kld_mean_err)

    columns: list[Column] = [
        ("cache", False, caches),
        ("of F16", True, [shares[cache] for cache in caches]),
        *((f"{text} {leg}", True, [cell(cache, (text, leg)) for cache in caches]) for text, leg in units),
    ]
    return grid(f"Mean KLD, {first.n_ctx} tokens. {_setting(first)}", columns)


def _lookups(rows: Sequence[Row]) -> Grid:
    first = rows[0]
    caches = list(dict.fromkeys(row.cache for row in rows))
    parts: list[tuple[str, Callable[[int], bool]]] = [
        (f"{low} to {high}", lambda d, low=low, high=high: low <= d < high)  # type: ignore[misc]
        for low, high in ((first.n_ctx * i // _PARTS, first.n_ctx * (i + 1) // _PARTS) for i in range(_PARTS))
    ]

    def found(cache: str, wanted: Callable[[int], bool]) -> str:
        pairs = [
            flag
            for row in rows
            if row.cache == cache
            for distance, flag in zip(row.lookup_distances, row.lookup_found, strict=True)
            if wanted(distance)
        ]
        return _found(pairs)

    columns: list[Column] = [
        ("cache", False, caches),
        *((name, True, [found(cache, wanted) for cache in caches]) for name, wanted in parts),
        ("all", True, [found(cache, lambda _d: True) for cache in caches]),
    ]
    return grid(f"Values found, by how many tokens back they are, {first.n_ctx} tokens. {first.model}", columns)


#
# cells
#


def _setting(row: Row) -> str:
    values = [row.model, _count(row.n_threads, "thread")]
    if row.n_batch != N_BATCH:
        values.append(f"-b {row.n_batch}")
    if row.n_ubatch != N_UBATCH:
        values.append(f"-ub {row.n_ubatch}")
    return f"{', '.join(values)}. KLD in thousandths of a nat from {row.reference}; in brackets: standard errors"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _found(flags: Sequence[int]) -> str:
    return f"{sum(flags)}/{len(flags)}" if flags else ""


def _percent(value: float | None, error: float | None) -> str:
    return "" if value is None else uncertain(100 * value, None if error is None else 100 * error)


def _kld(value: float | None, error: float | None) -> str:
    return "" if value is None else uncertain(value / KLD_UNIT, None if error is None else error / KLD_UNIT)


def uncertain(value: float | None, error: float | None) -> str:
    """A value with its standard error in units of the last digit: 1.23(4) is 1.23 ± 0.04; "" for None.

    The error has two digits where they begin with 1, else one (so that rounding changes it by less than a third).
    Without an error the value has three.
    """
    if value is None:
        return ""
    if not error:
        decimals = 0 if value == 0 else max(0, _N_DIGITS - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{decimals}f}"
    decimals = -math.floor(math.log10(error))
    if round(error * 10.0 ** (decimals + 1)) < 20:
        decimals += 1
    if decimals <= 0:
        unit = 10**-decimals
        return f"{round(value / unit) * unit}({round(error / unit) * unit})"
    return f"{value:.{decimals}f}({round(error * 10.0**decimals)})"
