"""What a context did, as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from ..display import mib, types

if TYPE_CHECKING:
    from ..stats import CacheStats, PerfData


def summary(n_prompt: int, n_generated: int, perf: PerfData, stats: CacheStats | None) -> Table:
    """Tokens, speed and, for a mixed KV cache (stats not None), what the cache holds and has done."""
    table = Table(show_header=False, title="llamamix")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("tokens in", f"{n_prompt}")
    table.add_row("tokens out", f"{n_generated}")
    table.add_row("prefill", f"{perf.p_eval_per_second:.1f} tokens/s")
    table.add_row("decode", f"{perf.eval_per_second:.1f} tokens/s")
    if stats is None:
        table.add_row("KV cache", "plain")
        return table

    per_migration = stats.t_migrate_us / stats.n_migrations if stats.n_migrations else 0.0
    table.add_section()
    table.add_row(f"hot cells ({types(stats.type_hot_k, stats.type_hot_v)})", f"{stats.hot_used} of {stats.hot_size}")
    table.add_row(
        f"cold cells ({types(stats.type_cold_k, stats.type_cold_v)})", f"{stats.cold_used} of {stats.cold_size}"
    )
    table.add_row("migrations", f"{stats.n_migrations}")
    table.add_row("tokens moved", f"{stats.n_tokens_moved}")
    table.add_row("time per migration", f"{per_migration:.0f} µs")
    table.add_section()
    table.add_row("KV cache", mib(stats.bytes_total))
    table.add_row(f"all of it in {types(stats.type_hot_k, stats.type_hot_v)}", mib(stats.bytes_plain))
    table.add_row("ratio", f"{stats.ratio:.3f}")
    if stats.bytes_rest > 0:
        table.add_row("sliding windows, recurrent states", mib(stats.bytes_rest))
    return table
