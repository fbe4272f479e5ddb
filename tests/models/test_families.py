"""Models whose layers do not all attend to the whole context: sliding windows (iSWA), recurrent layers (hybrid).

Hot and cold are for the layers that do. With cold rows stored as exactly as hot ones the logits are those of a plain
cache, as in test_identity.py, which says how close they must be and why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import raw
from helpers.allowances import STEP, rms
from helpers.families import WRITE

from llamamix import (
    Context,
    ContextError,
    ContextFullError,
    ContextParams,
    DecodeAborted,
    KVMixedParams,
    MixedKVCache,
    Model,
    ParamsError,
)
from llamamix.cli import main

N_PROMPT, N_TOKENS = 1000, 1100
N_CTX = 1280
TOKENS = np.random.default_rng(0).integers(3, 400, 3 * N_TOKENS)

MARGIN = 6.0  # of the largest difference, as in test_identity.py

EXACT = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
HOT = {"hot": 128, "group": 32, "sink": 4, "cold": "f32"}

FAMILIES = ("iswa", "shared", "hybrid")
N_LAYER_MIXED = {"iswa": 1, "shared": 2, "hybrid": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    folder = tmp_path_factory.mktemp("models")
    loaded = {family: Model(write(folder / f"{family}.gguf")) for family, write in WRITE.items()}
    yield loaded
    for model in loaded.values():
        model.close()


@pytest.fixture
def make(models: dict[str, Model]) -> Iterator[Callable[..., Context]]:
    """Makes contexts of a family: a small cache of sliding windows, mixed unless asked otherwise."""
    contexts = []

    def make(family: str, kv_mixed: Any = None, **params: Any) -> Context:
        kv_mixed = KVMixedParams(**HOT) if kv_mixed is None else kv_mixed
        params = EXACT | {"n_ctx": N_CTX, "n_ubatch": 256, "n_threads": 1, "swa_full": False} | params
        contexts.append(Context(models[family], kv_mixed=kv_mixed, **params))
        return contexts[-1]

    yield make
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def noise(models: dict[str, Model]) -> Callable[[str], float]:
    """The largest difference of a plain cache from itself with its cells in another order."""

    def run(family: str, shuffle: bool) -> np.ndarray:
        # (where windows have a small cache upstream can lose rows when another sequence comes and goes)
        params = EXACT | {"n_ctx": N_CTX, "n_threads": 1, "n_seq_max": 2, "kv_unified": True, "swa_full": True}
        with Context(models[family], kv_mixed=False, **params) as context:
            rows = []
            for start in range(0, N_PROMPT, 100):
                if shuffle:  # free cells in the midst of others, which later tokens take
                    context.decode(TOKENS[:20], seq_id=1)
                context.decode(TOKENS[start : start + 100], logits="all")
                rows.append(context.logits)
                if shuffle:
                    context.memory.seq_rm(1)
            return np.concatenate(rows)

    @cache
    def measure(family: str) -> float:
        return float(np.abs(run(family, True) - run(family, False)).max())

    return measure


def decode_all(context: Context, n_seq: int = 1) -> np.ndarray:
    """A prompt in calls that end anywhere, then token by token; the sequences side by side."""
    ends = [0, 100, 101, 433, 700, N_PROMPT, *range(N_PROMPT + 1, N_TOKENS + 1)]
    rows = []
    for start, end in zip(ends, ends[1:], strict=False):
        seqs = np.tile(np.arange(n_seq), end - start)
        tokens = np.stack([TOKENS[s * N_TOKENS :][start:end] for s in range(n_seq)], axis=1).ravel()
        pos = np.repeat(np.arange(start, end), n_seq)
        context.decode_batch(tokens, seqs.tolist(), pos=pos.tolist(), logits="all")
        rows.append(context.logits)
    return np.concatenate(rows)


def assert_close(actual: np.ndarray, expected: np.ndarray, noise: float) -> None:
    assert 0 < noise < 4e-4  # what F32 sums allow, see test_identity.py
    difference = float(np.abs(actual - expected).max())
    assert difference <= MARGIN * noise, f"{difference:.2e} exceeds {MARGIN * noise:.2e}"


#
# identity
#


@pytest.mark.parametrize("attn", ["compose", "fused"])
@pytest.mark.parametrize(("n_seq", "unified"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_identity(family: str, n_seq: int, unified: bool, attn: str, make: Callable, noise: Callable) -> None:
    params = {"n_ctx": n_seq * N_CTX, "n_seq_max": n_seq, "kv_unified": unified}
    expected = decode_all(make(family, False, **params), n_seq)
    context = make(family, KVMixedParams(**HOT, attn=attn), **params)
    actual = decode_all(context, n_seq)
    stats = context.stats
    assert stats.n_layer == N_LAYER_MIXED[family]
    assert stats.n_migrations > 20 and stats.hot_used + stats.cold_used == n_seq * N_TOKENS
    assert stats.n_tokens_moved == stats.cold_used
    assert expected.std() > 1
    assert_close(actual, expected, noise(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_lost_row_would_show(family: str, make: Callable, noise: Callable) -> None:
    context = make(family)
    expected = decode_all(context)
    damaged = make(family)
    damaged.decode(TOKENS[:N_PROMPT])
    with MixedKVCache.from_context(damaged) as kv:
        cold = kv.cold
        cell = next(cell for cell in cold.cells() if cell.pos == 500)
        for layer in {"iswa": (3,), "shared": (1, 3), "hybrid": (0, 2)}[family]:
            cold.set_v(layer, cell.index, np.zeros((cold.n_head_kv, cold.head_size_v), np.float32))
    rows = []
    for token in TOKENS[N_PROMPT:N_TOKENS]:
        damaged.decode([token])
        rows.append(damaged.logits)
    assert np.abs(np.concatenate(rows) - expected[N_PROMPT:]).max() > 2 * MARGIN * noise(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_cold(family: str, make: Callable) -> None:
    """The rounding of cold rows is all that is lost."""
    expected = decode_all(make(family, False))
    error = {
        cold: rms(decode_all(make(family, KVMixedParams(**HOT | {"cold": cold}))) - expected)
        for cold in ("f16", "q8_0", "q4_0")
    }
    # rounding is off by step / sqrt(12), and all that follows is nearly linear in that
    assert error["f16"] < error["q8_0"] == pytest.approx(error["q4_0"] * STEP["q8_0"] / STEP["q4_0"], rel=0.25)
    # upstream's cache has all rows in that type
    uniform = decode_all(make(family, False, type_k="q4_0", type_v="q4_0", flash_attn="on"))
    assert error["q4_0"] < rms(uniform - expected)


#
# batches
#


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_that_does_not_fit(family: str, make: Callable, noise: Callable) -> None:
    """It is refused as a whole, once, and nothing changes."""
    params = {"n_ctx": 512, "n_seq_max": 2, "kv_unified": True}
    context, other = make(family, **params), make(family, **params)
    for c in (context, other):
        c.decode(TOKENS[:300])
        c.decode(TOKENS[:100], seq_id=1)
    before = context.stats
    with pytest.raises(ContextFullError):
        context.decode(TOKENS[100:300], seq_id=1)
    after = context.stats
    assert after.n_refused == before.n_refused + 1
    assert (after.hot_used, after.cold_used, after.n_migrations) == (before.hot_used, before.cold_used, before.n_migrations)
    assert [context.memory.seq_pos_max(s) for s in (0, 1)] == [299, 99]
    for c in (context, other):
        c.decode(TOKENS[300:412], logits="all")  # to the last cell
    assert context.logits.tobytes() == other.logits.tobytes()
    assert context.stats.hot_used + context.stats.cold_used == 512
    with pytest.raises(ContextFullError):
        context.decode(TOKENS[:1], seq_id=1)


def test_tokens_that_are_not_split_until_the_cache_is_full(
    make: Callable, noise: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where recurrent states are kept to go back to, the last tokens of a sequence stay in one ubatch."""
    to_c = ContextParams.to_c

    def with_states_kept(params: ContextParams, n_threads: int) -> Any:
        res = to_c(params, n_threads)
        res.n_rs_seq = 8
        return res

    contexts = [make("hybrid", n_ctx=512)]
    monkeypatch.setattr(ContextParams, "to_c", with_states_kept)
    contexts.append(make("hybrid", n_ctx=512))
    logits = []
    for context in contexts:
        context.decode(TOKENS[:505])
        with pytest.raises(ContextFullError):
            context.decode(TOKENS[505:513])
        context.decode(TOKENS[505:512], logits="all")
        logits.append(context.logits)
        assert context.stats.hot_used + context.stats.cold_used == 512
        with pytest.raises(ContextFullError):
            context.decode(TOKENS[:1])
    assert_close(*logits, noise("hybrid"))


