"""Scenarios of a mixed cache: tokens move, when they do, and what becomes of their bytes."""

from __future__ import annotations

from functools import partial

import numpy as np

from .. import Batch, CacheError, MixedKVCache, ParamsError, SBatch
from .play import (
    EXCEEDED,
    HEAD,
    N_HEAD_KV,
    N_LAYER,
    Play,
    add,
    find,
    log_events,
    make_cache,
    migration_lines,
    right_rows,
    tokens,
    where,
)


def constructor(play: Play) -> None:
    with make_cache(32, 128, 8, 8, n_seq_max=10) as cache:
        log_events(cache, True)
        play.check_log(
            "what is logged about it",
            [
                "llama_kv_cache_mixed: creating hot KV cache (FP16), size = 32 cells",
                "llama_kv_cache_mixed: creating cold KV cache (quantized), size = 128 cells",
                "[MIXED_CACHE_DEBUG] initialized: hot=0/32 (0.0%), cold=0/128 (0.0%)",
            ],
        )
        for name, tier, expected, row_size in (
            ("hot", cache.hot, "32 cells of f16/f16, 0 used", 2 * N_HEAD_KV * HEAD),
            ("cold", cache.cold, "128 cells of q4_0/q4_0, 0 used", N_HEAD_KV * HEAD // 32 * 18),
        ):
            play.check(name, expected, f"{tier.size} cells of {tier.type_k}/{tier.type_v}, {tier.used} used")
            shape = (tier.n_layer, tier.n_head_kv, tier.head_size_k, tier.head_size_v)
            play.check(f"{name}'s layers, KV heads and their sizes", (N_LAYER, N_HEAD_KV, HEAD, HEAD), shape)
            play.check(f"{name}'s bytes of a row", (row_size, row_size), (tier.row_size_k, tier.row_size_v))
        play.check("sequences and streams", (10, 1), (cache.n_seq_max, cache.n_stream))
        play.check("tokens", "hot none, cold none", tokens(cache))


def basic_ops(play: Play) -> None:
    with make_cache(16, 64, 4, 8, n_seq_max=5) as cache:
        spec = "hot=16,cold=q4_0,group=4,threshold=0.8,sink=0,cold_size=64,mean=off"
        play.check("parameters in force", spec, cache.params.spec())
        add(cache, 12)
        play.check("twelve tokens", "hot 0-11, cold none", tokens(cache))
        add(cache, 5)
        play.check("five more", "hot 8-16, cold 0-7", tokens(cache))
        play.check("cells in view: used ones, a multiple of 8", (16, 8), (cache.hot.n(), cache.cold.n()))
        cache.clear()
        play.check("after clear()", "hot none, cold none", tokens(cache))
        used = (cache.hot.used, cache.cold.used, cache.hot.n(), cache.cold.n())
        play.check("cells used and in view", (0, 0, 0, 0), used)
        play.check("ends of the sequence", (-1, -1), (cache.seq_pos_min(), cache.seq_pos_max()))
        add(cache, 3)
        play.check("it works as before", "hot 0-2, cold none", tokens(cache))


def quantization_trigger(play: Play) -> None:
    for (hot, cold, group, n_pad), n_commits, n_moved, fires_at in (
        ((10, 40, 4, 2), 15, 2, [9, 11, 13, 15]),  # a quarter of hot is less than the group
        ((16, 64, 4, 8), 20, 4, [13, 17]),  # four tokens at a time, as the group and a quarter of hot are
        ((32, 128, 3, 8), 30, 3, [26, 29]),  # the group is less than a quarter of hot
    ):
        with make_cache(hot, cold, group, n_pad, n_seq_max=3) as cache:
            log_events(cache, True)
            play.read_log()
            name = f"hot={hot}, group={group}"
            lines: list[str] = []
            expected, found, n_hot, n_cold = [], [], 0, 0
            for i in range(1, n_commits + 1):
                n_hot += 1
                if i in fires_at:
                    n_hot, n_cold = n_hot - n_moved, n_cold + n_moved
                    lines += [EXCEEDED, *migration_lines(n_moved)]
                expected.append(where(range(n_cold, i), range(n_cold)))
                add(cache, 1)
                found.append(tokens(cache))
            right = sum(a == b for a, b in zip(expected, found, strict=True))
            what = f"{name}: commits that pass 80 % move the {n_moved} oldest: number {', '.join(map(str, fires_at))}"
            play.check(what, f"{n_commits} of {n_commits} as expected", f"{right} of {n_commits} as expected")
            play.check(f"{name}: at the end", expected[-1], found[-1])
            play.check_log(f"{name}: the log", lines)
            counts = (cache.stats.n_migrations, cache.stats.n_tokens_moved, cache.cold.used)
            play.check(f"{name}: migrations, tokens moved, cold", (len(fires_at), n_cold, n_cold), counts)
            n_rows = 2 * N_LAYER * n_commits
            play.check(f"{name}: hot rows unchanged, cold ones ggml's Q4_0", f"{n_rows} of {n_rows}", right_rows(cache))


def find_slot_trigger(play: Play) -> None:
    with make_cache(8, 32, 3, 4, n_seq_max=2) as cache:
        log_events(cache, True)
        play.read_log()
        n_found = []
        for _ in range(10):
            n_found.append(len(find(cache, range(8))))
            cache.rollback()
        play.check("ten searches for eight cells in an empty cache", [8] * 10, n_found)
        play.check("they move nothing", (0, 0), (cache.stats.n_migrations, cache.hot.used))
        add(cache, 6)
        play.check_log("and log nothing", [])
        play.check("six tokens, and a search for four cells", 4, len(find(cache, range(6, 10))))
        play.check("what made room", "hot 2-5, cold 0-1", tokens(cache))
        no_room = "[MIXED_CACHE_DEBUG] find_slot: hot cache has no room for the new tokens"
        play.check_log("what is logged about it", [no_room, *migration_lines(2)])
        play.check("the end is where it was", 5, cache.seq_pos_max())
        play.check("rows as they were written", "24 of 24", right_rows(cache))
        play.check("searching again", 4, len(find(cache, range(6, 10))))
        play.check_log("moves nothing", [])
        cache.commit()
        play.check("commit, past the threshold again", "hot 4-9, cold 0-3", tokens(cache))
        play.check_log("what is logged about that", [EXCEEDED, *migration_lines(2)])
    with make_cache(8, 32, 3, 4, n_seq_max=2) as cache:
        play.check("one by one until it is full", 8 + 32, add(cache, 50))
        play.check("all cells are used", "hot 32-39, cold 0-31", tokens(cache))
        play.check("rows of a full cache", "160 of 160", right_rows(cache))
        log_events(cache, True)
        play.read_log()
        before, stats = cache.state_save(), cache.stats
        found = [find(cache, range(40, 40 + n)) for n in (1, 3, 8, 9, 100)]
        play.check("cells for 1, 3, 8, 9 and 100 more", [()] * 5, found)
        play.check_refused("commit", "commit without find_slot", CacheError, cache.commit)
        play.check("nothing has changed", True, cache.state_save() == before)
        counted = (cache.stats.n_refused - stats.n_refused, cache.stats.n_migrations - stats.n_migrations)
        play.check("refusals and migrations that were counted", (5, 0), counted)
        full = "[MIXED_CACHE_DEBUG] find_slot: hot and cold cache are full: hot=8/8, cold=32/32"
        play.check_log("what is logged about them", [full] * 5)


def sequence_ops(play: Play) -> None:
    def filled() -> MixedKVCache:
        cache = make_cache(16, 64, 8, 4, n_seq_max=43)
        add(cache, 20, seq=42)
        return cache

    with make_cache(16, 64, 8, 4, n_seq_max=42) as cache:
        reason = "from 0 to 41, not 42"
        play.check_refused("sequence 42 of 42", reason, ParamsError, lambda: cache.seq_pos_max(42))
        batch = Batch()
        batch.add(1, 0, 42)
        with SBatch(batch) as sbatch:
            ubatch = sbatch.split_simple(1)
            play.check_refused("a token of it", reason, ParamsError, lambda: cache.find_slot(ubatch))

    with filled() as cache:
        play.check("sequence 42", "hot 8-19, cold 0-7", tokens(cache, 42))
        play.check("its ends", (0, 19), (cache.seq_pos_min(42), cache.seq_pos_max(42)))
        play.check("those of another", (-1, -1), (cache.seq_pos_min(0), cache.seq_pos_max(0)))

    with filled() as cache:  # 6 to 11 is on both sides of the border at 8
        cache.seq_rm(42, 6, 11)
        play.check("seq_rm across the border", "hot 11-19, cold 0-5", tokens(cache, 42))
        cache.seq_rm(42, 0, 3)
        cache.seq_rm(42, 18, -1)
        play.check("and at both ends", "hot 11-17, cold 3-5", tokens(cache, 42))
        play.check("the ends then", (3, 17), (cache.seq_pos_min(42), cache.seq_pos_max(42)))
        play.check("rows that are left", "40 of 40", right_rows(cache))

    with filled() as cache:
        cache.seq_cp(42, 7, 6, 11)
        play.check("seq_cp to 7 across the border", "hot 8-10, cold 6-7", tokens(cache, 7))
        play.check("its ends then", (6, 10), (cache.seq_pos_min(7), cache.seq_pos_max(7)))
        play.check("the cells are shared", 20, cache.hot.used + cache.cold.used)
        cache.seq_keep(7)
        play.check("seq_keep of 7", "hot 8-10, cold 6-7", tokens(cache, 7))
        play.check("what is left of 42", "hot none, cold none", tokens(cache, 42))
        play.check("rows that are kept", "20 of 20", right_rows(cache))

    with filled() as cache:
        cache.seq_add(42, 6, 11, 100)
        play.check("seq_add across the border", "hot 11-19 108-110, cold 0-5 106-107", tokens(cache, 42))
        play.check("rows go along", "80 of 80", right_rows(cache, lambda pos: pos - 100 if pos >= 100 else pos))
        cache.seq_add(42, 0, -1, -4)
        play.check("four fall off the beginning", "hot 7-15 104-106, cold 0-1 102-103", tokens(cache, 42))
        play.check("the ends after that", (0, 106), (cache.seq_pos_min(42), cache.seq_pos_max(42)))

    with filled() as cache:
        cache.seq_div(42, 6, 11, 2)
        positions = [sorted(c.pos for c in tier.cells()) for tier in (cache.hot, cache.cold)]
        play.check("seq_div across the border", [[4, 4, 5, *range(11, 20)], [0, 1, 2, 3, 3, 3, 4, 5]], positions)

    _states(play, filled())


def _states(play: Play, cache: MixedKVCache) -> None:
    """Closes the cache."""
    with cache, make_cache(16, 64, 8, 4, n_seq_max=43) as other, make_cache(16, 64, 8, 4, n_seq_max=43) as third:
        state = cache.state_save()
        other.state_load(state)
        play.check("state, read into another cache", "hot 8-19, cold 0-7", tokens(other, 42))
        play.check("written from there", True, other.state_save() == state)
        play.check("its rows", "80 of 80", right_rows(other))
        same = sum(
            np.array_equal(getattr(cache.cold, get)(layer).data, getattr(other.cold, get)(layer).data)
            for get in ("get_k", "get_v")
            for layer in range(N_LAYER)
        )
        play.check("cold tensors that are the same bit by bit", "4 of 4", f"{same} of 4")
        one = cache.state_save(42)
        third.state_load(one, 3)
        play.check("state of 42, read as 3", "hot 8-19, cold 0-7", tokens(third, 3))
        play.check("as 3 alone", "hot none, cold none", tokens(third, 42))
        play.check("rows of 3", "80 of 80", right_rows(third))
        third.state_load(one, 42)  # the tokens of 3 make way
        play.check("read as 42 too", "hot 8-19, cold 0-7", tokens(third, 42))
        play.check("3 is there still", (0, 19), (third.seq_pos_min(3), third.seq_pos_max(3)))
        play.check("rows of both", "160 of 160", right_rows(third))


def config_variations(play: Play) -> None:
    for hot, cold, group, n_pad in ((8, 32, 4, 4), (16, 64, 8, 8), (32, 128, 16, 8), (64, 256, 32, 16)):
        with make_cache(hot, cold, group, n_pad) as cache:
            name = f"hot={hot}, cold={cold}, group={group}, n_pad={n_pad}"
            play.check(f"cells for {name}", (hot, cold), (cache.hot.size, cache.cold.size))
            play.check("tokens there is room for", hot + cold, add(cache, hot + cold + 1))
            moved = (cold // min(hot // 4, group), cold, cold)
            counts = (cache.stats.n_migrations, cache.stats.n_tokens_moved, cache.cold.used)
            play.check("migrations, tokens moved, cold", moved, counts)
            n_rows = 2 * N_LAYER * (hot + cold)
            play.check("rows as they were written", f"{n_rows} of {n_rows}", right_rows(cache))

    for reason, options in (
        ("hot=10 is not a multiple of n_pad=4", {"hot": 10}),
        ("cold_size=30 is not a multiple of n_pad=4", {"cold": 30}),
        ("hot must be from 1", {"hot": 0}),
        ("cold_size must be at least 1", {"cold": 0}),
        ("group must be from 1", {"group": 0}),
        ("n_pad must be from 1", {"n_pad": 0}),
        ("n_seq_max must be from 1", {"n_seq_max": 0}),
        ("n_layer must be from 1", {"n_layer": 0}),
        ("n_head_kv must be from 1", {"n_head_kv": 0}),
        ("head_size_k must be from 1", {"head_size_k": 0}),
        ("head_size_v must be from 1", {"head_size_v": 0}),
        ("threshold must be over 0 and at most 1, not 0", {"threshold": 0.0}),
        ("threshold must be over 0 and at most 1, not 1.01", {"threshold": 1.01}),
        ("threshold must be over 0 and at most 1, not -0.8", {"threshold": -0.8}),
        ("threshold must be a finite number", {"threshold": float("nan")}),
        ("cold_k=q4_0 stores blocks of 32 values, and the head size 48", {"head_size_k": 48}),
        # (its rows, of two heads, would be a whole block)
        ("cold_v=q4_0 stores blocks of 32 values, and the head size 16", {"head_size_v": 16}),
    ):
        wanted = {"hot": 8, "cold": 32, "group": 4, "n_pad": 4} | options
        (name,) = (f"{key}={value}" for key, value in options.items())
        play.check_refused(name, reason, ParamsError, partial(make_cache, **wanted))
