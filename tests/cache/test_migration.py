"""Which tokens move when, and that nothing is lost on the way: a cache, the twin of its policy and a plain cache.

Cold rows are F32 like hot ones here, so a plain cache gives the same logits up to the order of sums, see
test_identity.py; what quantisation does to rows is in test_quantised.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.allowances import ATOL, F32
from helpers.processes import environment, library_dir
from helpers.tiering import Full, Tiering
from helpers.tiny_model import random_tokens

from llamamix import Context, ContextError, ContextFullError, DecodeAborted, KVMixedParams, MixedKVCache, Model

MakeContext = Callable[..., Context]


def counts(context: Context) -> dict[str, int]:
    return {name: getattr(context.stats, name) for name in ("hot_used", "cold_used", "n_migrations", "n_tokens_moved")}


class Trio:
    """A mixed cache, a plain one and the twin of the policy, which all do the same."""

    def __init__(
        self, model: Model, n_ctx: int = 512, n_ubatch: int = 64, n_seq: int = 1, unified: bool = True, **shape: Any
    ):
        self.n_seq, self.n_ubatch = n_seq, n_ubatch
        params = F32 | {"n_ctx": n_ctx, "n_ubatch": n_ubatch, "n_threads": 1, "n_seq_max": n_seq, "kv_unified": unified}
        self.mixed = Context(model, kv_mixed=KVMixedParams(cold="f32", **shape), **params)
        self.plain = Context(model, kv_mixed=False, **params)
        n_stream = self.mixed.stats.n_stream
        hot, cold = self.mixed.stats.hot_size // n_stream, self.mixed.stats.cold_size // n_stream
        self.twin = Tiering(**(shape | {"hot": hot}), cold=cold, n_stream=n_stream)
        self.n_full = 0
        self.caches = (self.mixed, self.plain)

    def close(self) -> None:
        for context in self.caches:
            context.close()

    def next_pos(self, seq: int) -> int:
        return self.plain.memory.seq_pos_max(seq) + 1

    def decode(self, seqs: list[Any], seed: int = 0) -> None:
        """Random tokens of these sequences, compared."""
        tokens = random_tokens(len(seqs), seed)
        pos, at = [], {}
        for s in seqs:
            mine = [s] if isinstance(s, int) else s
            pos.append(at.get(mine[0], self.next_pos(mine[0])))
            at.update(dict.fromkeys(mine, pos[-1] + 1))
        try:
            self.twin.decode(pos, seqs, self.n_ubatch)
        except Full:
            self.n_full += 1
            for context in self.caches:
                with pytest.raises(ContextFullError):
                    context.decode_batch(tokens, seqs, pos=pos)
        else:
            for context in self.caches:
                context.decode_batch(tokens, seqs, pos=pos, logits="all")
            np.testing.assert_allclose(self.mixed.logits, self.plain.logits, rtol=0, atol=ATOL)
        self.check()

    def memory(self, name: str, *args: int) -> None:
        """An operation on sequences."""
        for context in self.caches:
            getattr(context.memory, f"seq_{name}" if name != "clear" else name)(*args)
        getattr(self.twin, name)(*args)
        self.check()

    def check(self) -> None:
        assert counts(self.mixed) == self.twin.counts
        for seq in range(self.n_seq):
            hot, cold = self.twin.positions(seq)
            for context in self.caches:
                assert context.memory.seq_pos_min(seq) == min(hot + cold, default=-1)
                assert context.memory.seq_pos_max(seq) == max(hot + cold, default=-1)
            # what the policy promises
            movable = [p for p in hot if p >= self.twin.sink]
            assert not cold or not movable or max(cold) < min(movable)


@pytest.fixture
def trio(tiny_model: Model) -> Iterator[Callable[..., Trio]]:
    made = []

    def make(**params: Any) -> Trio:
        made.append(Trio(tiny_model, **params))
        return made[-1]

    yield make
    for t in made:
        t.close()


#
# when, and how many
#


def test_the_threshold(make_context: MakeContext) -> None:
    """10 hot cells, 80 %: the ninth token moves the two oldest ones, a quarter of hot."""
    context = make_context(kv_mixed=KVMixedParams(hot=10, group=4, sink=0, threshold=0.8))
    seen = []
    for token in random_tokens(15):
        context.decode([token])
        seen.append((context.stats.hot_used, context.stats.cold_used))
    at_most_8 = [(n, 0) for n in range(1, 9)]
    assert seen == [*at_most_8, (7, 2), (8, 2), (7, 4), (8, 4), (7, 6), (8, 6), (7, 8)]
    assert context.stats.n_migrations == 4


def test_just_the_threshold_is_not_over_it(make_context: MakeContext) -> None:
    """Half of 10 is a number of cells exactly."""
    context = make_context(kv_mixed=KVMixedParams(hot=10, group=4, sink=0, threshold=0.5))
    seen = []
    for token in random_tokens(6):
        context.decode([token])
        seen.append(context.stats.cold_used)
    assert seen == [0, 0, 0, 0, 0, 2]


@pytest.mark.parametrize(
    ("hot", "group", "n_moved"),
    [(64, 128, 16), (64, 16, 16), (64, 15, 15), (64, 1, 1), (67, 128, 16), (3, 128, 1), (100, 24, 24)],
)
def test_a_quarter_of_hot_or_a_group(hot: int, group: int, n_moved: int, make_context: MakeContext) -> None:
    context = make_context(kv_mixed=KVMixedParams(hot=hot, group=group, sink=0, threshold=0.8))
    n_over = int(0.8 * hot) + 1
    for token in random_tokens(n_over):
        context.decode([token])
    assert counts(context) == {
        "hot_used": n_over - n_moved,
        "cold_used": n_moved,
        "n_migrations": 1,
        "n_tokens_moved": n_moved,
    }


def test_a_ubatch_is_placed_before_it_is_moved(make_context: MakeContext) -> None:
    """Tokens of a ubatch have no rows yet when it passes the threshold; they stay, and make room later."""
    context = make_context(n_ubatch=60, kv_mixed=KVMixedParams(hot=64, group=16, sink=0, threshold=0.5))
    context.decode(random_tokens(60))
    assert (context.stats.hot_used, context.stats.n_migrations) == (60, 0)
    context.decode(random_tokens(1))  # over the threshold now, and fits
    assert (context.stats.hot_used, context.stats.n_migrations) == (45, 1)
    context.decode(random_tokens(50))  # 45 + 50 > 64: twice to make room, and once for the threshold
    assert (context.stats.hot_used, context.stats.n_migrations) == (45 - 32 + 50 - 13, 4)


def test_sinks_stay(trio: Callable[..., Trio]) -> None:
    t = trio(n_seq=3, hot=64, group=8, sink=5)
    for i in range(60):
        t.decode([0, 1, 2], seed=i)
    for seq in range(3):
        hot, cold = t.twin.positions(seq)
        assert hot[:5] == [0, 1, 2, 3, 4]
        assert cold[0] == 5


def test_sinks_take_no_more_than_half_of_hot(trio: Callable[..., Trio]) -> None:
    """20 sequences with 4 sinks each, and room for 32 in all: the first positions of all sequences come first."""
    t = trio(n_ctx=1024, n_seq=20, hot=64, group=8, sink=4)
    for i in range(30):
        t.decode(list(range(20)), seed=i)
    for seq in range(20):
        hot, cold = t.twin.positions(seq)
        n = 2 if seq < 12 else 1
        assert hot[:n] == list(range(n)) and cold[0] == n
    for seq in range(19):
        t.memory("rm", seq, 0, -1)
    t.decode([19] * 200)  # what was not pinned when there was no room is cold, the rest stays


def test_sinks_of_sequences_that_never_come_take_no_room(trio: Callable[..., Trio]) -> None:
    t = trio(n_ctx=1024, n_seq=64, hot=64, group=8, sink=5)
    t.decode([7] * 200 + [63] * 150)
    for seq in (7, 63):
        hot, cold = t.twin.positions(seq)
        assert hot[:5] == [0, 1, 2, 3, 4] and cold[0] == 5


def test_tokens_at_the_position_of_a_sink(trio: Callable[..., Trio]) -> None:
    """Positions that are divided: all tokens are at those of sinks, and no more than a sequence's share is pinned."""
    t = trio(hot=64, group=16, sink=4, threshold=1.0)
    t.decode([0] * 64)
    t.memory("div", 0, 0, -1, 16)
    assert t.twin.counts["cold_used"] == 0
    t.decode([0])
    assert t.twin.counts["cold_used"] == 16
    t.decode([0] * 300)
    hot, cold = t.twin.positions(0)
    assert hot[:4] == [0] * 4 and hot[4] > 200
    assert cold[:17] == [0] * 12 + [1] * 5


