"""What a context did, as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from ..display import mib, types

if TYPE_CHECKING:
    from ..demo import DemoRun
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

    table.add_section()
    for row in _cells(stats):
        table.add_row(*row)
    table.add_section()
    table.add_row("KV cache", mib(stats.bytes_total))
    table.add_row(f"all of it in {types(stats.type_hot_k, stats.type_hot_v)}", mib(stats.bytes_plain))
    table.add_row("ratio", f"{stats.ratio:.3f}")
    if stats.bytes_rest > 0:
        table.add_row("sliding windows, recurrent states", mib(stats.bytes_rest))
    return table


def comparison(mixed: DemoRun, plain: DemoRun) -> list[Table]:
    """A mixed KV cache and a plain one side by side, how many times as fast or large it is, and what it did."""
    stats = mixed.stats
    assert stats is not None
    table = Table(title="llamamix")
    table.add_column("", style="bold")
    for name in ("mixed", "plain", ""):
        table.add_column(name, justify="right")
    table.add_row("tokens in", f"{mixed.n_prompt}", f"{plain.n_prompt}")
    table.add_row("tokens out", f"{len(mixed.tokens)}", f"{len(plain.tokens)}")
    table.add_row("the same", f"{mixed.n_same(plain)}")
    for name, one, other in (
        ("prefill/s", mixed.perf.p_eval_per_second, plain.perf.p_eval_per_second),
        ("decode/s", mixed.perf.eval_per_second, plain.perf.eval_per_second),
        ("KV MiB", stats.bytes_total / 2**20, stats.bytes_plain / 2**20),
    ):
        table.add_row(name, f"{one:.1f}", f"{other:.1f}", f"× {one / other:.2f}" if other > 0 else "")

    did = Table(show_header=False, title="the mixed cache")
    did.add_column(style="bold")
    did.add_column(justify="right")
    for row in _cells(stats):
        did.add_row(*row)
    if stats.bytes_rest > 0:
        did.add_row("sliding windows, recurrent states", mib(stats.bytes_rest))
    return [table, did]


def _cells(stats: CacheStats) -> list[tuple[str, str]]:
    per_migration = stats.t_migrate_us / stats.n_migrations if stats.n_migrations else 0.0
    return [
        (f"hot cells ({types(stats.type_hot_k, stats.type_hot_v)})", f"{stats.hot_used} of {stats.hot_size}"),
        (f"cold cells ({types(stats.type_cold_k, stats.type_cold_v)})", f"{stats.cold_used} of {stats.cold_size}"),
        ("migrations", f"{stats.n_migrations}"),
        ("tokens moved", f"{stats.n_tokens_moved}"),
        ("time per migration", f"{per_migration:.0f} µs"),
    ]
