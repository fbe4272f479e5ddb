"""What programs do with sequences: context shift, a prefix used again, speculation, embeddings in place of tokens.

Where cold rows are stored as exactly as hot ones, upstream's plain cache is what to compare with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers import raw
from helpers.allowances import ATOL, F32, allowance, flips, rms
from helpers.gguf_copy import rewrite_gguf
from helpers.llama import Llama
from helpers.rows import Storage
from helpers.tiering import Tiering
from helpers.tiny_model import random_tokens, write_tiny_model

from llamamix import Context, ContextFullError, KVMixedParams, MixedKVCache, Model, ggml
from llamamix import _ffi as bindings

MakeContext = Callable[..., Context]

SHAPE = {"hot": 48, "group": 12, "sink": 4}


def mixed(**changes: Any) -> KVMixedParams:
    return KVMixedParams(**SHAPE | {"cold": "f32"} | changes)


#
# context shift
#


@pytest.mark.parametrize("attn", ["fused", "compose"])
@pytest.mark.parametrize("flash_attn", ["off", "on"])
def test_a_context_shift_in_f16(flash_attn: str, attn: str, make_context: MakeContext) -> None:
    """K rows are turned in F32 and stored in F16 again, by both caches; ranges straddle the border."""
    if (flash_attn, attn) == ("off", "fused"):
        pytest.skip("without flash attention the mask is F32, and so are weights: another comparison than upstream's")

    def run(kv_mixed: Any, flash_attn: str = flash_attn, **params: Any) -> np.ndarray:
        context = make_context(n_ctx=512, n_ubatch=64, flash_attn=flash_attn, kv_mixed=kv_mixed, **params)
        rows = []
        if params:  # free cells between the others, so that sums are taken in another order
            context.decode_batch(np.repeat(random_tokens(150), 2), [0, 1] * 150)
            context.memory.seq_rm(1)
        else:
            context.decode(random_tokens(150))
        context.memory.seq_rm(0, 4, 30)
        context.memory.seq_add(0, 30, 140, -26)  # hot from 108 on
        context.memory.seq_rm(0, 140, -1)
        context.decode(random_tokens(20, 1), logits="all")
        rows.append(context.logits)
        context.memory.seq_div(0, 60, 120, 2)
        context.memory.seq_rm(0, 60, -1)
        context.decode(random_tokens(40, 2), logits="all")
        rows.append(context.logits)
        if kv_mixed:
            assert context.stats.n_migrations > 3
        return np.concatenate(rows)

    expected = run(False)
    if flash_attn == "off":
        # the same cells in another order: what the order of sums is worth, see test_identity.py
        noise = run(False, n_seq_max=2, kv_unified=True) - expected
    else:
        # upstream's flash attention adds up V in F16, which is nearly all of its distance from none; the composed one
        # is the same with other partial sums, the fused one has no such error
        exact = run(False, flash_attn="off")
        noise = expected - exact
        expected = exact if attn == "fused" else expected
    actual = run(mixed(cold="f16", attn=attn))
    assert rms(actual - expected) < 2.5 * rms(noise)
    assert np.abs(actual - expected).max() < 6 * np.abs(noise).max()
    # a row that is turned by one position too many is far above that
    assert rms(noise) < 0.02


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_a_shift_leaves_rows_alone_that_do_not_move(unified: bool, make_context: MakeContext) -> None:
    """Free cells, those of tokens that stay before and behind, and other streams; quantised rows, which are not what they
    were when they are expanded, turned by nothing and quantised again."""
    context = make_context(n_ctx=512, n_seq_max=2, kv_unified=unified, kv_mixed=mixed(cold="q4_0"))
    context.decode(random_tokens(200), seq_id=0)
    context.decode(random_tokens(100, 1), seq_id=1)
    with MixedKVCache.from_context(context) as cache:
        free = [c.index for c in cache.cold.cells() if c.seq_ids == (0,) and 20 <= c.pos < 28]
        context.memory.seq_rm(0, 20, 28)
        # blocks as no quantisation makes them, without a largest value: they would not come back as they were
        block = np.frombuffer(np.float16(1).tobytes() + b"\x79" * 16, np.uint8)
        for i in free:
            cache.cold.set_k(1, i, ggml.Tensor("q4_0", (64, 2, 1), np.tile(block, 4).reshape(1, 2, 36)))

        def rows(tier: Any, stream: int) -> np.ndarray:
            return tier.get_k(1, stream).data.view(np.uint8).reshape(tier.n(stream), -1).copy()

        tiers = [(tier, stream) for tier in (cache.hot, cache.cold) for stream in range(cache.n_stream)]
        before = [rows(*which) for which in tiers]
        context.memory.seq_add(0, 100, 197, 1)
        context.memory.seq_add(0, 198, -1, 1)
        moved = [np.array([c.index for c in tier.cells(stream) if c.shift]) for tier, stream in tiers]
        used = [len(tier.cells(stream)) for tier, stream in tiers]
        context.decode([7], seq_id=1)
        for which, old, cells, n in zip(tiers, before, moved, used, strict=True):
            changed = np.flatnonzero((rows(*which) != old).any(axis=1))
            if len(cells) == 0:
                assert len(changed) <= 1  # the new token
            elif which[0] is cache.cold:
                assert set(cells) <= set(changed) <= set(range(cells.min(), cells.max() + 1))
                assert 0 < len(cells) < n and cells.min() > max(free)
            else:
                assert set(cells) <= set(changed) and len(changed) <= len(cells) + 1
    assert sum(map(len, moved)) == 99


#
# a prefix that is used again
#


def test_a_prefix_is_used_again(make_context: MakeContext) -> None:
    """As a server does it: the tail that differs is removed, deep in cold, and the new one decoded."""
    params = F32 | {"n_ctx": 1024, "n_ubatch": 64, "n_seq_max": 2, "kv_unified": True}
    context, plain = (make_context(kv_mixed=m, **params) for m in (mixed(), False))
    prefix = random_tokens(120)
    for c in (context, plain):
        c.decode([*prefix, *random_tokens(200, 1)], seq_id=0)
    assert context.stats.cold_used > 250
    for c in (context, plain):
        c.memory.seq_cp(0, 1, 0, 120)  # shared, all of it cold but for the sinks
        c.memory.seq_rm(0, 120, -1)
    assert (context.memory.seq_pos_max(0), context.memory.seq_pos_max(1)) == (119, 119)
    for i in range(3):
        for c in (context, plain):
            c.decode(random_tokens(70, 10 + i), seq_id=i % 2, logits="all")
        np.testing.assert_allclose(context.logits, plain.logits, rtol=0, atol=ATOL)
    # the prefix is stored once
    assert context.stats.hot_used + context.stats.cold_used == 120 + 3 * 70

    fresh = make_context(kv_mixed=False, **params)
    fresh.decode([*prefix, *random_tokens(70, 10), *random_tokens(70, 12), 7])
    context.decode([7], seq_id=0)
    np.testing.assert_allclose(context.logits, fresh.logits, rtol=0, atol=ATOL)


#
# speculation
#


class Speculation:
    """Greedy decoding of drafts of ``n_draft`` tokens, of which about a third are wrong from some place on."""

    def __init__(self, context: Context, twin: Tiering, prompt: np.ndarray, known: list[int], n_draft: int) -> None:
        self.context, self.twin = context, twin
        self.decoded: list[int] = []  # in the order of the twin's views
        self.rows: list[np.ndarray] = []
        self.kept: list[int] = []  # the view of each token that stayed
        self.n_rejected = 0
        self.cold: dict[int, list[int]] = {}

        self.decode(prompt[:-1])
        tokens = [int(t) for t in prompt]
        rng = np.random.default_rng(6)
        while len(tokens) < len(prompt) + len(known):
            at = len(tokens) - len(prompt)
            draft = list(known[at : at + n_draft])
            if rng.random() < 0.7:
                n = int(rng.integers(len(draft)))
                draft[n:] = rng.integers(3, 400, len(draft) - n).tolist()
            n_before = len(self.rows)
            self.decode(np.array([tokens[-1], *draft]))
            best = [int(row.argmax()) for row in self.rows[n_before:]]
            n_good = next((i for i, t in enumerate(draft) if t != best[i]), len(draft))
            tokens += [*draft[:n_good], best[n_good]]
            self.n_rejected += len(draft) - n_good
            end = len(tokens) - 1  # the last one is not in the cache yet
            self.kept += range(n_before, n_before + n_good + 1)
            context.memory.seq_rm(0, end, -1)
            twin.rm(0, end, -1)
            self.cold[end] = twin.positions(0)[1]
            assert context.stats.cold_used == len(self.cold[end])
            assert context.stats.hot_used + context.stats.cold_used == end
        self.tokens = tokens[len(prompt) : len(prompt) + len(known)]

    def decode(self, tokens: np.ndarray) -> None:
        pos = self.context.memory.seq_pos_max() + 1
        self.context.decode(tokens, logits="all")
        self.twin.decode(range(pos, pos + len(tokens)), [0] * len(tokens), self.context.n_ubatch)
        self.decoded += [int(t) for t in tokens]
        self.rows += list(self.context.logits)


@pytest.mark.parametrize(("cold", "n_draft"), [("f32", 3), ("f32", 8), ("f32", 30), ("q4_0", 8)])
def test_speculation(cold: str, n_draft: int, make_context: MakeContext, tmp_path: Path) -> None:
    """What was rejected leaves nothing behind; it only lets some tokens become cold a little earlier.

    So with exact cold rows the output is that without speculation. With Q4_0 it is that of the rows which are cold by
    then: those that are without it, but for fewer than a draft and a migration.
    """
    n_prompt, n_new = 60, 90
    path = write_tiny_model(tmp_path / "one.gguf", n_layer=1)
    with Model(path) as model:
        params = F32 | {"n_ctx": 512, "n_ubatch": 64, "kv_mixed": mixed(cold=cold, attn="compose")}
        prompt = random_tokens(n_prompt)

        context = make_context(model, **params)
        twin = Tiering(**SHAPE, cold=512 - 48)
        context.decode(prompt)
        twin.decode(range(n_prompt), [0] * n_prompt, 64)
        known, margins, cold_at = [], [], {}
        for i in range(n_new):
            row = context.logits[0]
            known.append(int(row.argmax()))
            margins.append(float(np.diff(np.sort(row)[-2:])[0]))
            context.decode(known[-1:])
            twin.decode([n_prompt + i], [0], 64)
            cold_at[n_prompt + i + 1] = twin.positions(0)[1]

        context = make_context(model, **params)
        s = Speculation(context, Tiering(**SHAPE, cold=512 - 48), prompt, known, n_draft)
        assert s.n_rejected > 20 and len(set(known)) > 10

        # Hot use stays between its threshold and that less a migration of n_move tokens. So it does with speculation,
        # less what is rejected; a batch migrates once when it is in place, so it is below n_hot - n_move in any case.
        assert SHAPE["hot"] - SHAPE["group"] <= int(0.8 * SHAPE["hot"])
        n_move = min(SHAPE["hot"] // 4, SHAPE["group"])
        for end, cold_positions in s.cold.items():
            if end in cold_at:
                without = set(cold_at[end])
                assert len(set(cold_positions) - without) < n_draft + n_move
                assert len(without - set(cold_positions)) < n_move

        # each row is what the tiers by then make of it
        opened = s.twin.opened if cold == "q4_0" else None
        storage = Storage(hot="f32", cold_k=cold, cold_v=cold)
        expected = Llama(path).logits(s.decoded, s.twin.views, storage, opened=opened)
        difference = np.stack(s.rows) - expected
        if cold == "f32":
            assert np.abs(difference).max() < ATOL
            # two logits are off by ATOL at most
            assert min(margins) > 2 * ATOL
            assert s.tokens == known
        else:
            exact = Llama(path).logits(s.decoded, s.twin.views, Storage(hot="f32", cold_k="f32", cold_v="f32"))
            bound = (flips(cold) + allowance("compose", cold)) * rms(expected - exact)
            assert rms(difference) < bound
            # and what is drawn from them is what they say, wherever they say it clearly
            rows, best = np.stack(s.rows), expected.argmax(axis=1)
            clear = np.diff(np.sort(expected, axis=1)[:, -2:])[:, 0] > 2 * np.abs(difference).max()
            assert clear.mean() > 0.9
            assert (rows.argmax(axis=1) == best)[clear].all()


def test_speculation_below_the_threshold_changes_nothing(make_context: MakeContext) -> None:
    """As long as drafts do not make hot pass its threshold, the same tokens are Q4_0 as without them."""
    shape = KVMixedParams(hot=100, group=10, sink=2, attn="compose")
    context, other = (make_context(**F32, n_ctx=512, kv_mixed=shape) for _ in range(2))
    for c in (context, other):
        c.decode(random_tokens(150))
        for token in random_tokens(2, 1):
            c.decode([token])
    assert context.stats.cold_used > 50 and context.stats.hot_used == 72
    for i in range(6):
        context.decode(random_tokens(8 - i, i))  # a draft, rejected as a whole
        context.memory.seq_rm(0, 152 + i, -1)
        token = random_tokens(1, 50 + i)
        context.decode(token)
        other.decode(token)
        assert context.stats.cold_used == other.stats.cold_used
        np.testing.assert_allclose(context.logits, other.logits, rtol=0, atol=ATOL)


#
# embeddings in place of tokens
#


def decode_embeddings(context: Context, rows: np.ndarray, pos: list[int]) -> tuple[int, np.ndarray]:
    """Decode input rows, as programs with images do; the return code and all logits.

    ``pos`` holds a position for each row; for models with several kinds of positions first all of one kind, then of the
    next.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    n = len(rows)
    ffi = raw.ffi
    keep = [
        ffi.from_buffer("float[]", rows),
        ffi.new("int32_t[]", pos),
        ffi.new("int32_t[]", [1] * n),
        ffi.new("int32_t[1]", [0]),
    ]
    keep.append(ffi.new("int32_t *[]", [keep[3]] * n))
    keep.append(ffi.new("int8_t[]", [1] * n))
    batch = ffi.new("llama_batch *", [n, ffi.NULL, keep[0], keep[1], keep[2], keep[4], keep[5]])[0]
    with raw.pointer(context) as ctx:
        code = raw.lib.llama_decode(ctx, batch)
        if code != 0:
            return code, np.empty((0, 400), np.float32)
        out = np.frombuffer(ffi.buffer(raw.lib.llama_get_logits(ctx), 4 * n * 400), np.float32)
        return code, out.reshape(n, 400).copy()


