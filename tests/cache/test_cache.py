"""Caches that are driven by hand: what they show, what they refuse with nothing changed, and how they end."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.by_hand import SHAPE, add, find, positions, snapshot
from helpers.processes import environment, library_dir

from llamamix import (
    Batch,
    CacheError,
    Context,
    KVMixedParams,
    LlamamixError,
    MixedKVCache,
    Model,
    ParamsError,
    SBatch,
    UnifiedKVCache,
    ggml,
)


@pytest.fixture
def make() -> Iterator[Callable[..., MixedKVCache]]:
    """Makes caches of 8 hot and 16 cold cells for 3 sequences unless asked otherwise."""
    caches = []

    def make(**options: object) -> MixedKVCache:
        caches.append(MixedKVCache(**({"hot": 8, "cold": "q4_0", "cold_size": 16, "sink": 0, "n_seq_max": 3} | SHAPE | options)))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


#
# what a cache is made of
#


def test_sizes_and_types_are_those_asked_for() -> None:
    params = KVMixedParams(hot=12, cold_size=20, cold_k="q8_0", cold_v="iq4_nl", group=2, sink=1, threshold=0.5)
    with MixedKVCache(
        params, n_layer=3, n_head_kv=4, head_size_k=64, head_size_v=32, n_seq_max=5, n_pad=4, unified=False,
        type_k="bf16", type_v="f32",
    ) as cache:  # fmt: skip
        assert cache.params == params
        assert (cache.n_seq_max, cache.n_stream) == (5, 5)
        for tier, size, types, row_sizes in (
            (cache.hot, 12, ("bf16", "f32"), (512, 512)),
            (cache.cold, 20, ("q8_0", "iq4_nl"), (272, 72)),
        ):
            assert (tier.size, tier.n_stream, tier.n_layer, tier.n_head_kv, tier.n_pad) == (size, 5, 3, 4, 4)
            assert (tier.type_k, tier.type_v) == types
            assert (tier.head_size_k, tier.head_size_v, tier.row_size_k, tier.row_size_v) == (64, 32, *row_sizes)
        stats = cache.stats
        assert (stats.hot_size, stats.cold_size, stats.n_stream, stats.n_layer) == (60, 100, 5, 3)
        assert stats.bytes_hot == 3 * 60 * 1024 and stats.bytes_cold == 3 * 100 * 344 + 3 * 5 * 512  # and the mean of a page
        assert "12 cells" in repr(cache) and "bf16" in repr(cache)


def test_n_ctx_sizes_cold() -> None:
    with MixedKVCache(n_ctx=100, hot=16, sink=0) as cache:
        assert (cache.hot.size, cache.cold.size) == (16, 84)
    with MixedKVCache(n_ctx=10, hot=16, sink=0) as cache:  # more hot cells than tokens are of no use
        assert (cache.hot.size, cache.cold.size) == (10, 0)
    with MixedKVCache(n_ctx=100, hot=16, sink=0, n_pad=16) as cache:
        assert (cache.hot.size, cache.cold.size) == (16, 96)
    with MixedKVCache(n_ctx=100, hot=12, sink=0, n_pad=12) as cache:
        assert (cache.hot.size, cache.cold.size) == (12, 96)


@pytest.mark.parametrize("kv_type", ["f16", "q4_0"])
def test_shape_of_a_model(tiny_model_path: Path, make_context: Callable[..., Context], kv_type: str) -> None:
    with Model(tiny_model_path) as model:
        cache = MixedKVCache.from_model(model, hot=32, cold=kv_type, n_ctx=256)
        plain = UnifiedKVCache.from_model(model, 64, type_v=kv_type)
    of_context = MixedKVCache.from_context(make_context(kv_mixed=f"hot=32,cold={kv_type}"))
    for tier, other in ((cache.hot, of_context.hot), (cache.cold, of_context.cold)):
        for name in ("n_layer", "n_head_kv", "head_size_k", "head_size_v", "row_size_k", "row_size_v", "size"):
            assert getattr(tier, name) == getattr(other, name)
    assert cache.params == of_context.params
    assert (plain.tier.size, plain.tier.row_size_v) == (64, of_context.cold.row_size_v)
    with cache, plain:
        add(cache, 40)
        assert positions(cache)[1] != []


@pytest.mark.parametrize(
    ("name", "value"), [("is_recurrent", True), ("n_head_kv", 3), ("n_head_kv", 0), ("n_layer", 0)]
)
def test_models_without_such_a_cache_are_refused(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    with Model(tiny_model_path) as model:
        monkeypatch.delitem(model.metadata, "llama.attention.head_count_kv")  # as if it were a list
        monkeypatch.setattr(Model, name, property(lambda _: value))
        with pytest.raises(ParamsError, match=r"The layers of this model \(llama\)"):
            UnifiedKVCache.from_model(model, 64)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"hot": 10, "n_pad": 4}, "hot=10 is not a multiple of n_pad=4"),
        ({"cold_size": 18, "n_pad": 4}, "cold_size=18 is not a multiple of n_pad=4"),
        ({"cold_size": 0}, "n_ctx or cold_size"),
        ({"n_ctx": 25}, "hot=8 and cold_size=16 hold fewer tokens than the context of 25"),
        ({"hot": 0}, "hot"),
        ({"group": 0}, "group"),
        ({"sink": 8}, "sink"),
        ({"threshold": 0}, "threshold"),
        ({"threshold": 1.5}, "threshold"),
        ({"cold": "q2_k"}, "cold"),
        ({"cold_k": "f64"}, "cold_k"),
        ({"head_size_k": 48}, "cold_k=q4_0 stores blocks of 32 values, and the head size 48"),
        ({"head_size_v": 16}, "cold_v=q4_0 stores blocks of 32 values, and the head size 16"),
        ({"head_size_k": 0}, "head_size_k"),
        ({"head_size_v": 0}, "head_size_v"),
        ({"head_size_k": 2**17}, "head_size_k"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_layer": 513}, "n_layer"),
        ({"n_head_kv": 0}, "n_head_kv"),
        ({"n_head_kv": 1.5}, "n_head_kv"),
        ({"n_ctx": -1}, "n_ctx"),
        ({"n_seq_max": 0}, "n_seq_max"),
        ({"n_seq_max": 257}, "n_seq_max"),
        ({"n_pad": 0}, "n_pad"),
        ({"unified": 1}, "unified"),
        ({"type_k": "q4_0"}, "the hot type must be f16, bf16 or f32, not q4_0"),
        ({"type_v": "f64"}, "type_v must be one of f32, f16"),
        ({"type_k": 1}, "type_k must be one of f32, f16"),
        ({"hots": 8}, "hots is not an option"),
        ({"params": KVMixedParams()}, "params and hot, cold, cold_size, sink can not be given together"),
    ],
)
def test_what_can_not_be_made_is_refused(make: Callable[..., MixedKVCache], options: dict, named: str) -> None:
    with pytest.raises(ParamsError, match=named):
        make(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kv_size": 0}, "kv_size"),
        ({"kv_size": 62, "n_pad": 4}, r"kv_size must be a multiple of n_pad \(4\)"),
        ({"type_k": "q4_0", "head_size_k": 8}, "n_embd_head_k is not a multiple of type_k's block"),
        ({"type_v": "q8_0", "head_size_k": 8}, "n_embd_head_v is not a multiple of type_v's block"),
        ({"n_seq_max": 0}, "n_seq_max"),
    ],
)
def test_plain_caches_that_can_not_be_made_are_refused(options: dict, named: str) -> None:
    with pytest.raises(ParamsError, match=named):
        UnifiedKVCache(**({"kv_size": 64} | options))


#
# tokens
#


def test_find_slot_alone_adds_nothing(make: Callable[..., MixedKVCache]) -> None:
    cache = make()
    add(cache, 5)
    before = snapshot(cache)
    cells = find(cache, [(5, 0), (6, 0)])
    assert len(set(cells)) == 2 and not set(cells) & {c.index for c in cache.hot.cells()}
    assert snapshot(cache) == before and cache.seq_pos_max() == 4
    cache.rollback()
    assert snapshot(cache) == before


def test_commit_and_rollback_need_a_slot(make: Callable[..., MixedKVCache]) -> None:
    cache = make()
    add(cache, 2)
    before = snapshot(cache)
    for call, named in ((cache.commit, "commit without find_slot"), (cache.rollback, "rollback without find_slot")):
        with pytest.raises(CacheError, match=named):
            call()
        find(cache, [(2, 0)])
        cache.rollback()
        with pytest.raises(CacheError, match=named):
            call()
    assert snapshot(cache) == before


def test_a_full_cache_refuses_with_nothing_changed(make: Callable[..., MixedKVCache]) -> None:
    cache = make()
    add(cache, 24)
    before, stats = snapshot(cache), cache.stats
    assert find(cache, [(24, 0)]) == ()
    assert find(cache, [(0, 1), (1, 1)]) == ()
    assert snapshot(cache) == before and cache.stats.n_refused == stats.n_refused + 2
    cache.seq_rm(0, 0, 1)  # the first is cold
    assert len(find(cache, [(24, 0)])) == 1
    cache.commit()
    assert cache.seq_pos_max() == 24


def test_too_many_tokens_for_hot_are_refused(make: Callable[..., MixedKVCache]) -> None:
    cache = make()
    add(cache, 2)
    before = snapshot(cache)
    assert find(cache, [(2 + i, 0) for i in range(9)]) == ()
    assert snapshot(cache) == before
    assert len(find(cache, [(2 + i, 0) for i in range(8)])) == 8


def test_streams_are_filled_apart(make: Callable[..., MixedKVCache]) -> None:
    cache = make(unified=False)
    add(cache, 20, seq=1)
    add(cache, 2, seq=2)
    assert type(cache.hot.used) is int and cache.hot.used == 8
    assert positions(cache, 0) == ([], [])
    assert positions(cache, 1) == (list(range(14, 20)), list(range(14)))
    assert positions(cache, 2) == ([0, 1], [])
    assert find(cache, [(0, 0), (20, 1), (2, 2)]) != ()
    cache.commit()
    assert [cache.seq_pos_max(seq) for seq in range(3)] == [0, 20, 2]
    assert (cache.hot.n(0), cache.hot.n(2), cache.cold.n(0), cache.cold.n(1)) == (1, 3, 0, 16)


def test_ubatches_that_do_not_fit_the_streams_are_refused(make: Callable[..., MixedKVCache]) -> None:
    cache = make(unified=False)
    before = snapshot(cache)
    batch = Batch()
    batch.add(1, 0, [0, 1])
    for split in ("split_simple", "split_seq"):
        with SBatch(batch) as sbatch, pytest.raises(ParamsError, match=r"sequences \(0, 1\) share a token"):
            cache.find_slot(getattr(sbatch, split)(1))
    batch.clear()
    batch.add(1, 0, 0)
    with SBatch(batch) as sbatch, pytest.raises(ParamsError, match="equal split"):
        cache.find_slot(sbatch.split_simple(1))
    batch.clear()
    batch.add(1, 0, 3)
    with SBatch(batch) as sbatch, pytest.raises(ParamsError, match="from 0 to 2, not 3"):
        cache.find_slot(sbatch.split_equal(1))
    assert snapshot(cache) == before


def test_tokens_are_moved_by_hand(make: Callable[..., MixedKVCache]) -> None:
    cache = make(sink=2, n_seq_max=1, threshold=1.0)
    add(cache, 8)
    assert cache.move_tokens_to_cold_cache(0) == 0
    assert cache.move_tokens_to_cold_cache(3) == 3
    assert positions(cache) == ([0, 1, 5, 6, 7], [2, 3, 4])
    assert cache.move_tokens_to_cold_cache(100) == 3  # the sinks stay
    assert positions(cache) == ([0, 1], [2, 3, 4, 5, 6, 7])
    assert cache.move_tokens_to_cold_cache(1) == 0
    for arguments, named in (((-1,), "n must be"), ((1, 1), "stream must be"), ((1.0,), "n must be")):
        with pytest.raises(ParamsError, match=named):
            cache.move_tokens_to_cold_cache(*arguments)


def test_only_as_many_as_cold_has_room_for_are_moved(make: Callable[..., MixedKVCache]) -> None:
    cache = make(cold_size=3, threshold=1.0)
    add(cache, 8)
    assert cache.move_tokens_to_cold_cache(8) == 3
    assert positions(cache) == ([3, 4, 5, 6, 7], [0, 1, 2])


#
# rows
#


@pytest.mark.parametrize("unified", [True, False])
def test_rows_have_ggmls_dimensions_reversed(make: Callable[..., MixedKVCache], unified: bool) -> None:
    cache = make(n_pad=4, n_head_kv=3, head_size_v=64, unified=unified, threshold=1.0)
    add(cache, 5, seq=0)
    add(cache, 2, seq=1)
    cache.move_tokens_to_cold_cache(3, 0)
    n_stream = 1 if unified else 3
    k, v = cache.hot.get_k(1), cache.hot.get_v(1)
    assert (k.ne, v.ne) == ((32, 3, 8, n_stream), (64, 3, 8, n_stream))
    assert (k.data.shape, v.data.shape) == ((n_stream, 8, 3, 32), (n_stream, 8, 3, 64))
    k, v = cache.cold.get_k(1), cache.cold.get_v(1)
    assert (k.type, k.ne, v.ne) == ("q4_0", (32, 3, 4, n_stream), (64, 3, 4, n_stream))
    assert (k.data.shape, v.data.shape) == ((n_stream, 4, 3, 18), (n_stream, 4, 3, 36))
    assert k.dequantize().shape == (n_stream, 4, 3, 32)
    if not unified:
        assert cache.hot.get_k(0, 1).ne == (32, 3, 4, 1)
        np.testing.assert_array_equal(cache.hot.get_k(0, 1).data[0], cache.hot.get_k(0).data[1, :4])
        assert cache.cold.get_k(0, 1).ne == (32, 3, 0, 1)
        (cell, _) = cache.hot.cells(1)
        assert (cache.hot.get_k(0, 1).data[0, cell.index] == 16).all()  # add() writes that for sequence 1, position 0


def test_rows_are_where_their_cell_is(make: Callable[..., MixedKVCache]) -> None:
    cache = make()
    add(cache, 10)
    for tier in (cache.hot, cache.cold):
        for layer in range(2):
            k, v = tier.get_k(layer).dequantize()[0], tier.get_v(layer).dequantize()[0]
            if tier is cache.cold:
                k += tier.get_means(layer)[0, 0].astype(np.float32)
            for cell in tier.cells():
                assert (k[cell.index] == cell.pos).all() and (v[cell.index] == cell.pos).all()  # exact even in Q4_0


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0", "q4_0", "iq4_nl"])
def test_rows_are_written_in_the_tiers_type(kv_type: str) -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3, 2, 32)).astype(np.float32)
    with UnifiedKVCache(8, n_layer=2, n_head_kv=2, head_size_k=32, type_k=kv_type) as cache:
        assert find(cache, [(i, 0) for i in range(8)])
        cache.commit()
        cache.tier.set_k(1, 4, x)
        expected = ggml.quantize(x, kv_type)
        k = cache.tier.get_k(1)
        np.testing.assert_array_equal(k.data[0, 4:7], expected.data)
        np.testing.assert_array_equal(k.dequantize()[0, 4:7], expected.dequantize())
        assert not k.data[0, :4].any() and not k.data[0, 7:].any()
        assert not cache.tier.get_k(0).data.any() and not cache.tier.get_v(1).data.any()

        cache.tier.set_k(0, 0, ggml.cpy(expected, kv_type))
        cache.tier.set_k(0, 3, x[0])  # one row
        np.testing.assert_array_equal(cache.tier.get_k(0).data[0, :4], expected.data[[0, 1, 2, 0]])


def test_rows_that_do_not_fit_are_refused(make: Callable[..., MixedKVCache]) -> None:
    cache = make()
    add(cache, 8)
    before = snapshot(cache)
    row = np.zeros((1, 2, 32))
    for named, call in {
        "rows must be of shape": lambda: cache.hot.set_k(0, 0, np.zeros((1, 2, 31))),
        r"rows must be of shape \[n, 2, 32\], not \[0, 2, 32\]": lambda: cache.hot.set_k(0, 0, np.zeros((0, 2, 32))),
        "rows must end within the 8 cells": lambda: cache.hot.set_k(0, 7, np.zeros((2, 2, 32))),
        r"rows must be f16 \[32, 2, n\], not f32": lambda: cache.hot.set_k(0, 0, ggml.quantize(row, "f32")),
        "rows must be f16": lambda: cache.hot.set_k(0, 0, ggml.quantize(np.zeros((1, 1, 2, 32)), "f16")),
        "finite": lambda: cache.cold.set_k(0, 0, np.full((1, 2, 32), np.nan)),
        "cell must be from 0 to 7": lambda: cache.hot.set_k(0, 8, row),
        "layer must be": lambda: cache.hot.set_v(-1, 0, row),
        "no such layer": lambda: cache.hot.set_v(2, 0, row),
        "stream must be from 0 to 0": lambda: cache.hot.set_v(0, 0, row, stream=1),
        "must hold numbers": lambda: cache.hot.set_k(0, 0, np.full((1, 2, 32), "a")),
        "there is no such layer": lambda: cache.hot.get_k(2),
        "stream must be": lambda: cache.hot.get_v(0, 1),
        "stream must be from": lambda: cache.hot.cells(-1),
    }.items():
        with pytest.raises(ParamsError, match=named):
            call()
    assert snapshot(cache) == before


#
# sequences
#


def test_sequences_in_one_stream_share_cells(make: Callable[..., MixedKVCache]) -> None:
    cache = make(n_seq_max=70)
    add(cache, 10)
    cache.seq_cp(0, 65)
    assert cache.hot.used + cache.cold.used == 10
    assert {c.seq_ids for c in cache.hot.cells() + cache.cold.cells()} == {(0, 65)}
    cache.seq_rm(0, 2, 8)
    assert positions(cache, 0) == ([8, 9], [0, 1]) and positions(cache, 65) == ([4, 5, 6, 7, 8, 9], [0, 1, 2, 3])
    cache.seq_rm(-1, 9, -1)
    assert (cache.seq_pos_max(0), cache.seq_pos_max(65)) == (8, 8)


def test_a_sequence_is_copied_to_another_stream_with_its_rows(make: Callable[..., MixedKVCache]) -> None:
    cache = make(unified=False)
    add(cache, 10, seq=2)
    add(cache, 3, seq=1)
    cache.seq_cp(2, 0)
    assert positions(cache, 0) == positions(cache, 2) == ([4, 5, 6, 7, 8, 9], [0, 1, 2, 3])
    for tier in (cache.hot, cache.cold):
        for layer in range(2):
            np.testing.assert_array_equal(tier.get_k(layer, 0).data, tier.get_k(layer, 2).data)
            np.testing.assert_array_equal(tier.get_v(layer, 0).data, tier.get_v(layer, 2).data)
    add(cache, 4, seq=0)  # and they are two now
    assert (cache.seq_pos_max(0), cache.seq_pos_max(1), cache.seq_pos_max(2)) == (13, 2, 9)
    cache.seq_keep(1)
    assert [cache.seq_pos_max(seq) for seq in range(3)] == [-1, 2, -1]


def test_a_shift_is_shown_until_it_is_applied(make: Callable[..., MixedKVCache]) -> None:
    cache = make()
    add(cache, 10)
    cache.seq_add(0, 3, 6, 20)
    cache.seq_div(0, 25, 26, 5)  # libllama counts a division forwards
    shifts = {c.pos: c.shift for c in cache.hot.cells() + cache.cold.cells()}
    assert shifts == {0: 0, 1: 0, 2: 0, 23: 20, 24: 20, 5: 20 + 20, 6: 0, 7: 0, 8: 0, 9: 0}
    cache.move_tokens_to_cold_cache(8)  # it moves along
    assert {c.pos: c.shift for c in cache.cold.cells()} == shifts


def test_sequence_arguments_are_refused(make: Callable[..., MixedKVCache]) -> None:
    unified, streams = make(), make(unified=False)
    for cache in (unified, streams):
        add(cache, 12, seq=0)
        add(cache, 3, seq=1)
    before = [snapshot(cache) for cache in (unified, streams)]
    for named, call in {
        "seq_id must be from -1 to 2": lambda: unified.seq_rm(3),
        "seq_id must be": lambda: unified.seq_rm(1.5),
        "p0 must be": lambda: unified.seq_rm(0, -2),
        "p1 must be": lambda: unified.seq_rm(0, 0, 2**31),
        "seq_id_src must be from 0": lambda: unified.seq_cp(-1, 0),
        "seq_id_dst must be from 0": lambda: unified.seq_cp(0, 3),
        "seq_id_dst 1 has positions in that range": lambda: unified.seq_cp(0, 1, 2, 5),
        "seq_id must be from 0": lambda: unified.seq_keep(-1),
        "seq_id must be from 0 to 2": lambda: unified.seq_add(7, 0, -1, 1),
        "delta must be": lambda: unified.seq_add(0, 0, -1, 1.0),
        "delta moves positions of sequence 0 beyond": lambda: unified.seq_add(0, 0, -1, 2**31 - 12),
        "d must be from 1": lambda: unified.seq_div(0, 0, -1, 0),
        "seq_id must be from 0 to 2,": lambda: unified.seq_pos_min(42),
        "seq_id must be from 0 to 2, not 3": lambda: unified.seq_pos_max(3),
        "p0 and p1 must be all": lambda: streams.seq_cp(0, 2, 1, -1),
        "p0 and p1 must be all of": lambda: streams.seq_cp(0, 2, 0, 11),
        "seq_id_dst 1 must be empty": lambda: streams.seq_cp(0, 1),
    }.items():
        with pytest.raises(ParamsError, match=named):
            call()
    assert [snapshot(cache) for cache in (unified, streams)] == before


#
# state
#


@pytest.mark.parametrize("unified", [True, False])
def test_state_is_read_back(make: Callable[..., MixedKVCache], unified: bool) -> None:
    cache, other = make(unified=unified), make(unified=unified)
    add(cache, 9, seq=0)
    add(cache, 6, seq=2)
    add(other, 20, seq=1)  # makes way
    state = cache.state_save()
    other.state_load(state)
    assert other.state_save() == state
    for seq in range(3):
        assert positions(other, seq) == positions(cache, seq)

    other.state_load(bytearray(cache.state_save(2)), 1)  # of one sequence, under another name
    assert positions(other, 1) == positions(other, 2) == positions(cache, 2)
    for tier in (cache.hot, other.hot):
        for cell in tier.cells(0 if unified else 2):
            if 2 in cell.seq_ids:
                assert (tier.get_k(0, 0 if unified else 2).data[0, cell.index] == 32 + cell.pos).all()


@pytest.mark.parametrize("unified", [True, False])
def test_state_keeps_shifts(make: Callable[..., MixedKVCache], unified: bool) -> None:
    cache = make(unified=unified)
    add(cache, 12)
    cache.seq_add(0, 2, 10, 20)
    cache.seq_div(0, 20, 24, 2)  # libllama counts a division forwards
    cache.seq_add(0, 10, 11, -5)
    shifts = [sorted((c.pos, c.shift) for c in tier.cells()) for tier in (cache.hot, cache.cold)]
    assert shifts == [
        [(5, -5), (11, 0), (26, 20), (27, 20), (28, 20), (29, 20)],
        [(0, 0), (1, 0), (11, 20 + 11), (11, 20 + 12), (24, 20), (25, 20)],
    ]
    for seq_id, other_id in ((None, 0), (0, 0), (0, 2)):
        other = make(unified=unified)
        other.state_load(cache.state_save(seq_id), seq_id if seq_id is None else other_id)
        stream = 0 if unified else other_id
        found = [sorted((c.pos, c.shift) for c in tier.cells(stream)) for tier in (other.hot, other.cold)]
        assert found == shifts
        add(other, 1, other_id)  # and it goes on


def test_state_goes_to_a_cache_of_another_size(make: Callable[..., MixedKVCache]) -> None:
    cache = make()
    add(cache, 20)
    state = cache.state_save()
    larger = make(hot=16, cold_size=32)
    larger.state_load(state)
    assert positions(larger) == positions(cache) and larger.state_save() == state

    smaller = make(hot=4)
    add(smaller, 3)
    before = snapshot(smaller)
    with pytest.raises(CacheError, match=f"the state holds {cache.hot.used} hot tokens, hot=4 has no room"):
        smaller.state_load(state)
    assert snapshot(smaller) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cold": "q8_0"}, "cold K rows of type q4_0 and 36 bytes in layer 0, this cache has q8_0 and 68 bytes"),
        ({"cold_v": "q8_0"}, "cold V rows of type q4_0 and 36 bytes in layer 0, this cache has q8_0 and 68 bytes"),
        ({"type_k": "f32"}, "hot K rows of type f16 and 128 bytes in layer 0, this cache has f32 and 256 bytes"),
        ({"n_layer": 3}, "2 layers, this cache has 3"),
        ({"n_layer": 1}, "2 layers, this cache has 1"),
        ({"head_size_k": 64}, "hot K rows of type f16 and 128 bytes in layer 0, this cache has f16 and 256 bytes"),
        ({"n_head_kv": 4}, "hot K rows of type f16 and 128 bytes in layer 0, this cache has f16 and 256 bytes"),
        ({"unified": False}, "1 streams, this cache has 3"),
        ({"cold_size": 8}, "holds 14 cold tokens, cold_size=8 has no room for them"),
    ],
)
def test_state_of_another_shape_is_refused(make: Callable[..., MixedKVCache], options: dict, named: str) -> None:
    cache, other = make(), make(**options)
    add(cache, 20)
    add(other, 3)
    before = snapshot(other)
    with pytest.raises(CacheError, match=rf"The state can not be loaded: .*{named}"):
        other.state_load(cache.state_save())
    assert snapshot(other) == before
    add(other, 3)


def test_what_is_no_state_is_refused(make: Callable[..., MixedKVCache]) -> None:
    cache = make()
    add(cache, 3)
    before = snapshot(cache)
    with UnifiedKVCache(8, n_seq_max=3, **SHAPE) as plain:
        add(plain, 3)
        for state, named in ((plain.state_save(), "not the state of a mixed KV cache"), (b"", "ends too early")):
            with pytest.raises(CacheError, match=named):
                cache.state_load(state)
    for state in ("text", 3, None):
        with pytest.raises(ParamsError, match="state must be bytes"):
            cache.state_load(state)
    for call in (cache.state_save, lambda seq_id: cache.state_load(b"", seq_id)):
        with pytest.raises(ParamsError, match="seq_id must be from 0 to 2"):
            call(3)
    assert snapshot(cache) == before


def test_a_state_cut_short_leaves_nothing(make: Callable[..., MixedKVCache]) -> None:
    cache, other = make(), make()
    add(cache, 12)
    for state, seq_id in ((cache.state_save(), None), (cache.state_save(0), 1)):
        for length in range(12, len(state), 37):
            with pytest.raises(CacheError, match="The state can not be loaded"):
                other.state_load(state[:length], seq_id)
            assert other.hot.used == other.cold.used == 0
        other.state_load(state, seq_id)
        assert other.hot.used + other.cold.used == 12
        other.clear()


def test_the_error_of_a_state_may_be_kept() -> None:
    """An exception in a cycle, as frameworks make them, is freed by the garbage collector with all that it holds."""
    program = """
