"""What a context reports about itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ._ffi import lib, sized
from .display import bar, html_table, mib, text_table, types
from .formats import format_name


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a mixed KV cache holds and has done so far. ``print()`` shows it as a table, a notebook with bars.

    All but ``bytes_rest`` is about the layers that attend to the whole context; cells are those of all streams
    together.

    Attributes:
        n_stream: Streams: 1 when unified, else one per sequence.
        n_layer: Layers that hold K/V.
        hot_size: Hot cells.
        hot_used: Hot cells in use.
        cold_size: Cold cells.
        cold_used: Cold cells in use.
        type_hot_k: ggml type of hot rows of K.
        type_hot_v: ggml type of hot rows of V.
        type_cold_k: ggml type of cold rows of K.
        type_cold_v: ggml type of cold rows of V.
        bytes_hot: Bytes allocated for hot rows.
        bytes_cold: Bytes allocated for cold rows and their means.
        bytes_plain: Bytes that a plain cache of the hot types takes for the same context.
        n_migrations: Migrations that were completed.
        n_tokens_moved: Cells moved from hot to cold.
        n_refused: Batches refused because hot and cold were full.
        t_migrate_us: Microseconds spent moving; the host's part where a GPU does it later.
        bytes_rest: Bytes allocated for what is not mixed: the cache of sliding windows, recurrent states.
    """

    n_stream: int
    n_layer: int
    hot_size: int
    hot_used: int
    cold_size: int
    cold_used: int
    type_hot_k: str
    type_hot_v: str
    type_cold_k: str
    type_cold_v: str
    bytes_hot: int
    bytes_cold: int
    bytes_plain: int
    n_migrations: int
    n_tokens_moved: int
    n_refused: int
    t_migrate_us: int
    bytes_rest: int

    @property
    def bytes_total(self) -> int:
        """Bytes allocated, hot and cold."""
        return self.bytes_hot + self.bytes_cold

    @property
    def ratio(self) -> float:
        """Bytes allocated as a share of a plain cache's."""
        return self.bytes_total / self.bytes_plain

    def to_dict(self) -> dict[str, Any]:
        """All of it by name, with bytes_total and ratio; what json.dumps() takes."""
        return asdict(self) | {"bytes_total": self.bytes_total, "ratio": self.ratio}

    def __str__(self) -> str:
        return text_table([(name, "" if share is None else bar(share), what) for name, share, _, what in self._rows()])

    def _repr_html_(self) -> str:
        """A table with bars of the cells in use, for notebooks."""
        return html_table("mixed KV cache", self._rows())

    def _rows(self) -> list[tuple[str, float | None, str, str]]:
        rows: list[tuple[str, float | None, str, str]] = []
        for name, used, size, kinds, colour in (
            ("hot", self.hot_used, self.hot_size, types(self.type_hot_k, self.type_hot_v), "#d9534f"),
            ("cold", self.cold_used, self.cold_size, types(self.type_cold_k, self.type_cold_v), "#4a90d9"),
        ):
            what = f"{used} of {size} cells, {kinds}" if size else "no cells"
            rows.append((name, used / size if size else None, colour, what))
        rows.append(
            ("memory", None, "", f"{mib(self.bytes_total)}, {self.ratio:.3f} of a plain {mib(self.bytes_plain)}")
        )
        each = f", {self.t_migrate_us / self.n_migrations:.0f} \u00b5s each" if self.n_migrations else ""
        rows.append(("moved", None, "", f"{self.n_tokens_moved} tokens in {self.n_migrations} migrations{each}"))
        if self.n_refused:
            rows.append(("refused", None, "", f"{self.n_refused} batches: hot and cold were full"))
        if self.bytes_rest:
            rows.append(("beside it", None, "", f"{mib(self.bytes_rest)} of sliding windows, recurrent states"))
        return rows

    @classmethod
    def from_c(cls, c_stats: Any) -> CacheStats:
        """From a ``struct llama_kv_mixed_stats``."""
        values = {name: getattr(c_stats, name) for name in cls.__dataclass_fields__}
        types = {name: format_name(number) for name, number in values.items() if name.startswith("type_")}
        return cls(**(values | types))


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """How far the computation of many tokens is.

    Attributes:
        n_done: Tokens that are computed.
        n_tokens: All of them.
        stats: The mixed KV cache, which holds those that are being computed as well; None: it is a plain one.
    """

    n_done: int
    n_tokens: int
    stats: CacheStats | None


@dataclass(frozen=True, slots=True)
class PerfData:
    """What a context has computed since it was made or perf_reset() was called.

    Attributes:
        n_p_eval: Tokens computed in batches (prefill).
        n_eval: Tokens decoded one by one.
        n_reused: Compute graphs that were reused.
        t_load_ms: Milliseconds that the model took to load.
        t_p_eval_ms: Milliseconds that batches took.
        t_eval_ms: Milliseconds that single tokens took.
    """

    n_p_eval: int
    n_eval: int
    n_reused: int
    t_load_ms: float
    t_p_eval_ms: float
    t_eval_ms: float

    @property
    def p_eval_per_second(self) -> float:
        """Prefill, tokens per second, 0 when there was none."""
        return 1e3 * self.n_p_eval / self.t_p_eval_ms if self.t_p_eval_ms > 0 else 0.0

    @property
    def eval_per_second(self) -> float:
        """Decode, tokens per second, 0 when there was none."""
        return 1e3 * self.n_eval / self.t_eval_ms if self.t_eval_ms > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it by name, with the tokens per second; what json.dumps() takes."""
        speeds = {"p_eval_per_second": self.p_eval_per_second, "eval_per_second": self.eval_per_second}
        return asdict(self) | speeds

    def __str__(self) -> str:
        return text_table([(name, "", what) for name, _, _, what in self._rows()])

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        return html_table("computed", self._rows())

    def _rows(self) -> list[tuple[str, float | None, str, str]]:
        lines = (
            ("prefill", self.n_p_eval, self.t_p_eval_ms, self.p_eval_per_second),
            ("decode", self.n_eval, self.t_eval_ms, self.eval_per_second),
        )
        return [(name, None, "", f"{n} tokens in {t / 1e3:.2f} s, {speed:.1f} tokens/s") for name, n, t, speed in lines]

    @classmethod
    def from_c(cls, c_perf: Any) -> PerfData:
        """From a ``struct llama_perf_context_data``."""
        values = {name: getattr(c_perf, name) for name in cls.__dataclass_fields__}
        for count, time in (("n_p_eval", "t_p_eval_ms"), ("n_eval", "t_eval_ms")):
            if values[time] == 0:  # libllama reports 1 where there was none
                values[count] = 0
        return cls(**values)


def read_stats(ctx: Any) -> CacheStats | None:
    """Those of a ``struct llama_context``, None: its cache is a plain one."""
    c_stats = sized("struct llama_kv_mixed_stats *")
    code = lib.llama_kv_mixed_get_stats(lib.llama_get_memory(ctx), c_stats)
    return CacheStats.from_c(c_stats) if code == 0 else None