@pytest.mark.parametrize("cold", ["f16", "q4_0"])
def test_embeddings_as_input(cold: str, tiny_model_path: Path, make_context: MakeContext) -> None:
    """The rows of the tokens' embeddings give what the tokens give, bit by bit, through migrations and a state."""
    weights = {t.name: t.data for t in gguf.GGUFReader(tiny_model_path).tensors}["token_embd.weight"]
    tokens = random_tokens(150)
    context, other = (make_context(n_ctx=512, n_ubatch=32, kv_mixed=mixed(cold=cold)) for _ in range(2))
    for start, end in ((0, 20), (20, 120), (120, 121), (121, 150)):
        other.decode(tokens[start:end], logits="all")
        code, logits = decode_embeddings(context, weights[tokens[start:end]], list(range(start, end)))
        assert code == 0
        np.testing.assert_array_equal(logits, other.logits)
        context.state_load(context.state_save())
    assert context.stats.cold_used > 90
    # refused as a whole when it does not fit
    before = raw.state_get(context)
    code, _ = decode_embeddings(context, weights[random_tokens(363)], list(range(150, 513)))
    assert code == 1 and raw.state_get(context) == before


@pytest.mark.parametrize("first", [0, 3])
def test_an_image_at_the_position_of_a_sink(first: int, tmp_path: Path, make_context: MakeContext) -> None:
    """All its tokens have the same position (M-RoPE), and are more than hot has cells: no more than 4 are pinned."""
    llama = write_tiny_model(tmp_path / "llama.gguf", n_embd=256)
    sections = {"rope.dimension_sections": [16, 8, 8, 0]}
    path = rewrite_gguf(llama, tmp_path / "qwen2vl.gguf", arch="qwen2vl", extra=sections)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((12 * 25, 256)).astype(np.float32)
    y, x = (first + i.ravel() for i in np.mgrid[:12, :25])
    pos = np.concatenate([np.full(300, first), y, x, np.zeros(300)]).astype(int).tolist()
    with Model(path) as model:
        logits = []
        for kv_mixed in (mixed(hot=128, group=32), False):
            params = F32 | {"n_ctx": 1024, "n_ubatch": 64, "n_seq_max": 2, "kv_unified": True}
            context = make_context(model, kv_mixed=kv_mixed, **params)
            if first > 0:
                context.decode(random_tokens(first))
            code, image = decode_embeddings(context, rows, pos)
            assert code == 0
            context.decode(random_tokens(200, 1), pos=first + 25, logits="all")
            logits.append(np.concatenate([image, context.logits]))
            context.decode(random_tokens(200, 2), seq_id=1)  # another sequence's sinks have room as well
            if kv_mixed:
                used = context.stats
                assert used.hot_used + used.cold_used == first + 300 + 200 + 200
                hot = MixedKVCache.from_context(context).hot.cells()
                for seq, end in ((0, first + 225), (1, 200)):
                    mine = sorted(c.pos for c in hot if seq in c.seq_ids)
                    assert len(mine) > 4 and mine[-1] == end - 1
                    assert mine[:4] == (sorted([*range(first), *[first] * 4])[:4] if seq == 0 else [0, 1, 2, 3])
                    assert mine[4] > 50  # what is not pinned has gone
            context.close()
        np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=ATOL)


