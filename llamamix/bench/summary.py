"""What follows from the samples: medians, ratios, latencies, and a fit over depth. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .plan import name_of_test
from .records import Row

# what rows have in common that are compared with each other
_SETTING = (
    "backends",
    "cpu_info",
    "gpu_info",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "n_gpu_layers",
)
_TEST = ("n_prompt", "n_gen", "n_depth")

#: depths that a fit needs
N_DEPTHS_MIN = 3


@dataclass(frozen=True, slots=True)
class Summary:
    """A row and what follows from it.

    Attributes:
        row: The row.
        avg_ns: Nanoseconds per repetition, mean.
        stddev_ns: Their standard deviation.
        avg_ts: Tokens per second, mean over repetitions.
        stddev_ts: Their standard deviation.
        median_ts: Their median.
        spread_ts: Half the distance between their quartiles.
        baseline: Name of the configuration that it is compared with.
        ratio: Speed as a multiple of the baseline's in the same repetition, median.
        ratio_min: The least of these ratios.
        ratio_max: The largest.
        p50_ms: Milliseconds between tokens, median over all repetitions; None: a prompt.
        p99_ms: Their 99th percentile; None: a prompt.
        max_ms: The longest; None: a prompt.
        migrate_share: Share of the time spent moving tokens to cold; None: a plain cache.
    """

    row: Row
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    median_ts: float
    spread_ts: float
    baseline: str
    ratio: float
    ratio_min: float
    ratio_max: float
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    migrate_share: float | None

    def record(self) -> dict[str, Any]:
        """For JSON: the row's fields and these, the samples last."""
        derived = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "row"}
        row = asdict(self.row)
        samples = {name: row.pop(name) for name in list(row) if name.startswith("samples_")}
        return row | derived | samples | {"samples_ts": speeds(self.row)}

    def flat(self) -> dict[str, Any]:
        """For CSV: the same without samples."""
        return {name: value for name, value in self.record().items() if not name.startswith("samples_")}


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Rows with what follows from them; the first row of a test is the baseline of the others.

    Args:
        rows: The rows, in their order.
    """
    baselines: dict[tuple[Any, ...], Row] = {}
    return [_summary(row, baselines.setdefault(_key(row, *_SETTING, *_TEST), row)) for row in rows]


def speeds(row: Row) -> list[float]:
    """Tokens per second of every repetition."""
    return [1e9 * row.n_tokens / ns for ns in row.samples_ns]


def paired_ratios(row: Row, baseline: Row) -> list[float]:
    """How many times as fast as the baseline a row is, for every repetition that both have."""
    pairs = zip(baseline.samples_ns, row.samples_ns, strict=False)
    return [theirs / ours for theirs, ours in pairs]


def _key(row: Row, *names: str) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in names)


def _summary(row: Row, baseline: Row) -> Summary:
    ts = speeds(row)
    low, median, high = np.percentile(ts, [25, 50, 75]).tolist()
    ratios = paired_ratios(row, baseline)
    p50, p99, worst = _latencies(row)
    moved = row.samples_migrate_us
    return Summary(
        row=row,
        avg_ns=sum(row.samples_ns) // len(row.samples_ns),
        stddev_ns=int(_stddev(row.samples_ns)),
        avg_ts=statistics.fmean(ts),
        stddev_ts=_stddev(ts),
        median_ts=median,
        spread_ts=(high - low) / 2,
        baseline=baseline.cache,
        ratio=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        p50_ms=p50,
        p99_ms=p99,
        max_ms=worst,
        migrate_share=None if moved is None else 1e3 * sum(moved) / sum(row.samples_ns),
    )


def _stddev(values: Sequence[float]) -> float:
    return float(statistics.stdev(values)) if len(values) > 1 else 0.0


def _latencies(row: Row) -> tuple[float | None, float | None, float | None]:
    times = [ns / 1e6 for repetition in row.samples_token_ns for ns in repetition]
    if not times:
        return None, None, None
    p50, p99 = np.percentile(times, [50, 99]).tolist()
    return p50, p99, max(times)


#
# time per token over depth
#


@dataclass(frozen=True, slots=True)
class Fit:
    """Time per token = ``base_ms`` + ``slope_us`` * depth / 1000, least squares over depths.

    Attributes:
        row: The configuration at the first depth.
        n_depths: Points.
        base_ms: Milliseconds per token in an empty cache.
        slope_us: Microseconds more per 1000 positions in the cache.
        r2: Share of the variance that it explains.
        ratio: Slope as a multiple of the baseline's; None: the baseline's is not positive.
    """

    row: Row
    n_depths: int
    base_ms: float
    slope_us: float
    r2: float
    ratio: float | None

    @property
    def test(self) -> str:
        """The tests' name without a depth."""
        return name_of_test(self.row.n_prompt, self.row.n_gen)


def fits(rows: Iterable[Row]) -> list[Fit]:
    """Fits of everything that was decoded token by token at three depths or more; the first is the baseline.

    Args:
        rows: The rows, in their order.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.n_gen > 0 and row.n_prompt == 0:
            groups.setdefault(_key(row, *_SETTING, "n_gen", "cache"), []).append(row)
    result: list[Fit] = []
    baselines: dict[tuple[Any, ...], float] = {}
    for key, group in groups.items():
        depths = [row.n_depth for row in group]
        if len(set(depths)) < N_DEPTHS_MIN:
            continue
        ns_per_token = [statistics.median(row.samples_ns) / row.n_gen for row in group]
        base, slope, r2 = fit_line(depths, ns_per_token)
        baseline = baselines.setdefault(key[:-1], slope)
        ratio = slope / baseline if baseline > 0 else None
        result.append(Fit(group[0], len(set(depths)), base / 1e6, slope, r2, ratio))  # ns per position is µs per 1000
    return result


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Intercept, slope and R² of the least squares line."""
    design = np.stack([np.ones(len(x)), np.asarray(x, float)], axis=1)
    values = np.asarray(y, float)
    (intercept, slope), *_ = np.linalg.lstsq(design, values, rcond=None)
    rest = float(((values - design @ (intercept, slope)) ** 2).sum())
    total = float(((values - values.mean()) ** 2).sum())
    return float(intercept), float(slope), 1.0 - rest / total if total > 0 else 1.0
