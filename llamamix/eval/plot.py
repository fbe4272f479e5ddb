"""Bytes against divergence, drawn with matplotlib: what a cache costs, and what it gives for that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .. import drawing
from .cases import ABLATION, NOISE, REFERENCE
from .records import Row
from .table import grouped
from .texts import EvalError

_MARKERS = "osDv^P*X<>"  # with the colours' cycle of ten: as many caches can be told apart
_N_COLUMNS = 3


def check_matplotlib() -> None:
    """Raise EvalError when there is none."""
    drawing.check_matplotlib(EvalError)


def plot(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draw, for every model, context, leg and text, the mean divergence over the share of an F16 cache's bytes.

    A line joins the caches that no other one beats in both, and the noise is a line from side to side; caches that
    lack an ingredient are left out. The ending of the path says in which format. Raises EvalError, also when no cache
    was compared, and OSError when the picture can not be written.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    panels = grouped(
        [row for row in rows if row.role != ABLATION], lambda row: (row.model_sha256, row.n_ctx, row.leg, row.text)
    )
    panels = [panel for panel in panels if points(panel)]
    if not panels:
        raise EvalError("There is nothing to draw: no cache was compared with the reference.")

    n_columns = min(_N_COLUMNS, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(4 * n_columns, 3.4 * n_rows + 0.8), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    names = list(dict.fromkeys(row.cache for panel in panels for row in points(panel)))
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel, names, handles, several_models=len({row.model_sha256 for row in rows}) > 1)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    if len({row.model_sha256 for row in rows}) == 1:
        figure.suptitle(panels[0][0].model, fontsize=10, parse_math=False)
    labels = [name.replace("$", r"\$") for name in handles]  # which would begin a formula
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=min(3, len(handles)), fontsize=8)
    drawing.save(figure, path, EvalError)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, from left to right."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def points(rows: Sequence[Row]) -> list[Row]:
    """What can be drawn: a logarithm needs more than nothing."""
    return [row for row in rows if row.role not in (REFERENCE, NOISE) and row.kld_mean is not None and row.kld_mean > 0]


def _draw(axis: Any, panel: Sequence[Row], names: Sequence[str], handles: dict[str, Any], several_models: bool) -> None:
    drawn = points(panel)
    line = front([(row.share, row.kld_mean) for row in drawn if row.kld_mean is not None])
    axis.plot(*zip(*line, strict=True), color="0.7", linewidth=1, zorder=1)
    for row in drawn:
        i = names.index(row.cache)
        handles[row.cache] = axis.errorbar(
            [row.share], [row.kld_mean], [row.kld_mean_err or 0.0], fmt=_MARKERS[i % len(_MARKERS)], color=f"C{i % 10}",
            markersize=5, capsize=3,
        )  # fmt: skip
    for row in panel:
        if row.role == NOISE and row.kld_mean:
            handles["noise"] = axis.axhline(row.kld_mean, color="0.5", linewidth=0.8, linestyle=":")
    first = panel[0]
    model = f"{first.model}: " if several_models else ""
    axis.set_title(f"{model}{first.text}, {first.n_ctx} tokens, {first.leg}", fontsize=9, parse_math=False)
    axis.set_yscale("log")
    axis.set_xlim(left=0)
    axis.set_xlabel("bytes, share of F16", fontsize=8)
    axis.set_ylabel("mean KLD, nats", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