#
# embeddings as output
#


POOLING = {"n_ctx": 2048, "n_ubatch": 600, "embeddings": True}


@pytest.mark.parametrize("pooling", ["none", "mean", "cls", "last"])
def test_embeddings_as_output(pooling: str, make_context: MakeContext, caplog: pytest.LogCaptureFixture) -> None:
    """Hot grows where a ubatch must not be split: 600 tokens and 4 sinks, in multiples of 256."""
    tokens = random_tokens(600)
    caplog.set_level(logging.WARNING, "llamamix")

    def embed(kv_mixed: Any) -> np.ndarray:
        context = make_context(kv_mixed=kv_mixed, pooling=pooling, **F32 | POOLING)
        context.decode(random_tokens(300, 1), seq_id=0)  # of another text
        context.memory.clear()
        context.decode(tokens)
        if kv_mixed:
            grown = pooling in ("mean", "cls")
            assert (context.stats.hot_size, context.kv_mixed.hot) == ((768, 768) if grown else (48, 48))
            assert context.stats.cold_size == 2048 - context.stats.hot_size
            reason = f"a batch whose embeddings are pooled ({pooling}) has to fit in it as a whole, and n_ubatch is 600"
            assert (f"hot=48 grows to 768 cells: {reason}" in caplog.text) == grown
        return context.embeddings if pooling == "none" else context.embeddings_seq(0)

    # embeddings have unit size, logits are 3 times as large
    np.testing.assert_allclose(embed(mixed()), embed(False), rtol=0, atol=ATOL)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooled_embeddings_of_several_sequences(pooling: str, unified: bool, make_context: MakeContext) -> None:
    """Of different length, together more than hot can take: each of them is pooled as if it were alone."""
    lengths = [200, 31, 200, 77, 200]
    tokens = [random_tokens(n, i) for i, n in enumerate(lengths)]
    params = F32 | {"n_ctx": 2048 * (1 if unified else 5), "n_ubatch": 210, "n_seq_max": 5, "kv_unified": unified}
    params |= {"embeddings": True, "pooling": pooling}
    context = make_context(kv_mixed=mixed(), **params)
    assert context.stats.hot_size // context.stats.n_stream == 256  # 210 tokens, 5 * 4 sinks or 4
    assert raw.decode_sequences(context, tokens) == 0
    plain = make_context(**F32 | {"n_ctx": 256, "n_ubatch": 256, "embeddings": True, "pooling": pooling})
    for seq, part in enumerate(tokens):
        plain.memory.clear()
        plain.decode(part)
        np.testing.assert_allclose(raw.pooled(context, seq), raw.pooled(plain, 0), rtol=0, atol=ATOL)


