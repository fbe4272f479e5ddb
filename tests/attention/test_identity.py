"""With cold rows stored as exactly as hot ones, a mixed cache is a plain cache.

The rows are the same, only their order differs, and with it the order in which floating point sums are taken. How much
that matters is measured where no mixed cache is involved: a plain cache against itself with its cells in another order.
The mixed cache may differ from the plain one by MARGIN times that. Both are taken over some 800,000 differences of the
same kind, so chance sets neither their root mean squares nor their largest values apart by such factors; a single row
that is lost, doubled or stale is far above them (test_one_lost_row_would_show).

The composed attention computes with the plain cache's operations. The fused one has a kernel of its own, which rounds
to F32 alone. With F32 rows so does the plain cache's, and the same holds. With F16 rows upstream has two kernels that
round more, each in its own way, and the fused one may be no farther from the better of them than the other is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.gguf_copy import rewrite_gguf
from helpers.tiny_model import write_tiny_model

from llamamix import CacheStats, Context, KVMixedParams, Model

MARGIN = np.array([6.0, 2.5])  # of the largest difference and of the root mean square

N_PROMPT, N_TOKENS = 1900, 2100
N_CTX = 2304
TOKENS = np.random.default_rng(0).integers(3, 400, N_TOKENS)

# exact: everything in F32, sums are the only thing that differs
# f16:   softmax weights are rounded to F16 before they are multiplied with V, one of 2,000 differently
# flash: ggml's flash attention adds up V in F16 and in the order of the cells
NUMERICS: dict[str, dict[str, Any]] = {
    "exact": {"type_k": "f32", "type_v": "f32", "flash_attn": "off"},
    "f16": {"type_k": "f16", "type_v": "f16", "flash_attn": "off"},
    "flash": {"type_k": "f16", "type_v": "f16", "flash_attn": "on"},
}

# A sum of n F32 terms of mixed signs is off by about sqrt(n) * 2**-24 of its size, here 2.7e-6; two layers of it,
# sharpened by queries of twice unit size, stay under 10 times that, and the largest of 800,000 normal errors is 5
# standard deviations from 0: 10 * 5 * 2.7e-6 * 3 = 4e-4 for logits with a standard deviation of 3. What is measured
# must stay under it.
EXACT_NOISE_MAX = 4e-4


# how a mixed cache's attention is computed with each of them; flash and fused: the mask is in F16, and all else in F32
KERNELS = [("exact", "compose"), ("exact", "fused"), ("f16", "compose"), ("flash", "compose"), ("flash", "fused")]


def mixed(numerics: str, attn: str, **params: Any) -> KVMixedParams:
    """A mixed cache whose cold rows have the type of the hot ones."""
    kv_type = NUMERICS[numerics]["type_k"]
    return KVMixedParams(**{"hot": 128, "group": 32, "sink": 4, "cold": kv_type, "attn": attn} | params)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def size(x: np.ndarray) -> np.ndarray:
    """Largest and root mean square."""
    return np.array([np.abs(x).max(), rms(x)])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Model]]:
    """Tiny models with F32 weights by what is special about them."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def get(name: str) -> Model:
        path = folder / f"{name}.gguf"
        if name == "alibi":
            rewrite_gguf(write_tiny_model(folder / "llama.gguf"), path, arch="refact")
        else:
            write_tiny_model(path, **MODELS[name])
        loaded.append(Model(path))
        return loaded[-1]

    loaded: list[Model] = []
    yield get
    for model in loaded:
        model.close()


MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa": {"n_head": 8, "n_head_kv": 1},
    "mha-128": {"n_head": 2, "n_head_kv": 2, "head_size": 128},
    "head-80": {"head_size": 80},
    "v-larger": {"arch": "minicpm3", "n_head": 2, "head_size": 64, "head_size_v": 128},
    "v-smaller": {"arch": "minicpm3", "n_head": 2, "head_size": 64, "head_size_v": 32},
    "alibi": {},
}


