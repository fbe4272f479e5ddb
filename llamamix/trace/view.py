"""The live view of a trace."""

from __future__ import annotations

import io
import re

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.bar import Bar
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .events import Event, EventKind
from .summary import N_LAST, TRIGGERS, ErrorSum, Summary, printable

_N_TEXT = 3  # lines
_SVG_WIDTH = 100  # characters
_SPARKS = "▁▂▃▄▅▆▇█"
_STYLES = {
    EventKind.TRIGGER: "yellow",
    EventKind.MIGRATE: "green",
    EventKind.FAIL: "bold red",
    EventKind.REFUSE: "bold red",
}


def view(summary: Summary) -> Panel:
    """The state of a run, in no more lines than the smallest of terminals has (24)."""
    parts: list[RenderableType] = [_bars(summary), _migration(summary), "", _numbers(summary)]
    if summary.layers:
        parts.append(_layers(summary))
    parts += ["", _events(summary), "", _Tail(printable(summary.text))]
    header = summary.header
    return Panel(
        Group(*parts),
        title=Text(printable(header.model or "KV cache"), "bold"),
        subtitle=Text(printable(header.kv_mixed), "dim"),
        padding=(0, 2),
    )


def svg(summary: Summary) -> str:
    """The view as a picture that needs nothing from elsewhere."""
    console = Console(record=True, file=io.StringIO(), width=_SVG_WIDTH)
    console.print(view(summary))
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="llamamix trace", code_format=template)


def _bars(summary: Summary) -> Table:
    cache = summary.header.cache
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(style="bold")
    grid.add_column(ratio=1)
    grid.add_column(justify="right")
    grid.add_column(justify="right")
    for name, used, size, color in (
        (f"hot ({summary.type_hot})", summary.hot_used, cache.hot_size, "red"),
        (f"cold ({summary.type_cold})", summary.cold_used, cache.cold_size, "blue"),
    ):
        share = used / size if size else 0.0
        bar = Bar(1.0, 0.0, min(share, 1.0), color=color, bgcolor="grey23")
        grid.add_row(name, bar, f"{used}/{size}", f"{share:.1%}")
    return grid


def _migration(summary: Summary) -> Text:
    text, style = "no migration yet", "dim"
    if summary.moving:
        text, style = f"moving {_what(summary.moving)} ...", "bold yellow"
    elif summary.migration:
        last = summary.migration
        text, style = f"last migration: {_what(last)}, {1e6 * last.duration:.0f} µs", "green"
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _what(event: Event) -> str:
    why = f", {TRIGGERS[event.trigger]}" if event.trigger else ""
    return f"{event.n_tokens} tokens ({event.pos_min} to {event.pos_max}){why}"


def _numbers(summary: Summary) -> Table:
    progress = summary.progress
    grid = Table.grid(padding=(0, 2), expand=True)
    for style, ratio in (("bold", None), ("", 1), ("bold", None), ("", None)):
        grid.add_column(style=style, ratio=ratio, no_wrap=True)
    rows = (
        ("tokens in", f"{progress.n_in}", "error of K", f"{summary.error_k}"),
        ("tokens out", f"{progress.n_out}", "error of V", f"{summary.error_v}"),
        ("prefill", f"{progress.prefill:.1f} tokens/s", "per migration", summary.migration_time),
        ("decode", f"{progress.decode:.1f} tokens/s", "memory saved", summary.memory_saved),
        ("migrations", f"{summary.n_migrations}", "tokens moved", f"{summary.n_tokens_moved}"),
    )
    for row in rows:
        grid.add_row(*row)
    return grid


def _layers(summary: Summary) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    for side, name in enumerate("KV"):
        errors = {il: pair[side] for il, pair in sorted(summary.layers.items())}
        worst = max(errors, key=lambda il: errors[il].relative)
        largest = f"error up to {100 * errors[worst].relative:.1f} % (layer {worst})"
        grid.add_row(f"{name} by layer", _sparks(list(errors.values())), largest)
    return grid


def _sparks(errors: list[ErrorSum]) -> str:
    top = max(error.relative for error in errors) or 1.0
    return "".join(_SPARKS[min(int(len(_SPARKS) * error.relative / top), len(_SPARKS) - 1)] for error in errors)


def _events(summary: Summary) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("event", "seconds", "tokens", "positions", "hot", "cold", "µs", "error K", "error V"):
        table.add_column(name, justify="left" if name == "event" else "right")
    for event in summary.last:
        positions = "" if event.pos_min is None else f"{event.pos_min} to {event.pos_max}"
        table.add_row(
            Text(event.kind.value, _STYLES.get(event.kind, "")),
            f"{event.t:.3f}",
            f"{event.n_tokens}",
            positions,
            f"{event.hot_used}",
            f"{event.cold_used}",
            f"{1e6 * event.duration:.0f}" if event.duration else "",
            _relative(event.rmse_k, event.rms_k),
            _relative(event.rmse_v, event.rms_v),
        )
    for _ in range(len(summary.last), N_LAST):  # the height stays
        table.add_row()
    return table


def _relative(rmse: float | None, rms: float | None) -> str:
    return "" if rmse is None or not rms else f"{100 * rmse / rms:.1f} %"


class _Tail:
    """The last lines of a text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = Text(self._text, "italic").wrap(console, options.max_width)[-_N_TEXT:]
        yield Group(*lines, *[""] * (_N_TEXT - len(lines)))