SHAPES: list[dict[str, Any]] = [
    {"hot": 48, "group": 7, "sink": 3},
    {"hot": 20, "group": 100, "sink": 0, "threshold": 1.0},
    {"hot": 130, "group": 16, "sink": 1, "threshold": 0.3, "n_ubatch": 17},
    {"hot": 13, "group": 1, "sink": 4},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"hot={s['hot']}")
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_anything_in_any_order(unified: bool, shape: dict[str, Any], trio: Callable[..., Trio]) -> None:
    """200 random operations; after each one counts and positions are the twin's, and logits a plain cache's."""
    t = trio(n_ctx=512 if unified else 3 * 256, n_seq=3, unified=unified, **shape)
    rng = np.random.default_rng(shape["hot"])
    share = {
        "decode": 0.45,
        "prompt": 0.2,
        "rm": 0.1,
        "shift": 0.08,
        "cp": 0.08,
        "state": 0.05,
        "keep": 0.03,
        "clear": 0.01,
    }
    done = []

    for i in range(200):
        seq, other = (int(s) for s in rng.permutation(3)[:2])
        end = t.next_pos(seq)
        kind = rng.choice(list(share), p=list(share.values()))
        if kind == "decode":
            t.decode(rng.permutation(3)[: rng.integers(1, 4)].tolist(), seed=i)
        elif kind == "prompt":
            t.decode([seq] * int(rng.integers(1, 150)) + [other] * int(rng.integers(0, 30)), seed=i)
        elif kind == "rm" and end > 0:
            t.memory("rm", seq, int(rng.integers(0, end)), -1)
        elif kind == "shift" and end > 12 and not t.twin.is_shared(seq):
            # forget some of the oldest tokens after the first four, and close the gap
            n = int(rng.integers(1, min(end - 10, 40)))
            t.memory("rm", seq, 4, 4 + n)
            t.memory("add", seq, 4 + n, end, -n)
        elif kind == "cp":
            t.memory("rm", other, 0, -1)
            t.memory("cp", seq, other)
        elif kind == "state":
            t.decode([seq], seed=i)  # carries out what cp and add have left to be done
            for context in t.caches:
                state = context.state_save()
                context.memory.clear()
                context.state_load(state)
            t.check()
        elif kind == "keep":
            t.memory("keep", seq)
        elif kind == "clear":
            t.memory("clear")
        else:
            continue
        done.append(kind)
    assert set(done) == set(share)
    assert t.n_full > 0
    assert t.twin.n_migrations > 20