import gc
from llamamix import CacheError, MixedKVCache
for _ in range(20):
    cache = MixedKVCache(hot=8, cold_size=8, sink=0)
    try:
        cache.state_load(memoryview(b"none"))
    except CacheError as error:
        error.itself = error
    del cache
    gc.collect()
"""
    env = environment(LLAMAMIX_LIB_PATH=str(library_dir()))
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")


def test_old_names_of_states_are_deprecated(make: Callable[..., MixedKVCache]) -> None:
    cache, other = make(), make()
    add(cache, 12)
    with pytest.warns(DeprecationWarning, match="state_write\\(\\) is called state_save\\(\\) now") as caught:
        state = cache.state_write(0)
    assert caught[0].filename == __file__ and state == cache.state_save(0)
    with pytest.warns(DeprecationWarning, match="state_read\\(\\) is called state_load\\(\\) now") as caught:
        other.state_read(state, 1)
    assert caught[0].filename == __file__ and positions(other, 1) == positions(cache, 0)


def test_plain_cache_keeps_its_state() -> None:
    with UnifiedKVCache(16, n_seq_max=2, **SHAPE) as cache, UnifiedKVCache(16, n_seq_max=2, **SHAPE) as other:
        add(cache, 10)
        cache.seq_cp(0, 1, 5, -1)
        other.state_load(cache.state_save())
        assert other.tier.cells() == cache.tier.cells()
        np.testing.assert_array_equal(other.tier.get_v(1).data, cache.tier.get_v(1).data)
        assert find(other, [(10 + i, 0) for i in range(7)]) == () and len(find(other, [(10, 0)])) == 1
        with pytest.raises(CacheError, match="commit without find_slot"):
            cache.commit()


#
# lifetime
#


def test_a_closed_cache_can_not_be_used(make: Callable[..., MixedKVCache]) -> None:
    cache = make()
    add(cache, 3)
    cache.close()
    cache.close()
    assert repr(cache).endswith("(closed)>")
    batch = Batch()
    batch.add(1, 3, 0)
    row = np.zeros((1, 2, 32))
    for call in (
        cache.commit,
        cache.rollback,
        cache.clear,
        cache.seq_rm,
        cache.seq_pos_min,
        cache.seq_pos_max,
        cache.state_save,
        cache.hot.n,
        cache.hot.cells,
        lambda: cache.find_slot(SBatch(batch).split_simple(1)),
        lambda: SBatch(batch, memory=cache),
        lambda: cache.seq_cp(0, 1),
        lambda: cache.seq_keep(0),
        lambda: cache.seq_add(0, 0, -1, 1),
        lambda: cache.seq_div(0, 0, -1, 2),
        lambda: cache.state_load(b""),
        lambda: cache.move_tokens_to_cold_cache(1),
        lambda: cache.params,
        lambda: cache.stats,
        lambda: cache.cold.used,
        lambda: cache.hot.get_k(0),
        lambda: cache.hot.set_v(0, 0, row),
    ):
        with pytest.raises(CacheError, match="The cache is closed"):
            call()
    assert cache.hot.size == 8  # what is known is known


def test_a_tier_keeps_its_cache_open() -> None:
    hot = MixedKVCache(hot=8, cold_size=8, sink=0).hot
    gc.collect()
    assert hot.used == 0


def test_threads_take_turns(make: Callable[..., MixedKVCache]) -> None:
    cache = make(hot=64, cold_size=448, n_seq_max=4, unified=False)
    failed: list[BaseException] = []

    def work(seq: int) -> None:
        try:
            for i in range(40):
                if seq < 2:
                    cache.seq_add(seq, 0, -1, 1)
                    cache.seq_add(seq, 0, -1, -1)
                    assert cache.seq_pos_max(seq) == 99
                else:
                    assert len(cache.state_save()) > 0
                    assert cache.hot.get_k(i % 2).ne[3] == 4
        except BaseException as error:
            failed.append(error)

    for seq in range(2):
        add(cache, 100, seq)
    threads = [threading.Thread(target=work, args=(seq,)) for seq in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the resident size is read from /proc")
@pytest.mark.skipif("LLAMAMIX_TEST_SANITIZER" in os.environ, reason="sanitizers keep what is freed")
def test_a_thousand_caches_take_the_memory_of_one() -> None:
    def use() -> None:
        cache = MixedKVCache(hot=64, cold_size=448, sink=0, n_seq_max=4, **SHAPE)
        add(cache, 2)
        cache.move_tokens_to_cold_cache(2)
        cache.state_load(cache.state_save())
        with pytest.raises(LlamamixError):
            cache.commit()

    for _ in range(50):
        use()
    gc.collect()
    before = _resident()
    for _ in range(1000):
        use()  # dropped, not closed
    gc.collect()
    grown = _resident() - before
    assert grown < 2 << 20, grown  # the rows of one cache alone are 96 KiB
