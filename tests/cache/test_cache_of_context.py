"""The cache of a context, as Python sees it: its rows, slots and gaps, and how long it is there."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.by_hand import find, positions
from helpers.rows import migrated

from llamamix import (
    Batch,
    CacheError,
    Context,
    ContextError,
    MixedKVCache,
    Model,
    ParamsError,
    SBatch,
)
from llamamix._ffi import ffi, lib


def test_cache_of_a_context_shows_its_rows(make_context: Callable[..., Context]) -> None:
    context = make_context(kv_mixed="hot=32,cold=q4_0,group=8,sink=4,mean=off", n_seq_max=2, kv_unified=True)
    context.decode(list(range(100, 120)))
    cache = MixedKVCache.from_context(context)
    assert (cache.params, cache.stats) == (context.kv_mixed, context.stats)
    assert positions(cache) == (list(range(20)), [])
    hot = cache.hot.get_k(1)
    assert hot.ne == (64, 2, 20, 1) and np.abs(hot.data).max() > 0.1

    assert cache.move_tokens_to_cold_cache(6) == 6
    assert positions(cache) == ([0, 1, 2, 3, *range(10, 20)], list(range(4, 10)))
    by_pos = {c.pos: c.index for c in cache.cold.cells()}
    for pos, index in by_pos.items():  # the rows were in the order of their positions
        np.testing.assert_array_equal(cache.cold.get_k(1).data[0, index], migrated(hot.data[0, pos], "q4_0", 64))

    context.decode([1, 2, 3])  # goes on as ever
    assert cache.seq_pos_max() == context.memory.seq_pos_max() == 22
    cache.seq_rm(0, 20, -1)
    assert context.memory.seq_pos_max() == 19
    context.decode(list(range(100, 180)))
    assert context.stats.hot_used == cache.hot.used


def test_rows_follow_a_copy_between_streams_in_a_context(make_context: Callable[..., Context]) -> None:
    context = make_context(kv_mixed="hot=16,group=4,sink=0", n_seq_max=2, n_ctx=512)
    context.decode(list(range(100, 130)))
    cache = MixedKVCache.from_context(context)
    cache.seq_cp(0, 1)
    assert positions(cache, 1) == positions(cache, 0)
    for tier in (cache.hot, cache.cold):
        k, v = tier.get_k(1), tier.get_v(1)
        assert k.data[0].any() and tier.cells(1) != []
        for cell in tier.cells(1):
            np.testing.assert_array_equal(k.data[0, cell.index], k.data[1, cell.index])
            np.testing.assert_array_equal(v.data[0, cell.index], v.data[1, cell.index])


def test_context_knows_of_gaps_that_its_cache_was_given(make_context: Callable[..., Context]) -> None:
    context = make_context(kv_mixed="hot=64")
    context.decode(list(range(100, 340)))
    cache = MixedKVCache.from_context(context)
    cache.seq_rm(0, 10, 110)
    context.decode(list(range(100, 200)))  # 240 tokens up to position 339
    assert context.memory.seq_pos_max() == 339


def test_context_knows_of_gaps_between_tokens_that_were_committed(make_context: Callable[..., Context]) -> None:
    context = make_context(kv_mixed="hot=64")
    cache = MixedKVCache.from_context(context)
    for pos in (0, 200):
        batch = Batch()
        batch.add(100, pos, 0)
        assert cache.find_slot(SBatch(batch).split_simple(1)) != ()
        cache.commit()
    context.decode(list(range(100, 200)))  # 102 tokens up to position 300
    assert context.memory.seq_pos_max() == 300


def test_positions_of_several_numbers_can_not_be_moved_by_hand(
    make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "has_multi_pos", property(lambda _: True))  # as with M-RoPE
    context = make_context(kv_mixed=True)
    context.decode([1, 2, 3])
    cache = MixedKVCache.from_context(context)
    assert not cache.can_shift and not context.memory.can_shift
    for call in (lambda: cache.seq_add(0, 0, -1, 1), lambda: cache.seq_div(0, 0, -1, 2)):
        with pytest.raises(CacheError, match="positions in this KV cache can not be moved"):
            call()
    assert (cache.seq_pos_min(), cache.seq_pos_max()) == (0, 2)


def test_layers_of_different_shape_are_refused(
    make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(kv_mixed="hot=64")
    stats = replace(context.stats, bytes_cold=2 * context.stats.bytes_cold)  # as if the second layer had more heads
    monkeypatch.setattr(MixedKVCache, "stats", property(lambda _: stats))
    with pytest.raises(CacheError, match="rows of different size"):
        MixedKVCache.from_context(context)


def test_cache_of_a_context_knows_of_a_taken_slot(make_context: Callable[..., Context]) -> None:
    context = make_context(kv_mixed="hot=32")
    cache = MixedKVCache.from_context(context)
    assert find(cache, [(0, 0)]) == (0,)
    context.decode([1])
    with pytest.raises(CacheError, match="the slot has been taken since find_slot"):
        cache.commit()
    assert cache.hot.used == 1


def test_cache_of_a_context_ends_with_it(tiny_model_path: Path, make_context: Callable[..., Context]) -> None:
    context = make_context(kv_mixed=True)
    context.decode([1, 2, 3])
    cache, other = MixedKVCache.from_context(context), MixedKVCache.from_context(context)
    other.close()
    with pytest.raises(CacheError, match="cache is closed"):
        _ = other.hot.used
    assert cache.hot.used == 3
    context.decode([4])  # it is still open
    context.close()
    for call in (lambda: cache.hot.used, cache.clear, lambda: cache.stats, lambda: cache.hot.get_k(0)):
        with pytest.raises(ContextError, match="context is closed"):
            call()
    cache.close()

    context = make_context(kv_mixed=True)
    with pytest.raises(ContextError, match="context is closed"):
        context.close()
        MixedKVCache.from_context(context)


def test_cache_keeps_its_context_open(tiny_model_path: Path) -> None:
    context = Context(Model(tiny_model_path), n_ctx=256, n_threads=1)
    context.decode([1, 2, 3])
    cache = MixedKVCache.from_context(context)
    del context
    gc.collect()
    assert cache.hot.used == 3 and cache.hot.get_k(0).ne == (64, 2, 3, 1)


def test_contexts_without_a_mixed_cache_are_refused(make_context: Callable[..., Context]) -> None:
    with pytest.raises(ParamsError, match="the context has no mixed KV cache"):
        MixedKVCache.from_context(make_context(kv_mixed=False))


@pytest.mark.parametrize("unified", [True, False])
def test_tokens_of_a_sequence_by_tier(make_context: Callable[..., Context], unified: bool) -> None:
    context = make_context(n_ctx=768, n_seq_max=3, kv_unified=unified, kv_mixed="hot=64,group=16")
    cache = MixedKVCache.from_context(context)
    for seq, n in ((0, 90), (2, 40)):
        context.decode([1] * n, seq_id=seq)
    if unified:
        context.memory.seq_cp(0, 1, 0, 50)  # cells of two sequences count for both

    expected = []
    for seq in range(3):
        cells = [tier.cells(0 if unified else seq) for tier in (cache.hot, cache.cold)]
        expected.append([sum(seq in cell.seq_ids for cell in tier) for tier in cells])
    assert [sum(counts) for counts in expected] == [90, 50 if unified else 0, 40]

    counts = ffi.new("uint32_t[2]")
    with context._handle as c_context:
        memory = lib.llama_get_memory(c_context)
        for seq in range(3):
            assert lib.llama_kv_mixed_get_seq_use(memory, seq, counts, counts + 1) == 0
            assert list(counts) == expected[seq]
        for seq in (-1, 3):
            assert lib.llama_kv_mixed_get_seq_use(memory, seq, counts, counts + 1) == -1
            assert ffi.string(lib.llama_kv_mixed_last_error()) == b"there is no such sequence"