def test_tokens_of_several_sequences(trio: Callable[..., Trio]) -> None:
    """A prefix that is decoded once for all of them moves once, and all of them see it."""
    t = trio(n_seq=3, hot=48, group=8, sink=2)
    t.decode([[0, 1, 2]] * 100)
    assert sum(counts(t.mixed)[tier] for tier in ("hot_used", "cold_used")) == 100
    for i in range(30):
        t.decode([0, 1, 2], seed=i)
    t.memory("rm", 0, 0, -1)
    for i in range(30):
        t.decode([1, 2], seed=i)
    assert t.twin.n_migrations > 20


def test_a_part_of_a_sequence_is_shared(trio: Callable[..., Trio]) -> None:
    t = trio(n_seq=2, hot=40, group=8, sink=2)
    t.decode([0] * 120)
    t.memory("cp", 0, 1, 0, 90)  # of which most are cold
    assert t.mixed.stats.hot_used + t.mixed.stats.cold_used == 120
    for i in range(40):
        t.decode([0, 1], seed=i)
    t.memory("keep", 1)
    t.decode([1] * 50)


#
# room
#


@pytest.mark.parametrize(
    "shape",
    [
        {"hot": 64, "sink": 4},
        {"hot": 1, "sink": 0},
        {"hot": 512},
        {"hot": 500, "sink": 400},
        {"hot": 100, "cold_size": 500},
    ],
)
def test_n_ctx_tokens_fit(shape: dict[str, int], make_context: MakeContext) -> None:
    context = make_context(n_ctx=512, n_ubatch=64, kv_mixed=KVMixedParams(cold="f32", **shape), **F32)
    tokens = random_tokens(512)
    context.decode(tokens[:300])
    for token in tokens[300:]:
        context.decode([token])
    assert context.memory.seq_pos_max() == 511
    assert context.stats.hot_used + context.stats.cold_used == 512
    with pytest.raises(ContextFullError, match="the context holds 512"):
        context.decode([5])
    plain = make_context(n_ctx=512, **F32)
    plain.decode(tokens)
    np.testing.assert_allclose(context.logits, plain.logits, rtol=0, atol=ATOL)


