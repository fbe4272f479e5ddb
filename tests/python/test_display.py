"""What objects say of themselves: repr(), print(), to_dict() and HTML."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest

from llamamix import Batch, CacheStats, Context, DecodeAborted, MixedKVCache, PerfData, SamplingParams, SBatch, Trace
from llamamix.display import bar

MakeContext = Callable[..., Context]

STATS = CacheStats(
    n_stream=1, n_layer=30, hot_size=512, hot_used=320, cold_size=7680, cold_used=2808, type_hot_k="f16",
    type_hot_v="f16", type_cold_k="q8_0", type_cold_v="q4_0", bytes_hot=11 << 20, bytes_cold=45 << 20,
    bytes_plain=160 << 20, n_migrations=23, n_tokens_moved=2808, n_refused=0, t_migrate_us=13225, bytes_rest=0,
)  # fmt: skip

STATS_TEXT = """\
hot     ###############---------  320 of 512 cells, f16
cold    #########---------------  2808 of 7680 cells, q8_0, q4_0
memory  56.0 MiB, 0.350 of a plain 160.0 MiB
moved   2808 tokens in 23 migrations, 575 \u00b5s each"""


def replaced(**changes: Any) -> CacheStats:
    return CacheStats(**{name: getattr(STATS, name) for name in CacheStats.__dataclass_fields__} | changes)


def test_stats_as_text() -> None:
    assert str(STATS) == STATS_TEXT
    empty = replaced(cold_size=0, cold_used=0, n_migrations=0, n_tokens_moved=0, hot_used=0)
    assert str(empty).splitlines()[:2] == [f"hot     {'-' * 24}  0 of 512 cells, f16", "cold    no cells"]
    assert str(empty).splitlines()[3] == "moved   0 tokens in 0 migrations"
    more = str(replaced(n_refused=2, bytes_rest=3 << 19)).splitlines()
    assert more[4:] == [
        "refused    2 batches: hot and cold were full",
        "beside it  1.5 MiB of sliding windows, recurrent states",
    ]


def test_bars() -> None:
    assert [bar(share).count("#") for share in (0, 1e-9, 0.5, 0.999, 1, 1.5)] == [0, 1, 12, 24, 24, 24]
    assert {len(bar(share)) for share in (0, 0.3, 1, 2)} == {24}


def test_stats_as_a_dict() -> None:
    data = json.loads(json.dumps(STATS.to_dict()))
    assert set(data) == {*CacheStats.__dataclass_fields__, "bytes_total", "ratio"}
    assert (data["hot_used"], data["type_cold_k"], data["bytes_total"], data["ratio"]) == (320, "q8_0", 56 << 20, 0.35)
    assert CacheStats(**{name: data[name] for name in CacheStats.__dataclass_fields__}) == STATS


def test_stats_as_html() -> None:
    root = ElementTree.fromstring(STATS._repr_html_())
    rows = [["".join(cell.itertext()) for cell in row if cell.tag != "caption"] for row in root.iter("tr")]
    assert [row[0] for row in rows] == ["hot", "cold", "memory", "moved"]
    assert rows[1][2] == "2808 of 7680 cells, q8_0, q4_0"
    widths = re.findall(r"width:([\d.]+)%", STATS._repr_html_())
    assert widths == ["62.5", "36.6"]  # 320 of 512, 2808 of 7680


def test_perf() -> None:
    perf = PerfData(n_p_eval=3000, n_eval=128, n_reused=120, t_load_ms=50.0, t_p_eval_ms=6000.0, t_eval_ms=1000.0)
    assert str(perf) == "prefill  3000 tokens in 6.00 s, 500.0 tokens/s\ndecode   128 tokens in 1.00 s, 128.0 tokens/s"
    assert perf.to_dict()["p_eval_per_second"] == 500.0 and json.dumps(perf.to_dict())
    assert "500.0 tokens/s" in perf._repr_html_()


def test_a_context(make_context: MakeContext) -> None:
    context = make_context(n_ctx=512, n_seq_max=3, kv_unified=True, kv_mixed="hot=64,group=16,sink=0")
    assert repr(context.memory) == "<Memory of 3 sequences, all empty>"
    context.decode(list(range(3, 103)))
    context.decode([5, 6], seq_id=2)
    context.memory.seq_rm(0, 0, 10)
    assert repr(context.memory) == "<Memory of 3 sequences, 0: positions 10 to 99, 2: positions 0 to 1>"
    assert str(context.stats).startswith(f"hot     {bar(context.stats.hot_used / 64)}  {context.stats.hot_used} of 64")
    assert "mixed KV cache" in context._repr_html_() and "&lt;Context n_ctx=512" in context._repr_html_()
    context.close()
    assert repr(context.memory) == "<Memory of 3 sequences (closed)>"
    assert context._repr_html_().endswith("(closed)&gt;</pre>")
    assert "mixed" not in make_context()._repr_html_().replace("kv_mixed", "")


def test_many_sequences(make_context: MakeContext) -> None:
    context = make_context(n_ctx=512, n_seq_max=20, kv_unified=True)
    context.decode_batch([5] * 10, list(range(10)))
    assert repr(context.memory).endswith("7: positions 0 to 0, and 2 others>")


def test_nobody_waits_for_a_repr(make_context: MakeContext) -> None:
    """Not where another thread computes, and not in a callback of the same one."""
    context = make_context(kv_mixed="hot=64")
    cache = MixedKVCache.from_context(context)
    said: list[str] = []

    def look() -> bool:
        thread = threading.Thread(target=lambda: said.append(repr(context.memory)))
        thread.start()
        thread.join(10)
        said.extend((repr(context.memory), repr(cache.hot), context._repr_html_()))
        return True

    context.set_abort_callback(look)
    with pytest.raises(DecodeAborted):
        context.decode([5] * 40)
    in_use = "<Memory of 1 sequences (in use)>"
    assert said[:3] == [in_use, in_use, "<Tier 1 x 64 cells, K f16, V f16>"] and "<table>" not in said[3]
    context.set_abort_callback(None)
    context.decode([5] * 40)
    assert repr(cache.hot) == "<Tier 1 x 64 cells, 40 in use, K f16, V f16>"


def test_batches() -> None:
    batch = Batch()
    assert repr(batch) == "<Batch of no tokens>"
    for i in range(5):
        batch.add(100 + i, 3 + i, [0, 1] if i == 0 else 0, logits=i == 4)
    assert repr(batch) == "<Batch of 5 tokens, 2 sequences, positions 3 to 7, 1 with logits>"
    with SBatch(batch) as sbatch:
        assert repr(sbatch) == "<SBatch of 5 tokens>"
    assert repr(sbatch) == "<SBatch of 5 tokens (closed)>"


def test_a_cache_by_hand() -> None:
    with MixedKVCache(n_ctx=64, hot=16, sink=0) as cache:
        batch = Batch()
        batch.add(5, 0, 0)
        cache.find_slot(SBatch(batch, memory=cache).split_simple(1))
        cache.commit()
        assert repr(cache.hot) == "<Tier 1 x 16 cells, 1 in use, K f16, V f16>"
        assert "1 of 16 cells" in cache._repr_html_()
    assert repr(cache.hot) == "<Tier 1 x 16 cells, K f16, V f16>"
    assert "(closed)" in cache._repr_html_()


def test_a_trace(make_context: MakeContext) -> None:
    context = make_context(kv_mixed="hot=64")
    trace = Trace(context, n_max=100)
    assert repr(trace) == "<Trace of up to 100 records, not begun, 0 dropped>"
    with trace:
        assert re.fullmatch(r"<Trace of up to 100 records, on for \d+\.\d s, 0 dropped>", repr(trace))
    assert repr(trace) == "<Trace of up to 100 records, stopped, 0 dropped>"
    context.close()
    assert repr(trace) == "<Trace of up to 100 records, closed, 0 dropped>"


def test_parameters_and_generations_as_well(make_context: MakeContext) -> None:
    assert repr(SamplingParams(temperature=0)).startswith("SamplingParams(temperature=0, ")
    assert "Generation" in repr(make_context().generate("in"))
