"""Decodes that fail, at any place and for any reason: what the call says, what is left, and how it goes on.

A cache that never saw the failure gives the same logits. Cold rows are F32 like hot ones, so the order of sums is all
that differs, see test_migration.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import raw
from helpers.allowances import ATOL, F32
from helpers.paths import ROOT
from helpers.processes import environment, library_dir
from helpers.tiny_model import random_tokens, write_tiny_model

from llamamix import Context, ContextError, ContextFullError, DecodeAborted, KVMixedParams, MixedKVCache, Trace
from llamamix.trace import EventKind

MakeContext = Callable[..., Context]

SHAPE = {"hot": 40, "group": 10, "sink": 3, "cold": "f32"}


def params(**changes: Any) -> dict[str, Any]:
    return F32 | {"n_ctx": 512, "n_ubatch": 16, "kv_mixed": KVMixedParams(**SHAPE)} | changes


def tokens_once(context: Context, n_seq: int = 1) -> dict[int, list[int]]:
    """Positions of each sequence, all of them once, and what is cold older than what is hot."""
    cache = MixedKVCache.from_context(context)
    found: dict[int, list[int]] = {}
    for seq in range(n_seq):
        stream = seq if cache.n_stream > 1 else 0
        hot, cold = (sorted(c.pos for c in t.cells(stream) if seq in c.seq_ids) for t in (cache.hot, cache.cold))
        found[seq] = sorted(hot + cold)
        assert len(set(found[seq])) == len(found[seq])
        movable = [p for p in hot if p >= SHAPE["sink"]]
        assert not cold or not movable or max(cold) < min(movable)
    assert cache.hot.used <= cache.hot.size * cache.n_stream and cache.cold.used <= cache.cold.size * cache.n_stream
    cache.close()
    return found


class AbortAt:
    """An abort callback that says yes from its n-th call on."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.n_calls = 0

    def __call__(self) -> bool:
        self.n_calls += 1
        self.left -= 1
        return self.left < 0


#
# abort
#


@pytest.mark.parametrize("attn", ["fused", "compose"])
def test_an_abort_at_any_node(attn: str, make_context: MakeContext) -> None:
    """During a shift that was pending, during any ubatch, and after migrations; every 7th call of the callback."""
    shape = KVMixedParams(**SHAPE, attn=attn)
    first, rest, last = random_tokens(90), random_tokens(70, 1), random_tokens(30, 2)

    def begin(**changes: Any) -> Context:
        context = make_context(**params(kv_mixed=shape) | changes)
        context.decode(first)
        return context

    def shift(context: Context) -> None:
        context.memory.seq_rm(0, 10, 50)
        context.memory.seq_add(0, 50, -1, -40)

    counting = AbortAt(10**9)
    context = begin()
    start = context.state_save()
    shift(context)
    context.set_abort_callback(counting)
    context.decode(rest)
    n_calls = counting.n_calls
    assert n_calls > 150  # 5 ubatches

    plain = {}
    n_left = set()
    for at in range(0, n_calls, 7):
        context.set_abort_callback(None)
        context.state_load(start)
        shift(context)
        context.set_abort_callback(AbortAt(at))
        with pytest.raises(DecodeAborted) as error:
            context.decode(rest)
        assert error.value.code == 2
        n = context.memory.seq_pos_max() - 49  # of the rest
        n_left.add(n)
        assert tokens_once(context)[0] == list(range(50 + n)) and n % 16 == 0
        context.set_abort_callback(None)
        context.decode(rest[n:])
        context.decode(last, logits="all")
        if n not in plain:
            never = begin(kv_mixed=False)
            shift(never)
            never.decode(rest[:n]) if n else None
            never.decode(rest[n:])
            never.decode(last, logits="all")
            plain[n] = never.logits
        np.testing.assert_allclose(context.logits, plain[n], rtol=0, atol=ATOL)
    assert n_left == {0, 16, 32, 48, 64}


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_an_abort_with_several_sequences(unified: bool, make_context: MakeContext) -> None:
    """The ubatch that was not finished is gone from all of them, shared tokens as well."""
    options = params(n_ctx=1024, n_seq_max=2, kv_unified=unified)
    seqs: list[Any] = [0, 1] * 40 if not unified else [(0, 1)] * 40
    tokens = random_tokens(len(seqs))
    counting = AbortAt(10**9)
    context = make_context(**options)
    context.set_abort_callback(counting)
    context.decode_batch(tokens, seqs)
    for share in (0.1, 0.45, 0.7, 0.95):
        context.set_abort_callback(None)
        context.memory.clear()
        context.set_abort_callback(AbortAt(int(share * counting.n_calls)))
        with pytest.raises(DecodeAborted):
            context.decode_batch(tokens, seqs)
        found = tokens_once(context, 2)
        n = len(found[0])
        assert found == {0: list(range(n)), 1: list(range(n))} and n < 40
        assert context.stats.hot_used + context.stats.cold_used == (n if unified else 2 * n)
        context.set_abort_callback(None)
        done = n if unified else 2 * n
        context.decode_batch(tokens[done:], seqs[done:], logits="all")
        plain = make_context(**options | {"kv_mixed": False})
        plain.decode_batch(tokens, seqs, logits=np.arange(len(seqs)) >= done)
        np.testing.assert_allclose(context.logits, plain.logits, rtol=0, atol=ATOL)