def test_an_aborted_batch(make: Callable, noise: Callable) -> None:
    """What was computed before stays, in the windows' cache as well as in hot and cold."""
    context = make("iswa", n_ubatch=64)
    calls: list[int] = []
    context.set_abort_callback(lambda: calls.append(1) or len(calls) > 900)
    with pytest.raises(DecodeAborted):
        context.decode(TOKENS[:N_PROMPT])
    context.set_abort_callback(None)
    n = context.memory.seq_pos_max() + 1
    assert 0 < n < N_PROMPT and n % 64 == 0
    assert context.stats.hot_used + context.stats.cold_used == n
    context.decode(TOKENS[n:N_PROMPT], logits="all")
    plain = make("iswa", False)
    plain.decode(TOKENS[:N_PROMPT], logits="all")
    assert_close(context.logits, plain.logits[n:], noise("iswa"))


def test_an_abort_leaves_no_shift_half_done(make: Callable, noise: Callable) -> None:
    """Wherever it comes: the layers with a sliding window are shifted as the others are, whole."""
    context, plain = (make("iswa", kv, swa_full=True) for kv in (None, False))

    def shift(c: Context) -> None:
        c.memory.clear()
        c.decode(TOKENS[:300])
        c.memory.seq_rm(0, 10, 110)
        c.memory.seq_add(0, 110, -1, -100)

    shift(plain)
    plain.decode(TOKENS[300:310], logits="all")
    for at in range(0, 40, 3):
        context.set_abort_callback(None)
        shift(context)
        calls: list[int] = []
        context.set_abort_callback(lambda calls=calls, at=at: calls.append(1) or len(calls) > at)
        with pytest.raises(DecodeAborted):
            context.decode(TOKENS[300:310])
        context.set_abort_callback(None)
        assert context.memory.seq_pos_max() == 199
        context.decode(TOKENS[300:310], logits="all")
        assert_close(context.logits, plain.logits, noise("iswa"))


