"""The ten tests of the cache that this project began with, six of the cache and four of copies, by their names then.

They assert what was only hoped for at the time: that rows move, when, how many, and what becomes of their bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import gguf
import numpy as np
import pytest

from llamamix import Batch, CacheError, KVMixedParams, MixedKVCache, ParamsError, SBatch, UnifiedKVCache, ggml

N_LAYER, N_HEAD_KV, HEAD = 2, 2, 64


def make(hot: int, cold: int, group: int, n_pad: int, n_seq_max: int = 1, **options: object) -> MixedKVCache:
    shape = {"n_layer": N_LAYER, "n_head_kv": N_HEAD_KV, "head_size_k": HEAD}
    return MixedKVCache(
        hot=hot, cold_size=cold, group=group, n_pad=n_pad, n_seq_max=n_seq_max, **({"sink": 0} | shape | options)
    )


def rows(pos: int, layer: int, v: bool, n_head_kv: int = N_HEAD_KV, head: int = HEAD) -> np.ndarray:
    """Recognisable K or V rows of a token, float16 [n_head_kv, head]."""
    x = np.sin(0.1 * np.arange(n_head_kv * head) + pos) * (1 + pos) + 10 * layer + 100 * v
    return x.reshape(n_head_kv, head).astype(np.float16)


def q4_0(x: np.ndarray) -> np.ndarray:
    """The bytes that another implementation than ggml's gives."""
    return gguf.quants.quantize(x.astype(np.float32), gguf.GGMLQuantizationType.Q4_0)


def find(cache: MixedKVCache | UnifiedKVCache, pos: range, seq: int) -> tuple[int, ...]:
    batch = Batch()
    for p in pos:
        batch.add(1000 + p, p, seq)
    with SBatch(batch, memory=cache) as sbatch:
        return cache.find_slot(sbatch.split_simple(len(pos)))


def commit(cache: MixedKVCache, pos: range, seq: int = 0) -> bool:
    """Add tokens and write their rows; False when they do not fit."""
    cells = find(cache, pos, seq)
    if not cells:
        return False
    cache.commit()
    for cell, p in zip(cells, pos, strict=True):
        for layer in range(N_LAYER):
            cache.hot.set_k(layer, cell, rows(p, layer, False))
            cache.hot.set_v(layer, cell, rows(p, layer, True))
    return True


def positions(cache: MixedKVCache, seq: int = 0) -> tuple[list[int], list[int]]:
    """Hot and cold."""
    hot, cold = (sorted(c.pos for c in tier.cells() if seq in c.seq_ids) for tier in (cache.hot, cache.cold))
    return hot, cold


def check_rows(cache: MixedKVCache, original: Callable[[int], int] = lambda pos: pos) -> None:
    """Every row is what was written for the position that its token had originally: as it was in hot, Q4_0 in cold."""
    for layer in range(N_LAYER):
        for v, (hot, cold) in enumerate(
            ((cache.hot.get_k(layer), cache.cold.get_k(layer)), (cache.hot.get_v(layer), cache.cold.get_v(layer)))
        ):
            for cell in cache.hot.cells():
                np.testing.assert_array_equal(hot.data[0, cell.index], rows(original(cell.pos), layer, bool(v)))
            for cell in cache.cold.cells():
                np.testing.assert_array_equal(cold.data[0, cell.index], q4_0(rows(original(cell.pos), layer, bool(v))))


def migration_lines(n: int) -> list[str]:
    return [
        "[MIXED_CACHE_DEBUG] trigger_quantization: starting quantization process",
        "[MIXED_CACHE_DEBUG] trigger_quantization: moving tokens to cold cache",
        f"[MIXED_CACHE] Moving {n} tokens to cold cache (Q4_0 quantization)",
        *(f"[MIXED_CACHE] Quantizing token {i}: FP16 -> Q4_0" for i in range(n)),
        f"[MIXED_CACHE] Quantization batch completed: {n} tokens processed",
        "[MIXED_CACHE_DEBUG] trigger_quantization: quantization completed",
    ]