def test_a_sequence_that_is_pooled_is_not_cut(make_context: MakeContext) -> None:
    """Longer than n_ubatch, or of more tokens than hot has room for: refused, and nothing has changed."""
    params = F32 | {"n_ctx": 1024, "n_ubatch": 64, "pooling": "mean"}
    context = make_context(kv_mixed=mixed(), embeddings=True, **params)
    context.decode(random_tokens(30))
    before = raw.state_get(context)
    assert raw.decode_sequences(context, [random_tokens(65)], first=30) == 1
    assert raw.state_get(context) == before

    # embeddings are switched on later: hot could not grow
    context, plain = (make_context(kv_mixed=m, **params) for m in (mixed(), False))
    assert context.stats.hot_size == 48
    for c in (context, plain):
        c.decode(random_tokens(100))
        with raw.pointer(c) as ctx:
            raw.lib.llama_set_embeddings(ctx, True)
    before = raw.state_get(context)
    reason = r"whose embeddings are pooled \(mean\) has to fit in hot as a whole: 60 tokens, and hot=48 has room for 44"
    with pytest.raises(ContextFullError, match=f"{reason}; set hot=256") as error:
        context.decode(random_tokens(60), logits="all")
    assert error.value.code == 1 and raw.state_get(context) == before
    for c in (context, plain):
        assert raw.decode_sequences(c, [random_tokens(44, 1)], first=100) == 0
    np.testing.assert_allclose(raw.pooled(context, 0), raw.pooled(plain, 0), rtol=0, atol=ATOL)