@pytest.mark.parametrize("family", ("iswa", "hybrid"))
def test_a_shift_that_fails_is_tried_again(family: str, make: Callable) -> None:
    """After any number of layers, in the part that is mixed or the other one; no token is decoded before it is done."""
    n_layers = {"iswa": 2 * 1 + 3, "hybrid": 2 * 2}[family]  # hot and cold, and those with a sliding window
    context, twin = (make(family, swa_full=True, n_seq_max=2, kv_unified=True) for _ in range(2))
    expected = b""
    for n in range(n_layers):
        for c in (context, twin) if n == 0 else (context,):
            c.memory.clear()
            c.decode(TOKENS[:300])
            c.memory.seq_rm(0, 10, 110) if family == "iswa" else None
            c.memory.seq_add(0, 110, -1, -100 if family == "iswa" else 50)
        end = context.memory.seq_pos_max()
        raw.fail_shift(context, n)
        with pytest.raises(ContextError, match="failed to compute K-shift") as error:
            context.decode(TOKENS[300:310])
        assert error.value.code == -2 and context.memory.seq_pos_max() == end
        for c in (context, twin) if n == 0 else (context,):
            c.decode(TOKENS[300:310], logits="all")
        expected = expected or twin.state_save()
        np.testing.assert_array_equal(context.logits, twin.logits)
        assert context.state_save() == expected


