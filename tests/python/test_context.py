"""Contexts: sizes, states, what the cache is, and what can not be made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_model import random_tokens, write_tiny_model

from llamamix import Context, ContextError, ContextFullError, KVMixedParams, Model, ParamsError

MakeContext = Callable[..., Context]


#
# state
#


@pytest.mark.parametrize("kv_mixed", [False, "hot=64,group=16"])
def test_a_saved_state_goes_on(make_context: MakeContext, kv_mixed: object) -> None:
    context = make_context(kv_mixed=kv_mixed)
    context.decode(random_tokens(150))
    state = context.state_save()
    context.decode([5])
    expected = context.logits
    again = make_context(kv_mixed=kv_mixed)
    again.decode(random_tokens(70, 1))
    for target in (context, again):
        target.state_load(state)
        assert target.memory.seq_pos_max() == 149
        with pytest.raises(ContextError, match="nothing was decoded"):
            _ = target.logits
        target.decode([5])
        if kv_mixed:  # the cells are in another order, and flash attention adds up in F16
            np.testing.assert_allclose(target.logits, expected, atol=0.05)
        else:
            np.testing.assert_array_equal(target.logits, expected)


@pytest.mark.parametrize("kv_mixed", [False, "hot=64,group=16"])
def test_a_saved_sequence_can_become_another(make_context: MakeContext, kv_mixed: object) -> None:
    context = make_context(n_ctx=512, n_seq_max=2, kv_mixed=kv_mixed)
    context.decode(random_tokens(150), seq_id=0)
    context.decode(random_tokens(20, 1), seq_id=1)
    state = context.state_save(seq_id=0)
    context.decode([5], seq_id=0)
    expected = context.logits
    context.state_load(state, seq_id=1)
    assert context.memory.seq_pos_max(1) == 149
    context.decode([5], seq_id=1)
    np.testing.assert_allclose(context.logits, expected, atol=0.05)  # the cells are in another order


def test_bytes_that_are_no_state(make_context: MakeContext) -> None:
    context = make_context(n_seq_max=2, n_ctx=512)
    context.decode(random_tokens(30))
    whole, one = context.state_save(), context.state_save(0)
    rng = np.random.default_rng(0)
    for state in (whole, one):
        seq_id = None if state is whole else 0
        for i in [0, 8, 12, 16, 23, 24, 30, *rng.integers(24, len(state), 20)]:
            damaged = bytearray(state)
            damaged[i] ^= 0x40
            with pytest.raises(ContextError, match="saved state"):
                context.state_load(bytes(damaged), seq_id)
        for cut in (0, 1, 23, 24, len(state) - 1):
            with pytest.raises(ContextError, match="saved state"):
                context.state_load(state[:cut], seq_id)
    with pytest.raises(ContextError, match="of all sequences"):
        context.state_load(whole, 0)
    with pytest.raises(ContextError, match="of one sequence"):
        context.state_load(one)
    for bad in ("text", None, 5):
        with pytest.raises(ParamsError, match="bytes"):
            context.state_load(bad)
    with pytest.raises(ParamsError, match="seq_id"):
        context.state_load(one, 2)
    with pytest.raises(ParamsError, match="seq_id"):
        context.state_save(-1)
    assert context.memory.seq_pos_max() == 29


def test_a_state_that_another_context_can_not_hold(make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context(n_ctx=512)
    context.decode(random_tokens(400))
    state = context.state_save()
    with pytest.raises(ContextError, match="can not be loaded: not enough cells"):
        make_context(n_ctx=256).state_load(state)
    with pytest.raises(ContextError, match="can not be loaded"):
        make_context(n_ctx=512, type_k="f32").state_load(state)
    with pytest.raises(ContextError, match="can not be loaded"):
        make_context(n_ctx=512, kv_mixed="hot=64").state_load(state)
    with Model(write_tiny_model(tmp_path / "other.gguf", n_layer=1)) as model:
        other = make_context(model, n_ctx=512)
        with pytest.raises(ContextError, match="can not be loaded"):
            other.state_load(state)
        other.memory.clear()
        other.decode([5])
        assert np.isfinite(other.logits).all()


#
# the mixed KV cache
#


def test_mixed_is_the_default(tiny_model: Model) -> None:
    with Context(tiny_model, n_threads=1) as context:
        assert context.n_ctx == 4096
        params, stats = context.kv_mixed, context.stats
    assert params.spec() == KVMixedParams(hot=512, cold="iq4_nl", cold_size=4096 - 512).spec()
    assert (stats.hot_size, stats.cold_size, stats.type_hot_k, stats.type_cold_v) == (512, 3584, "f16", "iq4_nl")


@pytest.mark.parametrize("kv_mixed", [False, "off"])
def test_plain(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, kv_mixed: object) -> None:
    monkeypatch.setenv("LLAMA_KV_MIXED", "hot=64")  # has no say
    context = make_context(kv_mixed=kv_mixed)
    assert context.kv_mixed is None and context.stats is None


def test_stats(make_context: MakeContext) -> None:
    context = make_context(n_ctx=512, n_seq_max=2, kv_mixed="hot=64,group=16,cold_k=q8_0,cold_v=q4_0,sink=2")
    before = context.stats
    assert (before.n_stream, before.n_layer, before.hot_used, before.cold_used, before.n_migrations) == (2, 2, 0, 0, 0)
    # 256 cells per stream; a row of K or V has 2 heads of 64 elements
    assert (before.hot_size, before.cold_size) == (2 * 64, 2 * 192)
    assert before.bytes_hot == 2 * 64 * 2 * 2 * 128 * 2
    assert before.bytes_cold == 2 * 192 * 2 * (4 * 34 + 4 * 18) + 2 * 2 * 2 * 128 * 2  # and the means of two pages
    assert before.bytes_plain == 512 * 2 * 2 * 128 * 2
    assert before.bytes_total == before.bytes_hot + before.bytes_cold
    assert before.ratio == before.bytes_total / before.bytes_plain
    types = (before.type_hot_k, before.type_hot_v, before.type_cold_k, before.type_cold_v)
    assert types == ("f16", "f16", "q8_0", "q4_0")

    context.decode(random_tokens(150))
    after = context.stats
    assert after.hot_used + after.cold_used == 150
    assert after.cold_used == after.n_tokens_moved
    assert after.n_migrations * 16 >= after.n_tokens_moved >= 150 - 64
    assert after.hot_used <= 52  # 80 % of 64, rounded up
    assert after.t_migrate_us > 0


@pytest.mark.parametrize(
    ("n_ctx", "spec"), [(256, "1"), (1024, "1"), (512, "hot=500"), (512, "hot=100,cold_size=450,group=7")]
)
def test_cells_are_what_the_parameters_say(make_context: MakeContext, n_ctx: int, spec: str) -> None:
    stats = make_context(n_ctx=n_ctx, kv_mixed=spec).stats
    assert KVMixedParams.parse(spec).cells(n_ctx) == (stats.hot_size, stats.cold_size)


def test_a_full_mixed_cache(make_context: MakeContext) -> None:
    context = make_context(kv_mixed="hot=64,group=16", n_batch=32)
    context.decode(random_tokens(250))
    with pytest.raises(ContextFullError):
        context.decode(random_tokens(7))
    assert context.memory.seq_pos_max() == 249
    stats = context.stats
    assert stats.hot_used + stats.cold_used == 250


def test_contexts_that_can_not_be_made(tmp_path: Path, make_context: MakeContext) -> None:
    with pytest.raises(ContextError, match="cold_size"):
        make_context(kv_mixed="hot=32,cold_size=32")
    with pytest.raises(ContextError, match="flash_attn"):
        make_context(type_v="q4_0", flash_attn="off")
    with Model(write_tiny_model(tmp_path / "48.gguf", n_layer=1, head_size=48)) as model:
        for flash_attn in ("off", "auto"):
            with pytest.raises(ContextError, match="type_k=q4_0 .* 48"):
                make_context(model, type_k="q4_0", flash_attn=flash_attn)
        with pytest.raises(ContextError, match="head size 48"):
            make_context(model, kv_mixed=True)


def test_an_architecture_that_stores_v_transposed(tiny_model_path: Path, make_context: MakeContext) -> None:
    with Model(tiny_model_path) as model:
        model.__dict__["metadata"] = dict(model.metadata) | {"general.architecture": "plm"}
        for params in ({"flash_attn": "off", "kv_mixed": True}, {"flash_attn": "auto"}, {"flash_attn": "on"}):
            with pytest.raises(ContextError, match="plm needs flash_attn='off' and kv_mixed=False"):
                make_context(model, **params)
        make_context(model, flash_attn="off").decode([5])


#
# sizes, threads and times
#


def test_n_threads(make_context: MakeContext) -> None:
    context = make_context(n_threads=2, n_threads_batch=3)
    assert (context.n_threads, context.n_threads_batch) == (2, 3)
    context.set_n_threads(1)
    assert (context.n_threads, context.n_threads_batch) == (1, 1)
    context.set_n_threads(1, 2)
    assert (context.n_threads, context.n_threads_batch) == (1, 2)
    for bad in (0, -1, 513, 1.5, None):
        with pytest.raises(ParamsError):
            context.set_n_threads(bad)


def test_perf(make_context: MakeContext) -> None:
    context = make_context()
    assert (context.perf.n_p_eval, context.perf.n_eval, context.perf.eval_per_second) == (0, 0, 0.0)
    context.decode(random_tokens(50))
    for _ in range(3):
        context.decode([5])
    perf = context.perf
    assert (perf.n_p_eval, perf.n_eval) == (50, 3)
    assert perf.p_eval_per_second == pytest.approx(50e3 / perf.t_p_eval_ms)
    assert perf.eval_per_second == pytest.approx(3e3 / perf.t_eval_ms)
    context.perf_reset()
    assert (context.perf.n_p_eval, context.perf.n_eval) == (0, 0)


def test_sizes(make_context: MakeContext) -> None:
    context = make_context(n_ctx=1000, n_seq_max=2, n_batch=128, n_ubatch=64)
    assert (context.n_ctx, context.n_ctx_seq, context.n_seq_max) == (1024, 512, 2)
    assert (context.n_batch, context.n_ubatch) == (128, 64)
    shared = make_context(n_ctx=1000, n_seq_max=2, kv_unified=True)
    assert (shared.n_ctx, shared.n_ctx_seq) == (1024, 1024)
    trained = make_context(n_ctx=0)
    assert trained.n_ctx == 8192