def test_no_causal_mask(make_context: MakeContext) -> None:
    """Tokens that all see each other are one ubatch: it fits in hot, or is refused with nothing changed."""
    context, plain = (make_context(kv_mixed=m, **F32 | {"n_ctx": 512}) for m in (mixed(), False))
    tokens = random_tokens(100)
    rows = []
    for c in (context, plain):
        c.decode(tokens[:60])
        with raw.pointer(c) as ctx:
            raw.lib.llama_set_causal_attn(ctx, False)
        c.decode(tokens[60:90], logits="all")
        rows.append(c.logits)
    np.testing.assert_allclose(rows[0], rows[1], rtol=0, atol=ATOL)
    before = raw.state_get(context)
    reason = "a batch without causal attention, where its tokens see each other, has to fit in hot as a whole"
    with pytest.raises(ContextFullError, match=f"{reason}: 49 tokens, and hot=48 has room for 44; set hot=256"):
        context.decode(random_tokens(49))
    assert raw.state_get(context) == before


#
# what it takes
#


@pytest.mark.parametrize(
    ("kv_mixed", "unified", "types"),
    [
        (KVMixedParams(hot=64), True, ("f16", "f16")),
        (KVMixedParams(hot=512, cold_k="q8_0", cold_v="q5_1"), False, ("bf16", "f32")),
        (KVMixedParams(hot=100, cold="f16", cold_size=1500), True, ("f16", "f16")),
    ],
)
def test_memory_is_counted(
    kv_mixed: KVMixedParams, unified: bool, types: tuple[str, str], tiny_model_path: Path, make_context: MakeContext
) -> None:
    """Hot and cold are what libllama counts as the context's, also where it only measures (-fit) and allocates nothing."""
    params = {"n_ctx": 1536, "n_seq_max": 3, "kv_unified": unified, "type_k": types[0], "type_v": types[1]}
    context = make_context(kv_mixed=kv_mixed, **params)
    stats = context.stats
    with raw.pointer(context) as ctx:
        counted = raw.memory_breakdown(ctx)
    if counted is None:
        pytest.skip("no way to read a std::map here")
    size = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q5_1": 24 / 32, "q4_0": 18 / 32, "iq4_nl": 18 / 32}
    n_hot, n_cold = stats.hot_size, stats.cold_size
    cold_types = (kv_mixed.type_cold_k, kv_mixed.type_cold_v)
    # two layers with two heads of 64
    expected = 2 * 128 * sum(n_hot * size[h] + n_cold * size[c] for h, c in zip(types, cold_types, strict=True))
    if kv_mixed.has_means:
        expected += 2 * 2 * 128 * -(-n_cold // 128)
    assert counted[0] == expected == stats.bytes_hot + stats.bytes_cold

    lib, ffi = bindings.lib, bindings.ffi
    model_params = lib.llama_model_default_params()
    model_params.no_alloc = True
    model_params.load_mode = 0
    model = lib.llama_model_load_from_file(str(tiny_model_path).encode(), model_params)
    measured = lib.llama_kv_mixed_init_from_model(model, context.params.to_c(1), kv_mixed.to_c())
    assert measured != ffi.NULL
    assert raw.memory_breakdown(raw.ffi.cast("void *", int(ffi.cast("uintptr_t", measured)))) == counted
    lib.llama_free(measured)
    lib.llama_model_free(model)