def test_graphs_are_reused(make: Callable) -> None:
    context = make("iswa")
    context.decode(TOKENS[:300])
    context.perf_reset()
    for token in TOKENS[300:350]:
        context.decode([token])
    assert context.perf.n_reused > 25  # but when the cells in view become 256 more, and when tokens move


def test_a_graph_for_another_border_is_not_reused(make: Callable, noise: Callable) -> None:
    """As many cells in view, more of them cold: the mask has the size that it had before."""
    params = KVMixedParams(**HOT | {"hot": 512, "threshold": 1.0, "group": 128})
    plain, mixed = make("iswa", False, swa_full=True), make("iswa", params, swa_full=True)
    for context in (plain, mixed):
        context.decode(TOKENS[:600])
    with MixedKVCache.from_context(mixed) as kv:

        def view() -> list[int]:
            return [-(-max((c.index + 1 for c in tier.cells()), default=0) // 256) * 256 for tier in (kv.cold, kv.hot)]

        def step(token: int) -> None:
            for context in (plain, mixed):
                context.decode([token])
            assert_close(mixed.logits, plain.logits, noise("iswa"))

        step(TOKENS[600])
        step(TOKENS[601])
        assert view() == [256, 512]
        for cell in kv.hot.cells():
            if cell.index >= 200:
                for context in (plain, mixed):
                    context.memory.seq_rm(0, cell.pos, cell.pos + 1)
        kv.move_tokens_to_cold_cache(140)
        assert view() == [512, 256]
        step(TOKENS[602])


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("kv_mixed", [False, KVMixedParams(hot=256)])
def test_pooled_sequences_of_a_hybrid(kv_mixed: Any, unified: bool, make: Callable, noise: Callable) -> None:
    """Where there are recurrent layers a ubatch is one sequence, so that lengths do not matter, but shared tokens do."""
    params = {"n_seq_max": 3, "kv_unified": unified, "embeddings": True, "kv_mixed": kv_mixed}
    parts = [TOKENS[:40], TOKENS[40:65], TOKENS[65:135]]
    each = []
    for part in parts:
        context = make("hybrid", pooling="none", embeddings=True, kv_mixed=False)
        context.decode(part)
        each.append(context.embeddings)
    context = make("hybrid", pooling="mean", **params)
    seq_ids = np.repeat(range(3), [len(part) for part in parts])
    context.decode_batch(np.concatenate(parts), seq_ids)
    for seq_id, expected in enumerate(each):
        # embeddings are a third of logits, and so is what the order of sums does to them
        np.testing.assert_allclose(context.embeddings_seq(seq_id), expected.mean(0), rtol=0, atol=MARGIN * noise("hybrid"))
    context.memory.clear()
    with pytest.raises(ParamsError, match="share a part of their tokens can not be one ubatch each"):
        context.decode_batch(TOKENS[:3], [(0, 1), 0, 1])
    assert context.memory.seq_pos_max(0) == -1


#
# sequences
#


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_operations_on_sequences(family: str, unified: bool, make: Callable, noise: Callable) -> None:
    """The same as with a plain cache, step by step."""
    params = {"n_ctx": 2 * N_CTX, "n_seq_max": 2, "kv_unified": unified, "swa_full": True}
    plain, mixed = make(family, False, **params), make(family, **params)

    def both(step: Callable[[Context], Any]) -> None:
        results = [step(context) for context in (plain, mixed)]
        assert results[0] == results[1]
        for seq in (0, 1):
            for function in ("seq_pos_min", "seq_pos_max"):
                assert len({getattr(context.memory, function)(seq) for context in (plain, mixed)}) == 1

    def decode(seq: int, start: int, end: int) -> None:
        both(lambda c: c.decode(TOKENS[start:end], seq_id=seq, logits="all"))
        assert_close(mixed.logits, plain.logits, noise(family))

    decode(0, 0, 500)
    both(lambda c: c.memory.seq_cp(0, 1))
    decode(1, 500, 700)
    decode(0, 700, 900)
    assert mixed.stats.n_migrations > 10

    def remove_tail(context: Context) -> bool:
        try:
            context.memory.seq_rm(0, 600)
        except ContextError:
            return False
        return True

    both(remove_tail)
    assert mixed.memory.seq_pos_max(0) == (699 if family == "hybrid" else 599)  # a recurrent state has no way back
    decode(0, 900, 1000)
    assert mixed.memory.can_shift and plain.memory.can_shift
    both(lambda c: c.memory.seq_rm(0, 10, 110))
    both(lambda c: c.memory.seq_add(0, 110, -1, -100))
    decode(0, 1000, 1050)
    both(lambda c: c.memory.seq_keep(1))
    decode(1, 1050, 1100)
    both(lambda c: c.memory.clear())
    assert mixed.stats.hot_used == mixed.stats.cold_used == 0
    decode(1, 0, 300)


def test_positions_can_be_moved_where_upstream_allows_it(make: Callable) -> None:
    for swa_full in (False, True):
        plain, mixed = (make("iswa", kv, swa_full=swa_full) for kv in (False, None))
        assert mixed.memory.can_shift == plain.memory.can_shift == swa_full
    assert make("hybrid").memory.can_shift


#
# state
#


@pytest.mark.parametrize("seq", [None, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_state(family: str, seq: int | None, make: Callable, noise: Callable) -> None:
    params = {"n_ctx": 2 * N_CTX, "n_seq_max": 2}
    context, restored, later = (make(family, **params) for _ in range(3))
    for c in (context, later):
        c.decode(TOKENS[:50], seq_id=0)
        c.decode(TOKENS[:700], seq_id=1)
    restored.decode(TOKENS[300:400], seq_id=1)  # is replaced
    restored.state_load(context.state_save(seq), seq)
    stats = restored.stats
    assert stats.cold_used > 500 and stats.hot_used + stats.cold_used == (750 if seq is None else 700)
    assert restored.memory.seq_pos_max(1) == 699
    for c in (restored, later):
        c.decode(TOKENS[700:800], seq_id=1, logits="all")
    assert_close(restored.logits, later.logits, noise(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_of_the_other_kind(family: str, make: Callable) -> None:
    plain, mixed = make(family, False), make(family)
    for context in (plain, mixed):
        context.decode(TOKENS[:300])
    for seq in (None, 0):
        with pytest.raises(ContextError, match="not the state of a mixed KV cache"):
            make(family).state_load(plain.state_save(seq), seq)
        with pytest.raises(ContextError, match="can not be loaded"):
            make(family, False).state_load(mixed.state_save(seq), seq)


@pytest.mark.parametrize("seq", [None, 0], ids=["all", "one"])
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("flash_attn", ["on", "off"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_a_state_changes_nothing(
    family: str, flash_attn: str, unified: bool, seq: int | None, make: Callable, tmp_path: Path
) -> None:
    """One that ends too early, in whatever part of the memory; from memory and from a file, beyond whose end libllama's
    reader finds whatever there was before."""
    params: dict[str, Any] = {"n_seq_max": 2, "kv_unified": unified, "n_ctx": 2 * N_CTX, "swa_full": True}
    params |= {"type_k": "f16", "type_v": "f16", "flash_attn": flash_attn}
    source, target, twin = (make(family, **params) for _ in range(3))
    source.decode(TOKENS[:400], seq_id=0)
    source.decode(TOKENS[:20], seq_id=1)
    for c in (target, twin):
        c.decode(TOKENS[500:800], seq_id=0)
        c.decode(TOKENS[400:600], seq_id=1)
        c.memory.seq_rm(0, 290, -1) if family != "hybrid" else None
    state = raw.state_get(source, seq)
    before = raw.state_get(target)
    path = tmp_path / "state"

    def load(n: int) -> int:
        with raw.pointer(target) as ctx:
            if seq is None:
                raw.lib.llama_state_save_file(ctx, str(path).encode(), raw.ffi.new("int32_t[1]"), 1)
                head = path.read_bytes()[:16]
                path.write_bytes(head + state[:n])
                return raw.lib.llama_state_load_file(
                    ctx, str(path).encode(), raw.ffi.new("int32_t[1]"), 1, raw.ffi.new("size_t *")
                )
            raw.lib.llama_state_seq_save_file(ctx, str(path).encode(), seq, raw.ffi.NULL, 0)
            head = path.read_bytes()[:12]
            path.write_bytes(head + state[8:n])
            return raw.lib.llama_state_seq_load_file(
                ctx, str(path).encode(), seq, raw.ffi.new("int32_t[1]"), 1, raw.ffi.new("size_t *")
            )

    shares = np.linspace(0.05, 0.999, 12) * len(state)
    for n in [100, *shares.astype(int), *(len(state) - n for n in (1, 9, 100, 1000))]:
        assert raw.state_set(target, state[:n], seq)[0] == 0
        assert raw.state_get(target) == before
        assert not load(n)
        assert raw.state_get(target) == before
    for s in (0, 1):
        for c in (target, twin):
            c.decode(TOKENS[1000:1050], seq_id=s, logits="all")
        np.testing.assert_array_equal(target.logits, twin.logits)
    assert raw.state_set(target, state, seq)[0] == len(state)
    assert load(len(state))


@pytest.mark.parametrize("seq", [None, 0], ids=["all", "one"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bit_anywhere_in_a_state_counts(family: str, seq: int | None, make: Callable) -> None:
    """In the part of upstream's making, too."""
    context = make(family, n_seq_max=2, kv_unified=True)
    context.decode(TOKENS[:300])
    state, before = raw.state_get(context, seq), raw.state_get(context)
    rng = np.random.default_rng(5)
    first = 40 if seq is None else 8  # libllama's own header
    places = [*rng.integers(first, len(state), 40), *rng.integers(len(state) - 3000, len(state), 20)]
    for i in places:
        bad = bytearray(state)
        bad[i] ^= 1 << int(rng.integers(8))
        assert raw.state_set(context, bytes(bad), seq)[0] == 0
        assert raw.state_get(context) == before
    assert raw.state_set(context, state, seq)[0] == len(state)


@pytest.mark.parametrize("seq", [None, 0], ids=["all", "one"])
def test_a_shift_that_is_pending_is_saved(seq: int | None, make: Callable, noise: Callable) -> None:
    """Of layers with a sliding window as well: upstream leaves it out."""
    source, restored = (make("iswa", swa_full=True) for _ in range(2))
    source.decode(TOKENS[:300])
    source.memory.seq_rm(0, 10, 50)
    source.memory.seq_add(0, 50, -1, -40)
    restored.state_load(source.state_save(seq), seq)
    for c in (source, restored):
        c.decode(TOKENS[300:350], logits="all")
    assert_close(restored.logits, source.logits, noise("iswa"))


#
# what is reported
#


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes(family: str, make: Callable) -> None:
    """Hot and cold are those of the mixed layers, what the rest takes is named."""
    params = {"type_k": "f16", "type_v": "f16", "flash_attn": "on", "n_ctx": 4096}
    context = make(family, KVMixedParams(), **params)
    stats = context.stats
    head_size = 64 if family == "shared" else 32
    elements = N_LAYER_MIXED[family] * 2 * 2 * head_size  # of a token: K and V, 2 heads
    assert stats.bytes_hot == 512 * elements * 2
    means = (4096 - 512) // 128 * elements // 2 * 2  # of K, a page of 128 cells
    assert stats.bytes_cold == (4096 - 512) * elements // 32 * 18 + means
    assert stats.bytes_plain == 4096 * elements * 2
    # layers of a window and a ubatch, a multiple of 256, with K and V of 2 heads of 32; 2 layers with a state of two rows
    # of 128 F32
    swa = 512 * 2 * 2 * 32 * 2
    assert stats.bytes_rest == {"iswa": 3 * swa, "shared": 2 * swa, "hybrid": 2 * 2 * 128 * 4}[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_info(family: str, models: dict[str, Model], make: Callable, capsys: pytest.CaptureFixture) -> None:
    """What 'llamamix info' says a cache takes, without the weights, is what it takes."""
    spec = "hot=256,cold=q8_0"
    assert main(["info", str(models[family].path), "-c", "2048", "-o", "json", "--kv-mixed", spec]) == 0
    records = json.loads(capsys.readouterr().out)
    params = {"type_k": "f16", "type_v": "f16", "flash_attn": "on", "n_ctx": 2048, "n_ubatch": 512}
    stats = make(family, spec, **params).stats
    rest = 0 if family == "hybrid" else stats.bytes_rest  # recurrent states are no KV cache
    assert records[0]["bytes_per_token"] * 2048 == stats.bytes_plain
    assert records[0]["bytes"] == stats.bytes_plain + rest
    assert records[-1]["bytes"] == stats.bytes_total + rest
    assert (rest > 0) == (family != "hybrid")


@pytest.mark.parametrize("family", ("iswa", "shared"))
@pytest.mark.parametrize("n_ubatch", (64, 256))
def test_bytes_in_a_benchmark(
    family: str, n_ubatch: int, models: dict[str, Model], make: Callable, capsys: pytest.CaptureFixture
) -> None:
    """The cache of sliding windows is as large as a ubatch makes it."""
    flags = ["-p", "8", "-n", "0", "-d", "1024", "-r", "1", "-t", "1", "-ctk", "f16", "--kv-mixed", "hot=256"]
    assert main(["bench", "-m", str(models[family].path), *flags, "-ub", str(n_ubatch), "-o", "json"]) == 0
    plain, mixed = json.loads(capsys.readouterr().out)
    params = {"type_k": "f16", "type_v": "f16", "flash_attn": "on", "n_ctx": 1032, "n_ubatch": n_ubatch}
    stats = make(family, "hot=256", **params).stats
    assert plain["kv_bytes"] == stats.bytes_plain + stats.bytes_rest
    assert mixed["kv_bytes"] == stats.bytes_total + stats.bytes_rest


def test_the_cache_of_a_context(make: Callable) -> None:
    context = make("iswa")
    context.decode(TOKENS[:300])
    with MixedKVCache.from_context(context) as kv:
        assert len(kv.hot.cells()) + len(kv.cold.cells()) == 300
        assert kv.hot.get_k(3).data.any() and kv.params == context.kv_mixed and kv.stats == context.stats
        kv.seq_rm(0, 200)  # the windows' cache is the same memory
        assert context.memory.seq_pos_max() == kv.seq_pos_max() == 199
        assert len(kv.hot.cells()) + len(kv.cold.cells()) == 200
        context.decode(TOKENS[200:210])


#
# a real model
#


@pytest.fixture(scope="module")
def gemma3(gemma3_path: Path) -> Iterator[Model]:
    with Model(gemma3_path) as model:
        yield model


def test_gemma3(gemma3: Model, botchan_path: Path) -> None:
    """Far beyond its window of 512 tokens the same text follows, token by token, in far less memory."""
    n_prompt, n_new = 800, 30
    tokens = gemma3.tokenize(botchan_path.read_text(encoding="utf-8")[:12_000])[:n_prompt]
    assert len(tokens) == n_prompt and gemma3.n_swa == 512
    params = {"n_ctx": 1024, "n_threads": 1, "swa_full": False, "flash_attn": "off"}

    def run(
        kv_mixed: Any, force: list[int] | None = None, shuffle: bool = False, **more: Any
    ) -> tuple[list[int], np.ndarray, Any]:
        more |= {"n_seq_max": 2, "kv_unified": True, "swa_full": True} if shuffle else {}
        with Context(gemma3, kv_mixed=kv_mixed, **params | more) as context:
            if shuffle:
                context.decode(tokens[:300])
                context.decode(tokens[:100], seq_id=1)
                context.decode(tokens[300:600])
                context.memory.seq_rm(1)
            context.decode(tokens[600 if shuffle else 0 :])
            new: list[int] = []
            rows = []
            for i in range(n_new):
                rows.append(context.logits[-1])
                new.append(int(rows[-1].argmax()))
                context.decode([new[-1] if force is None else force[i]])
            return new, np.array(rows), context.stats

    expected, plain, _ = run(False)
    assert all(word.isascii() for word in gemma3.detokenize(expected).split())  # it goes on in English

    # Activations are rounded to 8 bits in every product with these weights, which makes any difference a large one. How
    # large: a plain cache with its cells in another order, given the same tokens. The root mean square is that of 8
    # million differences of the same kind; of the 30 tokens they are not independent, hence the factor of test_identity.py.
    _, other, _ = run(False, expected, shuffle=True)
    noise = rms(other - plain)
    _, exact, stats = run(KVMixedParams(hot=256, group=32, cold="f16", attn="compose"), expected)
    assert stats.n_layer == 3 and stats.n_migrations > 10 and stats.hot_used + stats.cold_used == n_prompt + n_new
    assert 0 < noise < 0.1 * plain.std()  # else it would not tell much
    assert rms(exact - plain) <= 2.5 * noise
    # the most likely token is another one only where two are as good as equally likely: both logits may be off
    largest = float(np.abs(exact - plain).max())
    top2 = np.sort(plain, axis=1)[:, -2:]
    differs = exact.argmax(axis=1) != plain.argmax(axis=1)
    assert not (differs & (top2[:, 1] - top2[:, 0] > 2 * largest)).any()
    # noise of rms r swaps two whose distance is below about r, as few as the top two are that close in a plain run
    assert differs.mean() <= (top2[:, 1] - top2[:, 0] < 4 * noise).mean() + 2 / n_new

    # with the defaults less is lost than with upstream's cache of as many bits
    _, q4, stats = run(KVMixedParams(), expected)
    _, uniform, _ = run(False, expected, type_k="q4_0", type_v="q4_0", flash_attn="on")
    assert rms(q4 - plain) < rms(uniform - plain)
    # K and V of 3 layers with one head of 256: F16 and IQ4_NL, and the means of K in 4 pages
    assert stats.bytes_hot == 3 * 2 * 512 * 512 and stats.bytes_cold == 3 * 2 * (1024 - 512) * 144 + 3 * 4 * 512
    assert stats.bytes_rest == 15 * 2 * 1024 * 512  # a window of 512 and a ubatch of 512, F16


#
# pooled embeddings
#


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("family", ["iswa", "hybrid"])
def test_pooled_embeddings(family: str, pooling: str, make: Callable[..., Context]) -> None:
    """Hot grows to a ubatch: 600 tokens are pooled as a whole, beside windows and recurrent layers too."""

    def embed(kv_mixed: Any) -> np.ndarray:
        context = make(family, kv_mixed, n_ubatch=600, embeddings=True, pooling=pooling)
        if kv_mixed is None:
            assert (context.stats.hot_size, context.stats.cold_size) == (768, N_CTX - 768)
        context.decode(TOKENS[:600])
        return context.embeddings_seq(0)

    expected = embed(False)
    # two kernels for the same values, in F32: the order of sums, which moves logits of twice the size by less than 4e-4
    np.testing.assert_allclose(embed(None), expected, rtol=0, atol=4e-4)
    assert np.abs(expected).max() > 0.05  # of what is pooled over the last tokens alone the difference is as large


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_pooled_embeddings_of_sequences_beside_windows(unified: bool, make: Callable[..., Context]) -> None:
    """Of different length, and together longer than a ubatch: one ubatch for each of them."""
    lengths = [150, 40, 256, 99]
    parts = [TOKENS[300 * i :][:n] for i, n in enumerate(lengths)]
    params = {"embeddings": True, "pooling": "mean", "n_seq_max": 4, "kv_unified": unified, "n_ubatch": 256}
    context = make("iswa", n_ctx=N_CTX * (1 if unified else 4), **params)
    assert raw.decode_sequences(context, parts) == 0
    plain = make("iswa", False, embeddings=True, pooling="mean")
    for seq, tokens in enumerate(parts):
        plain.memory.clear()
        plain.decode(tokens)
        np.testing.assert_allclose(raw.pooled(context, seq), plain.embeddings_seq(0), rtol=0, atol=4e-4)