EXCEEDED = "[MIXED_CACHE_DEBUG] should_quantize: hot cache threshold exceeded"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Caches that are made from now on log what they do; gives the lines since it was last called."""
    monkeypatch.setenv("LLAMA_KV_MIXED_TRACE", "1")
    caplog.set_level(logging.INFO, "llamamix")

    def lines() -> list[str]:
        res = [r.getMessage() for r in caplog.records]
        caplog.clear()
        return [line for line in res if line.startswith(("[MIXED_CACHE", "llama_kv_cache_mixed: "))]

    return lines


#
# the cache
#


def test_documented_constructor(log: Callable[[], list[str]]) -> None:
    with make(32, 128, 8, 8, n_seq_max=10) as cache:
        assert (cache.hot.size, cache.cold.size) == (32, 128)
        assert (cache.hot.type_k, cache.hot.type_v) == ("f16", "f16")
        assert (cache.cold.type_k, cache.cold.type_v) == ("q4_0", "q4_0")
        assert (cache.hot.used, cache.cold.used) == (0, 0)
        assert (cache.n_seq_max, cache.n_stream) == (10, 1)
        for tier in (cache.hot, cache.cold):
            assert (tier.n_layer, tier.n_head_kv) == (N_LAYER, N_HEAD_KV)
            assert tier.head_size_k == tier.head_size_v == HEAD
        assert (cache.hot.row_size_k, cache.cold.row_size_k) == (256, 72)
        assert log() == [
            "llama_kv_cache_mixed: creating hot KV cache (FP16), size = 32 cells",
            "llama_kv_cache_mixed: creating cold KV cache (quantized), size = 128 cells",
            "[MIXED_CACHE_DEBUG] initialized: hot=0/32 (0.0%), cold=0/128 (0.0%)",
        ]


def test_documented_basic_ops() -> None:
    with make(16, 64, 4, 8, n_seq_max=5) as cache:
        assert cache.params == KVMixedParams(hot=16, cold_size=64, group=4, sink=0, cold="q4_0", threshold=0.8)
        assert commit(cache, range(12))
        assert commit(cache, range(12, 17))
        assert cache.hot.used + cache.cold.used == 17 and cache.cold.used > 0
        assert cache.hot.n() > 0 and cache.hot.n() % 8 == 0
        cache.clear()
        assert (cache.hot.used, cache.cold.used, cache.hot.n(), cache.cold.n()) == (0, 0, 0, 0)
        assert cache.hot.cells() == cache.cold.cells() == []
        assert cache.seq_pos_min() == cache.seq_pos_max() == -1
        assert commit(cache, range(3)) and cache.hot.used == 3  # and it works as before


def test_documented_quantization_trigger(log: Callable[[], list[str]]) -> None:
    for (hot, cold, group, n_pad), n_commits, n_moved, fires_at in (
        ((10, 40, 4, 2), 15, 2, [9, 11, 13, 15]),  # 25 % of hot is less than the group
        ((16, 64, 4, 8), 20, 4, [13, 17]),  # exactly the lines of the document: 4 tokens at a time
        ((32, 128, 3, 8), 30, 3, [26, 29]),  # the group is less than 25 % of hot
    ):
        with make(hot, cold, group, n_pad, n_seq_max=3) as cache:
            log()
            for i in range(1, n_commits + 1):
                before = positions(cache)
                assert commit(cache, range(i - 1, i))
                fired = (len(before[0]) + 1) / hot > 0.8
                assert fired == (i in fires_at), i
                moved = (before[0] + [i - 1])[: n_moved if fired else 0]
                assert positions(cache) == ((before[0] + [i - 1])[len(moved) :], before[1] + moved)
                assert log() == ([EXCEEDED, *migration_lines(n_moved)] if fired else [])
                check_rows(cache)
            assert cache.stats.n_migrations == len(fires_at)
            assert cache.stats.n_tokens_moved == cache.cold.used == n_moved * len(fires_at)


def test_documented_find_slot_trigger(log: Callable[[], list[str]]) -> None:
    with make(8, 32, 3, 4, n_seq_max=2) as cache:
        log()
        for _ in range(10):
            assert len(find(cache, range(8), 0)) == 8  # all of hot, and there is nothing to move
            cache.rollback()
        assert cache.stats.n_migrations == 0 and cache.hot.used == 0 and log() == []

        assert commit(cache, range(6)) and log() == []  # 75 %
        assert len(find(cache, range(6, 10), 0)) == 4  # needs two cells more than there are
        assert log() == [
            "[MIXED_CACHE_DEBUG] find_slot: hot cache has no room for the new tokens",
            *migration_lines(2),
        ]
        assert positions(cache) == ([2, 3, 4, 5], [0, 1])  # the new ones are not there yet
        assert cache.seq_pos_max() == 5
        check_rows(cache)
        assert len(find(cache, range(6, 10), 0)) == 4 and log() == []  # there is room now
        cache.commit()
        assert positions(cache) == ([4, 5, 6, 7, 8, 9], [0, 1, 2, 3])  # 8 of 8 passed the threshold again
        assert log() == [EXCEEDED, *migration_lines(2)]

    with make(8, 32, 3, 4, n_seq_max=2) as cache:
        n = 0
        while commit(cache, range(n, n + 1)):
            n += 1
        assert n == 8 + 32  # not one cell is wasted
        check_rows(cache)
        log()
        before, stats, state = positions(cache), cache.stats, cache.state_save()
        for n_new in (1, 3, 8, 9, 100):
            assert find(cache, range(n, n + n_new), 0) == ()
            with pytest.raises(CacheError, match="commit without find_slot"):
                cache.commit()
        assert positions(cache) == before and cache.state_save() == state
        assert (cache.stats.n_refused, cache.stats.n_migrations) == (stats.n_refused + 5, stats.n_migrations)
        assert log() == ["[MIXED_CACHE_DEBUG] find_slot: hot and cold cache are full: hot=8/8, cold=32/32"] * 5


def test_documented_sequence_ops() -> None:
    seq = 42

    def filled() -> MixedKVCache:
        cache = make(16, 64, 8, 4, n_seq_max=43)
        for pos in range(20):
            assert commit(cache, range(pos, pos + 1), seq)
        assert positions(cache, seq) == (list(range(8, 20)), list(range(8)))
        return cache

    with make(16, 64, 8, 4, n_seq_max=42) as cache:
        with pytest.raises(ParamsError, match="from 0 to 41, not 42"):
            cache.seq_pos_max(seq)
        ubatch = SBatch(_batch(seq)).split_simple(1)
        with pytest.raises(ParamsError, match="from 0 to 41, not 42"):
            cache.find_slot(ubatch)

    with filled() as cache:
        assert (cache.seq_pos_min(seq), cache.seq_pos_max(seq)) == (0, 19)  # one is cold, the other hot
        assert (cache.seq_pos_min(0), cache.seq_pos_max(0)) == (-1, -1)

    # all ranges straddle the border at 8
    with filled() as cache:
        cache.seq_rm(seq, 6, 11)
        assert positions(cache, seq) == (list(range(11, 20)), list(range(6)))
        cache.seq_rm(seq, 0, 3)
        cache.seq_rm(seq, 18, -1)
        assert (cache.seq_pos_min(seq), cache.seq_pos_max(seq)) == (3, 17)
        check_rows(cache)

    with filled() as cache:
        cache.seq_cp(seq, 7, 6, 11)
        assert positions(cache, 7) == ([8, 9, 10], [6, 7])
        assert (cache.seq_pos_min(7), cache.seq_pos_max(7)) == (6, 10)
        assert cache.hot.used + cache.cold.used == 20  # the cells are shared
        cache.seq_keep(7)
        assert positions(cache, 7) == ([8, 9, 10], [6, 7]) and positions(cache, seq) == ([], [])
        check_rows(cache)

    with filled() as cache:
        cache.seq_add(seq, 6, 11, 100)
        assert positions(cache, seq) == ([*range(11, 20), 108, 109, 110], [*range(6), 106, 107])
        check_rows(cache, lambda pos: pos - 100 if pos >= 100 else pos)
        cache.seq_add(seq, 0, -1, -4)  # four fall off the beginning
        assert positions(cache, seq) == ([*range(7, 16), 104, 105, 106], [0, 1, 102, 103])
        assert (cache.seq_pos_min(seq), cache.seq_pos_max(seq)) == (0, 106)

    with filled() as cache:
        cache.seq_div(seq, 6, 11, 2)
        assert positions(cache, seq) == (sorted([4, 4, 5, *range(11, 20)]), sorted([*range(6), 3, 3]))

    with filled() as cache, make(16, 64, 8, 4, n_seq_max=43) as other, make(16, 64, 8, 4, n_seq_max=43) as third:
        state = cache.state_save()
        other.state_load(state)
        assert other.state_save() == state
        assert positions(other, seq) == positions(cache, seq)
        check_rows(other)
        for layer in range(N_LAYER):
            np.testing.assert_array_equal(other.cold.get_k(layer).data, cache.cold.get_k(layer).data)
            np.testing.assert_array_equal(other.cold.get_v(layer).data, cache.cold.get_v(layer).data)

        one = cache.state_save(seq)
        third.state_load(one, 3)
        assert positions(third, 3) == positions(cache, seq) and positions(third, seq) == ([], [])
        check_rows(third)
        third.state_load(one, seq)  # sequence 3 makes way
        assert positions(third, seq) == positions(cache, seq) and third.seq_pos_max(3) == 19
        check_rows(third)


def _batch(seq: int) -> Batch:
    batch = Batch()
    batch.add(1, 0, seq)
    return batch


def test_documented_config_variations() -> None:
    for hot, cold, group, n_pad in ((8, 32, 4, 4), (16, 64, 8, 8), (32, 128, 16, 8), (64, 256, 32, 16)):
        with make(hot, cold, group, n_pad) as cache:
            assert (cache.hot.size, cache.cold.size) == (hot, cold)
            n = 0
            while commit(cache, range(n, n + 1)):
                n += 1
            assert n == hot + cold
            assert cache.cold.used == cache.stats.n_tokens_moved == cold
            assert cache.stats.n_migrations == cold // min(hot // 4, group)
            check_rows(cache)

    for named, options in {
        "hot=10 is not a multiple of n_pad=4": {"hot": 10},
        "cold_size=30 is not a multiple of n_pad=4": {"cold": 30},
        "hot must be from 1": {"hot": 0},
        "cold_size must be at least 1": {"cold": 0},
        "group must be from 1": {"group": 0},
        "n_pad must be from 1": {"n_pad": 0},
        "n_seq_max must be from 1": {"n_seq_max": 0},
        "n_layer must be from 1": {"n_layer": 0},
        "n_head_kv must be from 1": {"n_head_kv": 0},
        "head_size_k must be from 1": {"head_size_k": 0},
        "head_size_v must be from 1": {"head_size_v": 0},
        "threshold must be over 0 and at most 1, not 0": {"threshold": 0.0},
        "threshold must be over 0 and at most 1, not 1.01": {"threshold": 1.01},
        "threshold must be over 0 and at most 1, not -0.8": {"threshold": -0.8},
        "threshold must be a finite number": {"threshold": float("nan")},
        "cold_k=q4_0 stores blocks of 32 values, and the head size 48": {"head_size_k": 48},
        "cold_v=q4_0 stores blocks of 32 values, and the head size 16": {"head_size_v": 16},  # though its rows have 32
    }.items():
        with pytest.raises(ParamsError, match=named):
            make(**({"hot": 8, "cold": 32, "group": 4, "n_pad": 4} | options))


#
# copies
#


def test_documented_basic_access() -> None:
    with UnifiedKVCache(64, n_layer=3, n_head_kv=2, head_size_k=8, head_size_v=16, n_pad=4) as cache:
        assert (cache.tier.size, cache.tier.type_k, cache.tier.type_v) == (64, "f16", "f16")
        for layer in range(3):
            for tensor, head in ((cache.tier.get_k(layer), 8), (cache.tier.get_v(layer), 16)):
                assert (tensor.type, tensor.ne, tensor.data.dtype) == ("f16", (head, 2, 0, 1), np.float16)
        assert find(cache, range(64), 0)
        cache.commit()
        for layer in range(3):
            for tensor, head in ((cache.tier.get_k(layer), 8), (cache.tier.get_v(layer), 16)):
                assert tensor.ne == (head, 2, 64, 1)
                assert tensor.data.shape == (1, 64, 2, head)
        with pytest.raises(ParamsError, match="no such layer"):
            cache.tier.get_k(3)


def test_documented_data_storage_and_retrieval() -> None:
    with UnifiedKVCache(64, n_layer=2, n_head_kv=2, head_size_k=8, n_pad=4) as cache:
        batch = Batch()
        for pos, token in enumerate((101, 1, 102)):
            batch.add(token, pos, 0)
        assert batch.n_tokens == 3
        with SBatch(batch, memory=cache) as sbatch:
            ubatch = sbatch.split_simple(4)
            assert ubatch.n_tokens == 3
            assert (ubatch.token.tolist(), ubatch.pos.tolist()) == ([101, 1, 102], [0, 1, 2])
            cells = cache.find_slot(ubatch)
        assert len(set(cells)) == 3 and cache.tier.used == 0 and cache.seq_pos_max() == -1
        cache.commit()
        assert (cache.tier.used, cache.tier.n(), cache.seq_pos_min(), cache.seq_pos_max()) == (3, 4, 0, 2)
        assert [(c.index, c.pos, c.seq_ids) for c in cache.tier.cells()] == [(0, 0, (0,)), (1, 1, (0,)), (2, 2, (0,))]
        for layer in range(2):
            assert list(cache.tier.get_k(layer).ne) == [8, 2, 4, 1]
            assert list(cache.tier.get_v(layer).ne) == [8, 2, 4, 1]


def test_documented_simple_ggml_cpy() -> None:
    x = np.sin(0.05 * np.arange(128)).astype(np.float16)
    f16 = ggml.quantize(x, "f16")
    q = ggml.cpy(f16, "q4_0")
    assert (f16.nbytes, q.nbytes) == (256, 72)
    assert f"{1 - q.nbytes / f16.nbytes:.0%}" == "72%"
    np.testing.assert_array_equal(q.data, q4_0(x))
    y = ggml.cpy(q, "f32").data
    # a block has 16 levels, from -8 to 7 times an eighth of its largest number: at most one level is lost, where 8 is
    # wanted, and the level itself is rounded to F16
    level = np.abs(x.reshape(4, 32).astype(np.float64)).max(axis=1, keepdims=True) / 8
    error = np.abs(y - x).reshape(4, 32)
    assert (error <= level * (1 + 8 * 2.0**-11)).all() and error.max() > 0


def test_documented_copy_between_caches() -> None:
    shape = {"n_layer": 2, "n_head_kv": 2, "head_size_k": 32, "n_pad": 4}
    with UnifiedKVCache(64, **shape) as source, UnifiedKVCache(64, type_k="q4_0", type_v="q4_0", **shape) as target:
        for cache in (source, target):
            assert find(cache, range(8), 0) == tuple(range(8))
            cache.commit()
        for layer in range(2):
            for v, name in enumerate("kv"):
                written = np.stack([rows(pos, layer, bool(v), 2, 32) for pos in range(8)])
                getattr(source.tier, f"set_{name}")(layer, 0, written)
                f16 = getattr(source.tier, f"get_{name}")(layer)
                np.testing.assert_array_equal(f16.data[0], written)

                q = ggml.cpy(f16, "q4_0")
                assert q.nbytes * 256 == f16.nbytes * 72
                copied = ggml.Tensor("q4_0", q.ne[:3], q.data[0])
                getattr(target.tier, f"set_{name}")(layer, 0, copied)

        for layer in range(2):
            for v, name in enumerate("kv"):  # after all were written: none has overwritten another
                written = np.stack([rows(pos, layer, bool(v), 2, 32) for pos in range(8)])
                stored = getattr(target.tier, f"get_{name}")(layer)
                assert (stored.type, stored.ne) == ("q4_0", (32, 2, 8, 1))
                np.testing.assert_array_equal(stored.data[0], q4_0(written))
                np.testing.assert_array_equal(getattr(source.tier, f"get_{name}")(layer).data[0], written)
                level = np.abs(written.astype(np.float64)).max(axis=-1, keepdims=True) / 8
                assert (np.abs(stored.dequantize()[0] - written) <= level * (1 + 8 * 2.0**-11)).all()