def test_a_full_cache_loses_nothing(make_context: MakeContext) -> None:
    """Two sequences that fit one by one, so it is libllama that refuses them."""
    shape = KVMixedParams(hot=64, cold="f32", sink=3)
    params = F32 | {"n_ctx": 512, "n_ubatch": 64, "n_seq_max": 2, "kv_unified": True}
    context = make_context(kv_mixed=shape, **params)
    tokens = random_tokens(600)
    context.decode(tokens[:300], seq_id=0)
    context.decode(tokens[:200], seq_id=1)

    before = context.stats
    for n in (13, 100):  # less and more than a ubatch
        with pytest.raises(ContextFullError, match="full") as error:
            context.decode(tokens[300 : 300 + n], seq_id=0)
        assert error.value.code == 1
    assert counts(context) == {name: getattr(before, name) for name in counts(context)}
    assert context.stats.n_refused == before.n_refused + 2
    assert [context.memory.seq_pos_max(seq) for seq in (0, 1)] == [299, 199]

    # the rest of the room, and what was decoded before, are still there
    context.decode(tokens[300:312], seq_id=0, logits="all")
    plain = make_context(kv_mixed=False, **params)
    plain.decode(tokens[:300], seq_id=0)
    plain.decode(tokens[300:312], seq_id=0, logits="all")
    np.testing.assert_allclose(context.logits, plain.logits, rtol=0, atol=ATOL)

    # room is made by removing tokens
    context.memory.seq_rm(1, 100, -1)
    context.decode(tokens[312:400], seq_id=0, logits="all")
    plain.decode(tokens[312:400], seq_id=0, logits="all")
    np.testing.assert_allclose(context.logits, plain.logits, rtol=0, atol=ATOL)


def test_input_of_several_batches_that_does_not_fit_is_undone(make_context: MakeContext) -> None:
    params = F32 | {"n_ctx": 256, "n_batch": 32, "n_seq_max": 2, "kv_unified": True}
    context = make_context(kv_mixed=KVMixedParams(hot=48, cold="f32", sink=3), **params)
    tokens = random_tokens(256)
    context.decode(tokens[:150], seq_id=0)
    context.decode(tokens[:40], seq_id=1)
    with pytest.raises(ContextFullError):
        context.decode(tokens[40:140], seq_id=1)  # two of the four batches fit
    assert [context.memory.seq_pos_max(seq) for seq in (0, 1)] == [149, 39]
    assert context.stats.hot_used + context.stats.cold_used == 190
    context.decode(tokens[40:60], seq_id=1, logits="all")
    plain = make_context(kv_mixed=False, **params)
    plain.decode(tokens[:40], seq_id=1)
    plain.decode(tokens[40:60], seq_id=1, logits="all")
    np.testing.assert_allclose(context.logits, plain.logits, rtol=0, atol=ATOL)


def test_sinks_leave_room_to_move(trio: Callable[..., Trio]) -> None:
    """15 sinks of three sequences in 16 hot cells: half of hot moves, until hot and cold are full to the last cell."""
    t = trio(n_ctx=256, n_seq=3, n_ubatch=16, hot=16, sink=5)
    for seq in range(3):
        t.decode([seq] * 5)
    assert t.twin.counts["hot_used"] == 13  # of 10, 8 are pinned
    for seq in range(3):
        t.decode([seq] * 70)
    t.decode([0] * 31)
    assert t.n_full == 0 and t.twin.counts["hot_used"] == 16 and t.twin.counts["cold_used"] == 240
    t.decode([1])
    assert t.n_full == 1