#
# shifts that fail
#


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("cold", ["f32", "q4_0"])
def test_a_shift_that_fails_after_any_layer(cold: str, unified: bool, make_context: MakeContext) -> None:
    """llama_decode() returns -2, what is left can be saved as if nothing had been tried, and the next decode goes on as
    one that never failed does, bit for bit."""
    options = params(n_ctx=1024, n_seq_max=2, kv_unified=unified, kv_mixed=KVMixedParams(**SHAPE | {"cold": cold}))
    context, twin = make_context(**options), make_context(**options)
    for c in (context, twin):
        c.decode(random_tokens(90), seq_id=0)
        c.decode(random_tokens(80, 1), seq_id=1)
    start = context.state_save()
    expected: list[np.ndarray] = []
    # 2 layers, in hot and cold: of one stream, or of both
    n_layers = 4 if unified else 8
    for n in range(n_layers):
        for c in (context, twin) if n == 0 else (context,):
            c.state_load(start)
            for seq in (0, 1):
                c.memory.seq_rm(seq, 10, 50)
                c.memory.seq_add(seq, 50, -1, -40)
        before = tokens_once(context, 2)
        raw.fail_shift(context, n)
        with pytest.raises(ContextError, match="failed to compute K-shift") as error:
            context.decode(random_tokens(30, 2), seq_id=0)
        assert error.value.code == -2
        assert tokens_once(context, 2) == before == {0: list(range(50)), 1: list(range(40))}
        if n == 0:
            assert context.state_save() == twin.state_save()
            for seq in (0, 1):
                twin.decode(random_tokens(30, 2), seq_id=seq, logits="all")
                expected.append(twin.logits)
            after = twin.state_save()
        for seq in (0, 1):
            context.decode(random_tokens(30, 2), seq_id=seq, logits="all")
            np.testing.assert_array_equal(context.logits, expected[seq])
        assert context.state_save() == after
    # that there is no more to fail
    raw.fail_shift(context, n_layers)
    context.state_load(start)
    context.memory.seq_add(0, 20, -1, 1)
    context.memory.seq_add(1, 20, -1, 1)
    context.decode([7], seq_id=0)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_what_comes_between_a_shift_that_fails_and_the_next(unified: bool, make_context: MakeContext) -> None:
    """Tokens are removed, shifted again, copied, moved to cold, saved and loaded: rows and positions belong together."""
    options = params(n_ctx=1024, n_seq_max=2, kv_unified=unified)
    text = random_tokens(90)

    def between(context: Context, what: str) -> int:
        """Returns the sequence that goes on."""
        memory = context.memory
        if what == "removed":
            memory.seq_rm(0, 20, 30)
            memory.seq_rm(0, 45, -1)
        elif what == "shifted again":
            memory.seq_add(0, 30, -1, 13)
        elif what == "copied":
            memory.seq_cp(0, 1)
            memory.seq_rm(0)
            return 1
        elif what == "moved" and context.kv_mixed:
            with MixedKVCache.from_context(context) as cache:
                assert cache.move_tokens_to_cold_cache(20) == 20
        elif what == "saved" and context.kv_mixed:
            state = context.state_save(0)
            memory.clear()
            context.decode(random_tokens(60, 5), seq_id=1)
            context.state_load(state, 0)
        elif what == "cleared":
            memory.clear()
            context.decode(text[:40], seq_id=0)
        return 0

    for what in ("removed", "shifted again", "copied", "moved", "saved", "cleared"):
        plain = make_context(**options | {"kv_mixed": False})
        others = [make_context(**options) for _ in range(4)]  # 2 layers, in hot and cold
        for context in (plain, *others):
            context.decode(text, seq_id=0)
            context.memory.seq_rm(0, 10, 50)
            context.memory.seq_add(0, 50, -1, -40)
        seq = between(plain, what)
        plain.decode(random_tokens(30, 2), seq_id=seq, logits="all")
        for n, context in enumerate(others):
            raw.fail_shift(context, n)
            with pytest.raises(ContextError):
                context.decode([7], seq_id=0)
            assert between(context, what) == seq
            context.decode(random_tokens(30, 2), seq_id=seq, logits="all")
            np.testing.assert_allclose(context.logits, plain.logits, rtol=0, atol=ATOL, err_msg=f"{what} {n}")


