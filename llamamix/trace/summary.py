"""What a run amounts to, from its records."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from .events import Event, EventKind, Trigger
from .recording import End, Header, Progress

if TYPE_CHECKING:
    from rich.table import Table

_MIB = 1 << 20
_N_TEXT = 1000  # characters

#: the last events that are kept
N_LAST = 4

#: Trigger in words
TRIGGERS = {
    Trigger.THRESHOLD: "over the threshold",
    Trigger.ROOM: "room for new tokens",
    Trigger.MANUAL: "by hand",
}


class ErrorSum:
    """The error of several migrations together."""

    def __init__(self) -> None:
        self._squares = 0.0
        self._squares_before = 0.0  # of the values themselves
        self._n_tokens = 0
        self.max: float = 0.0

    def add(self, rmse: float | None, maximum: float | None, rms: float | None, n_tokens: int) -> None:
        if rmse is None or maximum is None or rms is None:  # not measured
            return
        # every token has as many values, so tokens are the weight
        self._squares += rmse * rmse * n_tokens
        self._squares_before += rms * rms * n_tokens
        self._n_tokens += n_tokens
        self.max = max(self.max, maximum)

    @property
    def rmse(self) -> float:
        return math.sqrt(self._squares / self._n_tokens) if self._n_tokens else 0.0

    @property
    def relative(self) -> float:
        """The error as a share of what the values are, by their root mean squares."""
        return math.sqrt(self._squares / self._squares_before) if self._squares_before else 0.0

    def __str__(self) -> str:
        if not self._n_tokens:
            return "not measured"
        return f"RMSE {self.rmse:.4f} ({100 * self.relative:.1f} %), max {self.max:.3f}"


class Summary:
    """The records of a run added up, one after the other.

    It does not matter whether they come from a trace or from a file.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        self.t: float = 0.0
        self.hot_used: int = header.cache.hot_used
        self.cold_used: int = header.cache.cold_used
        self.progress: Progress = Progress(0.0, 0, 0, self.hot_used, self.cold_used, 0.0, 0.0, "")
        self.end: End | None = None
        self.text: str = ""  # the last of what was generated
        self.last: deque[Event] = deque(maxlen=N_LAST)
        self.moving: Event | None = None  # a migration that has begun
        self.migration: Event | None = None  # the last one that was completed

        self.n_migrations: int = 0
        self.n_tokens_moved: int = 0
        self.n_failed: int = 0
        self.n_refused: int = 0
        self.time_moving: float = 0.0
        self.time_max: float = 0.0
        self.bytes_in: int = 0
        self.bytes_out: int = 0
        self.error_k: ErrorSum = ErrorSum()
        self.error_v: ErrorSum = ErrorSum()
        self.layers: dict[int, tuple[ErrorSum, ErrorSum]] = {}

    def add(self, record: Event | Progress | End) -> None:
        self.t = record.t
        if isinstance(record, Event):
            self._add_event(record)
        elif isinstance(record, Progress):
            self.progress = record
            self.text = (self.text + record.text)[-_N_TEXT:]
            self.hot_used, self.cold_used = record.hot_used, record.cold_used
        else:
            self.end = record

    def _add_event(self, event: Event) -> None:
        self.last.append(event)
        if event.stream is None or self.header.cache.n_stream == 1:
            self.hot_used, self.cold_used = event.hot_used, event.cold_used
        self.moving = event if event.kind is EventKind.TRIGGER else None
        if event.kind is EventKind.FAIL:
            self.n_failed += 1
        elif event.kind is EventKind.REFUSE:
            self.n_refused += 1
        elif event.kind is EventKind.MIGRATE:
            self._add_migration(event)

    def _add_migration(self, event: Event) -> None:
        self.migration = event
        self.n_migrations += 1
        self.n_tokens_moved += event.n_tokens
        self.time_moving += event.duration
        self.time_max = max(self.time_max, event.duration)
        self.bytes_in += event.bytes_in
        self.bytes_out += event.bytes_out
        self.error_k.add(event.rmse_k, event.max_k, event.rms_k, event.n_tokens)
        self.error_v.add(event.rmse_v, event.max_v, event.rms_v, event.n_tokens)
        for error in event.layers:
            k, v = self.layers.setdefault(error.il, (ErrorSum(), ErrorSum()))
            k.add(error.rmse_k, error.max_k, error.rms_k, event.n_tokens)
            v.add(error.rmse_v, error.max_v, error.rms_v, event.n_tokens)

    #
    # in words
    #

    @property
    def type_hot(self) -> str:
        return _types(self.header.cache.type_hot_k, self.header.cache.type_hot_v)

    @property
    def type_cold(self) -> str:
        return _types(self.header.cache.type_cold_k, self.header.cache.type_cold_v)

    @property
    def migration_time(self) -> str:
        if self.n_migrations == 0:
            return "none"
        return f"mean {1e6 * self.time_moving / self.n_migrations:.0f} µs, max {1e6 * self.time_max:.0f} µs"

    @property
    def memory_saved(self) -> str:
        cache = self.header.cache
        saved = cache.bytes_plain - cache.bytes_total
        return f"{saved / _MIB:.1f} MiB ({_percent(saved, cache.bytes_plain)})"

    def rows(self) -> list[list[tuple[str, str]]]:
        """Names and values, in sections."""
        cache, progress = self.header.cache, self.progress
        trouble = [("migrations that failed", self.n_failed), ("batches refused", self.n_refused)]
        return [
            [
                ("tokens in", f"{progress.n_in}"),
                ("tokens out", f"{progress.n_out}"),
                ("prefill", f"{progress.prefill:.1f} tokens/s"),
                ("decode", f"{progress.decode:.1f} tokens/s"),
            ],
            [
                (f"hot cells ({self.type_hot})", f"{self.hot_used} of {cache.hot_size}"),
                (f"cold cells ({self.type_cold})", f"{self.cold_used} of {cache.cold_size}"),
                ("migrations", f"{self.n_migrations}"),
                *((name, f"{n}") for name, n in trouble if n > 0),
                ("tokens moved", f"{self.n_tokens_moved}"),
                ("bytes moved", f"{self.bytes_in / _MIB:.2f} MiB became {self.bytes_out / _MIB:.2f} MiB"),
                ("time per migration", self.migration_time),
                ("time in migrations", _percent(self.time_moving, self.t)),
                ("error of K", f"{self.error_k}"),
                ("error of V", f"{self.error_v}"),
                ("records dropped", f"{self.end.n_dropped if self.end else 0}"),
            ],
            [
                ("KV cache", f"{cache.bytes_total / _MIB:.1f} MiB"),
                (f"all of it in {self.type_hot}", f"{cache.bytes_plain / _MIB:.1f} MiB"),
                ("memory saved", self.memory_saved),
            ],
        ]

    def tables(self) -> list[Table]:
        """The summary, and the error by layer when that was kept."""
        from rich.table import Table

        title = "llamamix trace" + (" (interrupted)" if self.end and self.end.interrupted else "")
        table = Table(show_header=False, title=title)
        table.add_column(style="bold")
        table.add_column(justify="right")
        for section in self.rows():
            for row in section:
                table.add_row(*row)
            table.add_section()
        if not self.layers:
            return [table]

        by_layer = Table(title="error by layer")
        for name in ("layer", "RMSE K", "% of K", "max K", "RMSE V", "% of V", "max V"):
            by_layer.add_column(name, justify="right")
        for il, pair in sorted(self.layers.items()):
            cells = ((f"{e.rmse:.4f}", f"{100 * e.relative:.1f}", f"{e.max:.3f}") for e in pair)
            by_layer.add_row(f"{il}", *(cell for side in cells for cell in side))
        return [table, by_layer]


def printable(text: str) -> str:
    """Without what would control a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _types(k: str, v: str) -> str:
    return k if k == v else f"{k}, {v}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole > 0 else "0.0 %"