def test_a_batch_is_divided_ubatch_by_ubatch(trio: Callable[..., Trio]) -> None:
    """Large batches of several sequences, and little room: a ubatch is as large as hot can take after those before."""
    rng = np.random.default_rng(0)
    n_ubatches = []
    for n_seq, unified, shape in (
        (4, True, {"hot": 40, "group": 7, "sink": 3, "n_ubatch": 64}),
        (4, False, {"hot": 40, "group": 7, "sink": 3, "n_ubatch": 64}),
        (3, True, {"hot": 24, "group": 2, "sink": 6, "threshold": 0.4, "n_ubatch": 20}),
    ):
        t = trio(n_ctx=512 if unified else 512 * n_seq, n_seq=n_seq, unified=unified, **shape)
        decode = t.twin.decode

        def counted(*args: Any, decode: Callable[..., list[list[int]]] = decode) -> list[list[int]]:
            ubatches = decode(*args)
            n_ubatches.append(len(ubatches))
            return ubatches

        t.twin.decode = counted  # type: ignore[method-assign]
        for i in range(12):
            seqs = rng.integers(0, n_seq, rng.integers(50, 240)).tolist()
            t.decode(sorted(seqs) if i % 2 else seqs, seed=i)
            for seq in rng.permutation(n_seq)[:2]:
                t.memory("rm", int(seq), int(rng.integers(0, 40)), -1)
    assert max(n_ubatches) > 15 and len(n_ubatches) > 20


#
# sequences
#


@pytest.mark.parametrize("n_kept", [20, 200, 299])
def test_a_tail_is_removed_and_decoded_again(n_kept: int, trio: Callable[..., Trio]) -> None:
    """From deep in cold, near the border and in hot; what takes the place of the tail is hot."""
    t = trio(hot=64, group=16, sink=4)
    t.decode([0] * 300)
    _, cold = t.twin.positions(0)
    t.memory("rm", 0, n_kept, -1)
    for i in range(60):
        t.decode([0], seed=i)
    fresh = trio(hot=64, group=16, sink=4)
    tokens = [random_tokens(300)[:n_kept], *(random_tokens(1, i) for i in range(60))]
    fresh.plain.decode(np.concatenate(tokens))
    np.testing.assert_allclose(t.mixed.logits, fresh.plain.logits, rtol=0, atol=ATOL)
    assert len(cold) > 200


def test_context_shift(trio: Callable[..., Trio]) -> None:
    """Endless generation: half of the tokens after the first few are forgotten whenever the context is full."""
    t = trio(n_ctx=256, hot=48, group=12, sink=4)
    n_shifts = 0
    for i in range(600):
        if t.next_pos(0) == 256:
            t.memory("rm", 0, 4, 130)
            t.memory("add", 0, 130, 256, -126)
            n_shifts += 1
        t.decode([0], seed=i)
    assert n_shifts == 3
    assert t.n_full == 0
    assert t.twin.n_migrations > 20


def test_a_shift_rotates_quantised_rows(make_context: MakeContext) -> None:
    """Q4_0 rows are expanded, turned and stored anew: about as good as rows that were stored at their new place."""
    tokens = random_tokens(260)

    def logits(shift: bool, **params: Any) -> np.ndarray:
        context = make_context(n_ctx=512, **params)
        context.decode(tokens[:250])
        context.memory.seq_rm(0, 0, 100)
        if shift:
            context.memory.seq_add(0, 100, 250, -100)
        context.decode(tokens[250:], logits="all")
        return context.logits

    exact = F32 | {"kv_mixed": False}
    q4_0 = F32 | {"kv_mixed": KVMixedParams(hot=32, group=8, sink=0, cold="q4_0")}
    # attention depends on distances alone
    np.testing.assert_allclose(logits(True, **exact), logits(False, **exact), rtol=0, atol=3e-3)
    error = [np.sqrt(np.mean((logits(shift, **q4_0) - logits(False, **exact)) ** 2)) for shift in (False, True)]
    # rounded twice instead of once; one of these errors is the square root of 2 larger
    assert error[0] < error[1] < 2 * error[0]


#
# state
#


