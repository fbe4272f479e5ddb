"""Small tables of what a cache holds, as text and as HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

_MIB = 1 << 20
_N_BAR = 24  # characters
_STYLE_BAR = "display:inline-block;width:12em;height:0.8em;background:#8884;vertical-align:middle"


def mib(n_bytes: int) -> str:
    """A number of bytes in MiB."""
    return f"{n_bytes / _MIB:.1f} MiB"


def n_bytes(n: int) -> str:
    """A number of bytes in the unit that suits it: 720 B, 22.5 KiB, 59.4 MiB, 7.6 TiB."""
    if n < 1024:
        return f"{n} B"
    value, units = n / 1024, iter(("KiB", "MiB", "GiB", "TiB", "PiB"))
    unit = next(units)
    for larger in units:
        if value < 999.95:  # what would be written as 1000.0
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}"


def types(k: str, v: str) -> str:
    """The types of K and V, once when they are the same."""
    return k if k == v else f"{k}, {v}"


def bar(share: float) -> str:
    """A share from 0 to 1 as a bar of characters; something is seen of everything over 0."""
    n = min(_N_BAR, max(round(share * _N_BAR), share > 0))
    return "#" * n + "-" * (_N_BAR - n)


def text_table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Lines of a name, a bar or nothing, and what it says."""
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:{width}}  {f'{line}  ' if line else ''}{what}".rstrip() for name, line, what in rows)


def html_table(title: str, rows: Sequence[tuple[str, float | None, str, str]]) -> str:
    """A table of a name, a share that is drawn as a bar of a colour (None: no bar), and what it says."""
    cells = []
    for name, share, colour, what in rows:
        drawn = ""
        if share is not None:
            width = min(100.0, max(0.0, 100 * share))
            fill = f"display:block;width:{width:.1f}%;height:100%;background:{colour}"
            drawn = f'<span style="{_STYLE_BAR}"><span style="{fill}"></span></span>'
        left = 'style="text-align:left"'
        cells.append(
            f"<tr><th {left}>{html.escape(name)}</th><td {left}>{drawn}</td><td {left}>{html.escape(what)}</td></tr>"
        )
    return f"<table><caption>{html.escape(title)}</caption>{''.join(cells)}</table>"