@pytest.fixture(scope="module")
def plain(models: Callable[[str], Model]) -> Callable[..., np.ndarray]:
    """Logits of the plain cache for a prompt in one batch and then token by token."""

    @cache
    def run(model: str, numerics: str) -> np.ndarray:
        with Context(models(model), n_ctx=N_CTX, n_threads=1, kv_mixed=False, **NUMERICS[numerics]) as context:
            return decode_all(context)

    return run


@pytest.fixture(scope="module")
def noise(models: Callable[[str], Model], plain: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Largest and root mean square difference of a plain cache from itself with its cells in another order."""

    @cache
    def measure(model: str, numerics: str) -> np.ndarray:
        params = NUMERICS[numerics] | {"n_seq_max": 2, "kv_unified": True, "kv_mixed": False, "n_ubatch": 200}
        with Context(models(model), n_ctx=N_CTX, n_threads=1, **params) as context:
            rows = []

            def decode(start: int, end: int) -> None:
                context.decode(TOKENS[start:end], logits="all")
                rows.append(context.logits)

            def interleave(start: int, end: int) -> None:
                # every other cell is another sequence's, and free again afterwards; later tokens take its place
                n = end - start
                context.decode_batch(np.repeat(TOKENS[start:end], 2), [0, 1] * n, logits=[1, 0] * n)
                rows.append(context.logits)
                context.memory.seq_rm(1)

            interleave(0, 300)
            decode(300, N_PROMPT - 400)
            interleave(N_PROMPT - 400, N_PROMPT)
            for i in range(N_PROMPT, N_TOKENS):
                decode(i, i + 1)
            measured = size(np.concatenate(rows) - plain(model, numerics))
        if numerics == "exact":
            assert measured[0] < EXACT_NOISE_MAX
        return measured

    return measure


Bound = Callable[[str, str, str], tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def bound(plain: Callable[..., np.ndarray], noise: Callable[..., np.ndarray]) -> Bound:
    """The logits of a plain cache, and the largest and root mean square difference that a mixed one may have."""

    def get(model: str, numerics: str, attn: str) -> tuple[np.ndarray, np.ndarray]:
        if (numerics, attn) == ("flash", "fused"):
            # Flash attention adds up V in F16: every partial sum is off by up to 2**-11. Without it the query and the
            # weights are rounded to F16, once, and errors of both kinds average out over the cells. So the distance of
            # the two is nearly all flash attention's error; fused has neither.
            return plain(model, "f16"), size(plain(model, "flash") - plain(model, "f16"))
        return plain(model, numerics), MARGIN * noise(model, numerics)

    return get


def decode_all(context: Context) -> np.ndarray:
    """Logits of all TOKENS: the prompt in one call, then one by one."""
    context.decode(TOKENS[:N_PROMPT], logits="all")
    rows = [context.logits]
    for token in TOKENS[N_PROMPT:]:
        context.decode([token])
        rows.append(context.logits)
    return np.concatenate(rows)


def assert_same(actual: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> None:
    difference = size(actual - expected)
    assert (difference <= bound).all(), f"{difference} exceeds {bound} (largest, root mean square)"


def assert_moved(stats: CacheStats | None, n_tokens: int) -> None:
    assert stats is not None
    assert stats.n_migrations > 20
    assert stats.hot_used + stats.cold_used == n_tokens
    assert stats.n_tokens_moved == stats.cold_used


@pytest.mark.parametrize(
    ("model", "numerics", "attn"),
    [("gqa", "f16", "compose"), *((m, *k) for m, k in itertools.product(MODELS, KERNELS) if k[0] != "f16")],
)
def test_any_model(model: str, numerics: str, attn: str, models: Callable, bound: Bound) -> None:
    params = NUMERICS[numerics] | {"kv_mixed": mixed(numerics, attn)}
    with Context(models(model), n_ctx=N_CTX, n_threads=1, **params) as context:
        actual = decode_all(context)
        assert_moved(context.stats, N_TOKENS)
    assert_same(actual, *bound(model, numerics, attn))


@pytest.mark.parametrize(
    "params",
    [
        {"sink": 0},
        {"hot": 64},  # much smaller than a ubatch
        {"hot": 2000, "group": 8},  # larger than the prompt
        {"hot": 300, "n_ubatch": 300},  # a ubatch fills hot
        {"hot": 100, "n_batch": 129, "n_ubatch": 43},  # batches and ubatches that end anywhere
        {"hot": 100, "n_batch": 64, "n_ubatch": 64, "sink": 17},
        {"hot": 1, "sink": 0},
        {"hot": 5, "sink": 4},  # room for one token that is not a sink
        {"hot": 257, "group": 1},
        {"hot": 512, "group": 64, "threshold": 1.0, "n_ubatch": 32},
        {"hot": 512, "threshold": 0.01, "n_ubatch": 32},
        {"hot": 96, "cold_size": 3000},
    ],
    ids=lambda params: ",".join(f"{k}={v}" for k, v in params.items()),
)
@pytest.mark.parametrize("attn", ["compose", "fused"])
def test_any_shape(params: dict[str, Any], attn: str, models: Callable, bound: Bound) -> None:
    batch = {name: params[name] for name in params if name.startswith("n_")}
    cache_params = {name: params[name] for name in params if name not in batch}
    settings = NUMERICS["exact"] | batch | {"kv_mixed": mixed("exact", attn, **cache_params)}
    with Context(models("gqa"), n_ctx=N_CTX, n_threads=1, **settings) as context:
        actual = decode_all(context)
        assert_moved(context.stats, N_TOKENS)
    assert_same(actual, *bound("gqa", "exact", attn))


@pytest.mark.parametrize(("numerics", "attn"), KERNELS)
@pytest.mark.parametrize(("kv_unified", "sink"), [(True, 4), (False, 0)], ids=["unified", "streams"])
def test_several_sequences(
    kv_unified: bool, sink: int, numerics: str, attn: str, models: Callable, bound: Bound
) -> None:
    lengths = {0: 1000, 1: 640, 2: 460}
    n_prompt = {0: 700, 1: 500, 2: 300}
    tokens = {s: np.random.default_rng(s).integers(3, 400, n) for s, n in lengths.items()}

    def run(kv_mixed: Any, numerics: str = numerics) -> tuple[np.ndarray, CacheStats | None]:
        params = NUMERICS[numerics] | {"n_seq_max": 3, "kv_unified": kv_unified, "kv_mixed": kv_mixed, "n_ubatch": 150}
        with Context(models("gqa"), n_ctx=3 * 1024, n_threads=1, **params) as context:
            # the prompts together, a few tokens of one and a few of another
            order = sorted((i // 7, s, i) for s, n in n_prompt.items() for i in range(n))
            seqs, at = [s for _, s, _ in order], [i for _, _, i in order]
            context.decode_batch([tokens[s][i] for s, i in zip(seqs, at, strict=True)], seqs, pos=at, logits="all")
            rows = [context.logits]
            # then one token of each at a time, as long as there are any
            for step in range(max(lengths[s] - n_prompt[s] for s in lengths)):
                seqs = [s for s in lengths if n_prompt[s] + step < lengths[s]]
                context.decode_batch([tokens[s][n_prompt[s] + step] for s in seqs], seqs)
                rows.append(context.logits)
            return np.concatenate(rows), context.stats

    expected, _ = run(False, "f16" if (numerics, attn) == ("flash", "fused") else numerics)
    actual, stats = run(mixed(numerics, attn, sink=sink))
    assert_moved(stats, sum(lengths.values()))
    assert_same(actual, expected, bound("gqa", numerics, attn)[1])


@pytest.mark.parametrize("flash_attn", ["off", "on"])
@pytest.mark.parametrize(("kv_type", "cold"), [("f32", "f32"), ("f16", "f16"), ("bf16", "bf16"), ("f16", "q4_0")])
@pytest.mark.parametrize("n_seq", [1, 3])
def test_all_hot_is_equal_bit_by_bit(n_seq: int, kv_type: str, cold: str, flash_attn: str, models: Callable) -> None:
    def run(kv_mixed: Any) -> np.ndarray:
        params = {"type_k": kv_type, "type_v": kv_type, "flash_attn": flash_attn, "n_seq_max": n_seq}
        with Context(models("gqa"), n_ctx=n_seq * 512, n_threads=1, kv_mixed=kv_mixed, **params) as context:
            rows = []
            context.decode_batch(TOKENS[: 300 * n_seq], list(range(n_seq)) * 300, logits="all")
            rows.append(context.logits)
            for i in range(30):
                context.decode_batch(TOKENS[i : i + n_seq], list(range(n_seq)))
                rows.append(context.logits)
            if kv_mixed:
                assert context.stats.n_migrations == 0
            return np.concatenate(rows)

    kv_mixed = KVMixedParams(hot=512, threshold=1.0, cold=cold, attn="compose")
    assert run(kv_mixed).tobytes() == run(False).tobytes()


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """The first layers of a real model, with its weights as F32."""
    folder = tmp_path_factory.mktemp("models")
    with Model(rewrite_gguf(smollm2_path, folder / "smollm2.gguf", n_layer=3)) as model:
        yield model


@pytest.mark.parametrize(("numerics", "attn"), [kernel for kernel in KERNELS if kernel[0] != "f16"])
def test_a_real_model(numerics: str, attn: str, smollm2: Model, botchan_path: Path) -> None:
    n_prompt, n_tokens = 1920, 2000
    tokens = smollm2.tokenize(botchan_path.read_text(encoding="utf-8")[:12000])[:n_tokens]

    def run(kv_mixed: Any, shuffle: bool = False, numerics: str = numerics, **params: Any) -> np.ndarray:
        params = NUMERICS[numerics] | {"n_ctx": N_CTX, "n_threads": 1, "kv_mixed": kv_mixed} | params
        with Context(smollm2, **params) as context:
            if shuffle:  # free cells in the midst of others, which later tokens take
                context.decode(tokens[:600])
                context.decode(tokens[:200], seq_id=1)
                context.decode(tokens[600:1200])
                context.memory.seq_rm(1)
            context.decode(tokens[context.memory.seq_pos_max() + 1 : n_prompt])
            rows = [context.logits]
            for token in tokens[n_prompt:]:
                context.decode([token])
                rows.append(context.logits)
            if kv_mixed:
                assert_moved(context.stats, n_tokens)
            return np.concatenate(rows)

    if (numerics, attn) == ("flash", "fused"):  # see bound()
        expected = run(False, numerics="f16")
        bound = size(run(False) - expected)
    else:
        expected = run(False)
        bound = MARGIN * size(run(False, shuffle=True, n_seq_max=2, kv_unified=True) - expected)
    assert_same(run(mixed(numerics, attn, group=48, hot=256)), expected, bound)


@pytest.mark.parametrize(("numerics", "attn"), KERNELS)
def test_one_lost_row_would_show(numerics: str, attn: str, models: Callable, bound: Bound) -> None:
    """The bounds are far below what the smallest of all bugs does: one token of 1,900 that is not seen any more."""
    params = NUMERICS[numerics] | {"kv_mixed": False}
    with Context(models("gqa"), n_ctx=N_CTX, n_threads=1, **params) as context:
        context.decode(TOKENS[:N_PROMPT])
        context.memory.seq_rm(0, 700, 701)
        context.decode(TOKENS[N_PROMPT:], logits="all")
        expected, (largest, _) = bound("gqa", numerics, attn)
        difference = context.logits - expected[N_PROMPT:]
    assert np.abs(difference).max() > 2 * largest


@pytest.mark.parametrize(("numerics", "attn"), KERNELS)
def test_greedy_tokens(numerics: str, attn: str, models: Callable, bound: Bound) -> None:
    """The most likely token is another one only where two are as good as equally likely."""
    expected, (largest, typical) = bound("gqa", numerics, attn)
    kv_mixed = mixed(numerics, attn)
    with Context(models("gqa"), n_ctx=N_CTX, n_threads=1, kv_mixed=kv_mixed, **NUMERICS[numerics]) as context:
        actual = decode_all(context)
    top2 = np.sort(expected, axis=1)[:, -2:]
    differs = actual.argmax(axis=1) != expected.argmax(axis=1)
    assert not (differs & (top2[:, 1] - top2[:, 0] > 2 * largest)).any()  # two logits may both be off
    # the margin of the best token has a density of about 1 near 0, and noise of rms r swaps two at a distance below r
    assert differs.mean() <= 2 * typical + 2 / N_TOKENS