# (with Q4_0 rows the fused kernel rounds a query to 8 bits and weights to shares of their tile's largest: a query that
# differs in the last bit may be rounded to another one, and rows in other tiles have other shares)
@pytest.mark.parametrize(
    ("cold", "attn"), [("f32", "fused"), ("f32", "compose"), ("q8_0", "fused"), ("q4_0", "compose")]
)
@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "streams"])
def test_a_saved_state_comes_back(kv_unified: bool, cold: str, attn: str, make_context: MakeContext) -> None:
    params = F32 | {"n_ctx": 768, "n_seq_max": 2, "kv_unified": kv_unified, "n_ubatch": 64}
    params |= {"kv_mixed": KVMixedParams(hot=64, group=16, sink=4, cold=cold, attn=attn)}
    first = make_context(**params)
    first.decode(random_tokens(200), seq_id=0)
    first.decode(random_tokens(90, 1), seq_id=1)
    first.memory.seq_rm(0, 150, -1)
    state = first.state_save()

    second = make_context(**params)
    second.state_load(state)
    assert second.state_save() == state
    assert (second.stats.hot_used, second.stats.cold_used) == (first.stats.hot_used, first.stats.cold_used)
    n_moved = [c.stats.n_tokens_moved for c in (first, second)]
    # The tiers are as they were, so all that follows is the same; rows are at other places, sums in another order. New
    # tokens stay hot: where their rows differ in the last bit, a Q4_0 code might be another one.
    for i in range(14):
        for context in (first, second):
            context.decode_batch(random_tokens(2, i), [0, 1])
        np.testing.assert_allclose(second.logits, first.logits, rtol=0, atol=ATOL)
    moved = [c.stats.n_tokens_moved - n for c, n in zip((first, second), n_moved, strict=True)]
    assert moved[0] == moved[1] > 0


@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "streams"])
def test_a_sequence_is_brought_into_another_context(kv_unified: bool, make_context: MakeContext) -> None:
    params = F32 | {"n_ctx": 768, "n_seq_max": 2, "kv_unified": kv_unified, "n_ubatch": 64}
    params |= {"kv_mixed": KVMixedParams(hot=64, group=16, sink=4, cold="f32")}
    first = make_context(**params)
    first.decode(random_tokens(200), seq_id=0)
    second = make_context(**params)
    second.decode(random_tokens(120, 1), seq_id=0)  # makes room in hot for what comes
    second.decode(random_tokens(50, 2), seq_id=1)  # replaced
    second.state_load(first.state_save(0), 1)
    assert second.memory.seq_pos_max(1) == 199
    plain = make_context(**params | {"kv_mixed": False})
    plain.decode(random_tokens(120, 1), seq_id=1)
    for i in range(30):
        first.decode(random_tokens(1, i), seq_id=0)
        second.decode(random_tokens(1, i), seq_id=1)
        np.testing.assert_allclose(second.logits, first.logits, rtol=0, atol=ATOL)
    for context, seq in ((second, 0), (plain, 1)):  # the other one was not touched
        context.decode(random_tokens(1), seq_id=seq)
    np.testing.assert_allclose(second.logits, plain.logits, rtol=0, atol=ATOL)


def test_a_nearly_full_hot_is_brought_beside_others(make_context: MakeContext) -> None:
    """Prompts of any length, after some of which hot is full: sinks of the sequences there take some of it."""
    params = F32 | {"n_ctx": 768, "n_seq_max": 3, "kv_unified": True, "n_ubatch": 64}
    mixed = params | {"kv_mixed": KVMixedParams(hot=64, group=16, sink=4, cold="f32")}
    first, second, plain = make_context(**mixed), make_context(**mixed), make_context(**params | {"kv_mixed": False})
    n_over = []
    for n in [*range(50, 70), 128, 129, 192]:
        for context in (first, second, plain):
            context.memory.clear()
        for context, seq in ((first, 0), (plain, 1)):
            context.decode(random_tokens(n), seq_id=seq)
        for context in (second, plain):
            context.decode(random_tokens(5 + n % 7, 1), seq_id=0)
            context.decode(random_tokens(90, 2), seq_id=2)
        tiers = first.stats
        second.state_load(first.state_save(0), 1)
        cells = MixedKVCache.from_context(second)
        hot, cold = (sorted(c.pos for c in tier.cells() if c.seq_ids == (1,)) for tier in (cells.hot, cells.cold))
        assert sorted(hot + cold) == list(range(n)) and hot[:4] == [0, 1, 2, 3]
        # 8 sinks are there: 56 tokens at most have room
        n_over.append(len(cold) - tiers.cold_used)
        assert n_over[-1] == max(0, tiers.hot_used - 56)
        assert not cold or max(cold) < hot[4]
        for context in (second, plain):
            context.decode_batch([8, 9, 10], [0, 1, 2], logits="all")
        np.testing.assert_allclose(second.logits, plain.logits, rtol=0, atol=ATOL)
    assert max(n_over) == 8 and min(n_over) == 0