#
# copies that fail
#


def test_a_copy_for_the_threshold_that_fails(make_context: MakeContext) -> None:
    """Tokens stay hot, and the next decode tries again."""
    context, other, plain = (
        make_context(**params(kv_mixed=m)) for m in (KVMixedParams(**SHAPE), KVMixedParams(**SHAPE), False)
    )
    tokens = random_tokens(60)
    for c in (context, other, plain):
        c.decode(tokens[:16])
        c.decode(tokens[16:32])
    assert context.stats.n_migrations == 0 and context.stats.hot_used == 32
    raw.fail_moves(context, 2)
    for i in range(32, 60):
        for c in (context, other, plain):
            c.decode(tokens[i : i + 1])
        np.testing.assert_allclose(context.logits, plain.logits, rtol=0, atol=ATOL)
        assert tokens_once(context)[0] == list(range(i + 1))
        n_moved = 10 * (1 + (i - 32) // 10)  # token 32 is over the threshold, and so is every tenth after it
        moved = [c.stats.n_tokens_moved for c in (context, other)]
        assert moved == [0 if i < 34 else n_moved, n_moved]
    assert 0 < context.stats.n_migrations and context.stats.cold_used == other.stats.cold_used


def test_a_copy_for_room_that_fails(make_context: MakeContext) -> None:
    """llama_decode() returns -3: the ubatches before stay, that one is gone, and decoding goes on."""
    context, plain = (make_context(**params(kv_mixed=m)) for m in (KVMixedParams(**SHAPE), False))
    tokens = random_tokens(150)
    context.decode(tokens[:40])
    before = context.stats
    # each ubatch of 16 needs room: the first copy fails, and all others of that ubatch
    raw.fail_moves(context, 1000)
    with pytest.raises(ContextError) as error:
        context.decode(tokens[40:120])
    assert error.value.code == -3
    n = context.memory.seq_pos_max() + 1
    assert tokens_once(context)[0] == list(range(n)) and 40 <= n < 60
    assert context.stats.n_migrations == before.n_migrations
    raw.fail_moves(context, 0)
    context.decode(tokens[n:120])
    context.decode(tokens[120:], logits="all")
    plain.decode(tokens[:120])
    plain.decode(tokens[120:], logits="all")
    np.testing.assert_allclose(context.logits, plain.logits, rtol=0, atol=ATOL)


def test_a_failed_copy_leaves_a_record(make_context: MakeContext) -> None:
    context = make_context(**params())
    context.decode(random_tokens(32))
    raw.fail_moves(context, 1)
    cache = MixedKVCache.from_context(context)
    with Trace(context) as trace:
        assert cache.move_tokens_to_cold_cache(5) == 0 and cache.cold.used == 0
        assert cache.move_tokens_to_cold_cache(5) == 5
        events = [e for e in trace.read() if e.kind in (EventKind.FAIL, EventKind.MIGRATE)]
    assert [(e.kind, e.n_tokens, e.pos_min, e.pos_max) for e in events] == [
        (EventKind.FAIL, 5, 3, 7),
        (EventKind.MIGRATE, 5, 3, 7),
    ]
    assert sorted(c.pos for c in cache.cold.cells()) == [3, 4, 5, 6, 7]


def test_a_sequence_is_not_loaded_when_others_can_not_make_way(make_context: MakeContext) -> None:
    options = params(n_seq_max=2, kv_unified=True)
    context = make_context(**options)
    context.decode(random_tokens(30), seq_id=0)
    state = context.state_save(0)
    context.memory.clear()
    context.decode(random_tokens(32, 1), seq_id=1)
    raw.fail_moves(context, 1000)
    with pytest.raises(ContextError, match="failed to copy 10 tokens from hot to cold, they stay hot"):
        context.state_load(state, 0)
    assert tokens_once(context, 2) == {0: [], 1: list(range(32))}
    raw.fail_moves(context, 0)
    context.state_load(state, 0)
    assert tokens_once(context, 2) == {0: list(range(30)), 1: list(range(32))}


#
# full in the midst of it
#


def test_cold_that_fills_up_in_a_batch(make_context: MakeContext) -> None:
    """A batch of many ubatches of which the last does not fit is refused before the first is computed."""
    options = params(n_ctx=256, n_seq_max=2, kv_unified=True)
    context, plain = (make_context(**options | {"kv_mixed": m}) for m in (KVMixedParams(**SHAPE), False))
    for c in (context, plain):
        c.decode(random_tokens(100), seq_id=0)
    before = raw.state_get(context)
    counting = AbortAt(10**9)
    context.set_abort_callback(counting)
    with pytest.raises(ContextFullError) as error:
        context.decode(random_tokens(157, 1), seq_id=1)
    assert error.value.code == 1 and counting.n_calls == 0
    assert raw.state_get(context) == before
    for c in (context, plain):
        c.decode(random_tokens(156, 1), seq_id=1, logits="all")
    np.testing.assert_allclose(context.logits, plain.logits, rtol=0, atol=ATOL)
    tokens_once(context, 2)


#
# memory
#

PROGRAM = """
import resource, sys
import numpy as np
from llamamix import Context, KVMixedParams, Model

def limit(more):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))

def attempt(make):
    try:
        return make()
    except Exception as error:
        print(type(error).__name__, error, getattr(error, "code", ""))

model = Model(sys.argv[1])
params = {"n_threads": 1, "n_ubatch": 64}

# a shift: the K rows of a layer in cold as F32, 16 KB each
wide = Model(sys.argv[2])
shifted, other = (Context(wide, n_ctx=4096, kv_mixed=KVMixedParams(hot=64), **params) for _ in range(2))
for context in (shifted, other):
    context.decode(np.arange(2048) % 300 + 5)
    context.memory.seq_rm(0, 10, 60)
    context.memory.seq_add(0, 60, -1, -50)
state = shifted.state_save()
limit(16 << 20)
attempt(lambda: shifted.decode([7]))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(shifted.state_save() == state)
for context in (shifted, other):
    context.decode([7])
print("same" if np.array_equal(shifted.logits, other.logits) else "other")
shifted.close()
other.close()

small = Context(model, n_ctx=512, kv_mixed=KVMixedParams(hot=64), **params)
tokens = np.arange(200) % 300 + 5
small.decode(tokens)
before = small.logits
# hot does not fit, then cold
limit(200 << 20)
attempt(lambda: Context(model, n_ctx=2**20, kv_mixed=KVMixedParams(hot=2**19), **params))
attempt(lambda: Context(model, n_ctx=2**21, kv_mixed=KVMixedParams(hot=512), **params))
# memory for outputs: 200,000 rows of 400 logits
limit(64 << 20)
attempt(lambda: Context(model, n_ctx=2**16, kv_mixed=KVMixedParams(hot=64), n_batch=2**16, **params).decode(
    np.resize(tokens, 60000), logits="all"))
# what was there goes on
small.memory.clear()
small.decode(tokens)
print("same" if np.array_equal(small.logits, before) else "other")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an address space that can be limited")
@pytest.mark.skipif("LLAMAMIX_TEST_SANITIZER" in os.environ, reason="sanitizers take the address space")
def test_memory_runs_out(tiny_model_path: Path, tmp_path: Path) -> None:
    wide = write_tiny_model(tmp_path / "wide.gguf", n_layer=1, n_head=64, n_head_kv=64)
    env = environment(LLAMAMIX_LIB_PATH=str(library_dir()), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", PROGRAM, str(tiny_model_path), str(wide)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    shift, kept, after, hot, cold, outputs, last = result.stdout.splitlines()
    assert shift.startswith("ContextError 1 tokens can not be decoded: ") and shift.endswith(" -2")
    assert (kept, after) == ("True", "same")
    for line in (hot, cold):
        assert (
            line.startswith("ContextError The context can not be created: ")
            and "insufficient memory (attempted to allocate" in line
        )
    assert outputs.startswith(("ContextError 60000 tokens can not be decoded", "MemoryError"))
    assert last == "same"