STREAMS = F32 | {"n_ctx": 768, "n_seq_max": 2, "n_ubatch": 64}
STREAMS |= {"kv_mixed": KVMixedParams(hot=64, group=16, sink=4, cold="f32")}


@pytest.mark.parametrize("then", ["save", "save one", "clear", "load", "load one"])
def test_a_copy_to_another_stream_is_made_at_once(then: str, make_context: MakeContext) -> None:
    """What comes between the copy and the next decode finds the rows copied, and is not overwritten by them."""
    context, other, plain = make_context(**STREAMS), make_context(**STREAMS), make_context(**STREAMS)
    first, second, third = random_tokens(200), random_tokens(90, 1), random_tokens(70, 2)
    context.decode(first, seq_id=0)
    other.decode(second, seq_id=0)
    other.decode(third, seq_id=1)

    context.memory.seq_cp(0, 1)
    if then == "save":
        other.state_load(context.state_save())
        context, held = other, {0: first, 1: first}
    elif then == "save one":
        other.state_load(context.state_save(1), 0)
        context, held = other, {0: first, 1: third}
    elif then == "clear":
        context.memory.clear()
        context.state_load(other.state_save(1), 1)
        held = {1: third}
    elif then == "load":
        context.state_load(other.state_save())
        held = {0: second, 1: third}
    else:
        context.state_load(other.state_save(0), 0)  # from where the other sequence was copied
        held = {0: second, 1: first}

    for seq, tokens in held.items():
        plain.memory.clear()
        plain.decode(tokens)
        for c, s in ((context, seq), (plain, 0)):
            c.decode([7], seq_id=s)
        np.testing.assert_allclose(context.logits, plain.logits, rtol=0, atol=ATOL)


@pytest.mark.parametrize("seq_id", [None, 0])
@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "streams"])
def test_a_state_keeps_a_shift_that_no_decode_has_applied(
    kv_unified: bool, seq_id: int | None, make_context: MakeContext
) -> None:
    params = STREAMS | {"kv_unified": kv_unified}
    first, second = make_context(**params), make_context(**params)
    first.decode(random_tokens(150), seq_id=0)
    first.memory.seq_rm(0, 10, 60)
    first.memory.seq_add(0, 60, 150, -50)  # hot and cold ones
    state = first.state_save(seq_id)
    second.state_load(state, seq_id)
    assert second.state_save(seq_id) == state
    assert second.memory.seq_pos_max(0) == 99
    for context in (first, second):
        context.decode([7])
    np.testing.assert_allclose(second.logits, first.logits, rtol=0, atol=ATOL)

    plain = make_context(**params | {"kv_mixed": False})  # upstream's own, whose rows have been shifted
    plain.decode(random_tokens(150))
    plain.memory.seq_rm(0, 10, 60)
    plain.memory.seq_add(0, 60, 150, -50)
    plain.decode([7])
    np.testing.assert_allclose(second.logits, plain.logits, rtol=0, atol=ATOL)


def test_the_state_of_another_cache_is_refused(make_context: MakeContext) -> None:
    shape = KVMixedParams(hot=64, group=16, sink=4)
    mixed, plain = make_context(kv_mixed=shape), make_context()
    for context in (mixed, plain):
        context.decode(random_tokens(150))
    with pytest.raises(ContextError, match="not the state of a mixed KV cache: it was saved without LLAMA_KV_MIXED"):
        mixed.state_load(plain.state_save())
    with pytest.raises(ContextError, match="can not be loaded"):
        plain.state_load(mixed.state_save())
    smaller = make_context(kv_mixed=KVMixedParams(hot=32, group=16, sink=4))
    with pytest.raises(ContextError, match="hot=32 has no room"):
        smaller.state_load(mixed.state_save())
    # all of them can still be used
    for context in (mixed, plain, smaller):
        context.memory.clear()
        context.decode(random_tokens(10))


def test_the_error_of_a_state_may_be_kept(tiny_model_path: Path) -> None:
    """An exception in a cycle, as frameworks make them, is freed by the garbage collector with all that it holds."""
    program = """
import gc, sys
from llamamix import Context, ContextError, Model
with Model(sys.argv[1]) as model, Context(model, n_ctx=256, n_threads=1, kv_mixed=False) as plain:
    plain.decode([5, 6, 7])
    with Context(model, n_ctx=256, n_threads=1) as mixed:
        for _ in range(20):
            try:
                mixed.state_load(plain.state_save())
            except ContextError as error:
                error.itself = error
            gc.collect()
"""
    env = environment(LLAMAMIX_LIB_PATH=str(library_dir()))
    command = [sys.executable, "-c", program, str(tiny_model_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")


#
# abort
#


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_an_aborted_decode(share: float, make_context: MakeContext) -> None:
    """Ubatches that were finished stay, the one that was not is gone, and decoding can go on."""
    params = F32 | {"n_ctx": 512, "n_ubatch": 32}
    shape = KVMixedParams(hot=64, group=16, sink=4, cold="f32")
    tokens = random_tokens(350)

    n_calls = 0

    def count() -> bool:
        nonlocal n_calls
        n_calls += 1
        return False

    context = make_context(kv_mixed=shape, **params)
    context.decode(tokens[:50])
    context.set_abort_callback(count)
    context.decode(tokens[50:300])
    assert n_calls > 100

    left = int(share * n_calls)

    def abort() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    context = make_context(kv_mixed=shape, **params)
    context.decode(tokens[:50])
    context.set_abort_callback(abort)
    with pytest.raises(DecodeAborted):
        context.decode(tokens[50:300])
    n = context.memory.seq_pos_max() + 1
    assert 50 <= n < 300
    assert (n - 50) % 32 == 0
    assert context.stats.hot_used + context.stats.cold_used == n
    context.set_abort_callback(None)
    context.decode(tokens[n:], logits="all")

    plain = make_context(**params)
    plain.decode(tokens[:n])
    plain.decode(tokens[n:], logits="all")
    np.testing.assert_allclose(context.logits, plain.logits, rtol=0, atol=ATOL)


#
# graphs
#


@pytest.mark.parametrize("flash_attn", ["off", "on"])
def test_graphs_are_reused(flash_attn: str, make_context: MakeContext) -> None:
    """A migration does not make the next graph another one; only views that grow by 256 cells do."""
    shape = KVMixedParams(hot=300, group=50, sink=4)
    context = make_context(n_ctx=2048, flash_attn=flash_attn, kv_mixed=shape)
    context.decode(random_tokens(700))
    context.perf_reset()
    before = context.stats
    for token in random_tokens(1000):
        context.decode([token])
    n_migrations = context.stats.n_migrations - before.n_migrations
    assert n_migrations == 20
    # The view of hot is 256 cells or all 300, and cells are taken in turn: it changes once or twice at first. That of
    # cold crosses 4 multiples of 256 on 1,000 cells, or 3. The first graph is new.
    n_built = context.perf.n_eval - context.perf.n_reused
    assert n_built <= 2 + 4 + 1


#
# threads
#


@pytest.mark.parametrize("attn", ["fused", "compose"])
@pytest.mark.parametrize("cold", ["f32", "q4_0"])
def test_two_threads_compute_the_same(cold: str, attn: str, make_context: MakeContext) -> None:
    """A prompt, single tokens and a shift, with migrations all along."""
    kv_mixed = KVMixedParams(hot=32, group=8, sink=2, cold=cold, attn=attn)
    one, two = (make_context(**F32, n_ubatch=16, kv_mixed=kv_mixed, n_threads=n, n_threads_batch=n) for n in (1, 2))
    assert (two.n_threads, two.n_threads_batch) == (2, 2)
    tokens = random_tokens(90)
    for context in (one, two):
        context.decode(tokens[:60])
        for token in tokens[60:70]:
            context.decode([token])
        context.memory.seq_rm(0, 10, 30)
        context.memory.seq_add(0, 30, -1, -20)
        context.decode(tokens[70:], logits="all")
        assert context.stats.n_migrations > 5
    np.testing.assert_array_equal(two.logits, one.logits)
