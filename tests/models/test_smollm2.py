"""A real model on a real text: 2,500 tokens of a novel, all but the newest and the sinks in Q4_0."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers.tiering import Tiering

from llamamix import Context, KVMixedParams, Model, SamplingParams

N_PROMPT, N_SCORED, N_GENERATED = 2500, 500, 60


@dataclass
class Runs:
    """A plain F16 cache and a mixed one that hold the same text, and the logits of its last tokens.

    Logits are also those of upstream's cache with all rows in Q4_0, "uniform".
    """

    tokens: list[int]
    plain: Context
    mixed: Context
    logits: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[Model]:
    with Model(smollm2_path) as model:
        yield model


@pytest.fixture(scope="module")
def runs(model: Model, botchan_path: Path) -> Iterator[Runs]:
    text = botchan_path.read_text(encoding="utf-8")[:20_000]
    tokens = model.tokenize(text)[:N_PROMPT]
    assert len(tokens) == N_PROMPT

    def decode(context: Context) -> np.ndarray:
        context.decode(tokens, logits=np.arange(N_PROMPT) >= N_PROMPT - N_SCORED)
        return context.logits

    params = {"n_ctx": 2816, "n_threads": 1}
    q4_0 = {"kv_mixed": False, "type_k": "q4_0", "type_v": "q4_0"}
    with (
        Context(model, kv_mixed=False, **params) as plain,
        Context(model, **params) as mixed,
        Context(model, **params, **q4_0) as uniform,
    ):
        # at the same time with one thread each: two threads of one wait for each other on a busy machine
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(decode, (plain, mixed, uniform))
            logits = dict(zip(("plain", "mixed", "uniform"), found, strict=True))
        yield Runs(tokens, plain, mixed, logits)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def log_p(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Of tokens, given the logits of those before each."""
    return log_softmax(logits)[np.arange(len(tokens)), tokens]


def divergences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of each token's logits."""
    p, q = log_softmax(a), log_softmax(b)
    return (np.exp(p) * (p - q)).sum(axis=1)


def chance(x: np.ndarray) -> float:
    """How far the mean of a sample may be off: three standard errors."""
    return float(3 * x.std() / np.sqrt(len(x)))


def test_most_of_the_text_is_cold(runs: Runs) -> None:
    assert runs.mixed.kv_mixed == KVMixedParams(hot=512, cold="iq4_nl", cold_size=2816 - 512)
    tiering = Tiering(hot=512, cold=2816 - 512)
    tiering.decode(range(2048), [0] * 2048, 512)  # a call of llama_decode() gets n_batch tokens
    tiering.decode(range(2048, N_PROMPT), [0] * (N_PROMPT - 2048), 512)
    stats = runs.mixed.stats
    assert {name: getattr(stats, name) for name in tiering.counts} == tiering.counts
    assert stats.n_migrations > 15
    assert stats.cold_used > 0.8 * N_PROMPT


def test_perplexity(runs: Runs) -> None:
    """The text is as likely as with an F16 cache, but for the divergence from that.

    It is what a text drawn by the one loses with the other on the average.
    """
    following = runs.tokens[N_PROMPT - N_SCORED + 1 :]
    plain, mixed = (runs.logits[name][:-1] for name in ("plain", "mixed"))
    loss = log_p(plain, following) - log_p(mixed, following)
    assert loss.mean() < divergences(plain, mixed).mean() + chance(loss)
    # the model knows the text: with rows of the wrong tokens it would not
    unknown = log_p(np.roll(plain, 1, axis=0), following)
    assert log_p(plain, following).mean() > unknown.mean() + chance(unknown)


def test_divergence(runs: Runs) -> None:
    """Far less is lost than with upstream's cache of the same type.

    Tokens attend to those near them and to the first ones the most, and these are F16: scores and sums have half the
    error or less, and the divergence goes with the square.
    """
    plain = runs.logits["plain"]
    mixed, uniform = (divergences(plain, runs.logits[name]) for name in ("mixed", "uniform"))
    assert mixed.mean() + chance(mixed) < uniform.mean() / 4
    n_mixed, n_uniform = (
        int((plain.argmax(axis=1) != runs.logits[name].argmax(axis=1)).sum()) for name in ("mixed", "uniform")
    )
    assert n_mixed < n_uniform


def test_generated_text(runs: Runs, model: Model) -> None:
    """What comes after the text at temperature 0 is always the same, and as good as with an F16 cache."""

    def generate(context: Context) -> list[int]:
        # the last token again, so that there are logits to begin with
        context.memory.seq_rm(0, N_PROMPT - 1, -1)
        pieces = context.generate(runs.tokens[-1:], max_tokens=N_GENERATED, sampling=SamplingParams(temperature=0))
        return model.tokenize("".join(pieces), add_special=False)

    def judge(tokens: list[int]) -> np.ndarray:
        """The logarithms of the probability that each generated token has with the F16 cache."""
        runs.plain.memory.seq_rm(0, N_PROMPT, -1)
        runs.plain.decode(tokens, logits="all")
        return log_p(np.concatenate([runs.logits["plain"][-1:], runs.plain.logits[:-1]]), tokens)

    # loading a state puts rows in another order, and flash attention adds up in F16: so it is loaded both times
    state = runs.mixed.state_save(0)
    runs.mixed.state_load(state, 0)
    first = generate(runs.mixed)
    runs.mixed.state_load(state, 0)
    assert generate(runs.mixed) == first

    plain = generate(runs.plain)
    assert len(first) > N_GENERATED / 2
    # less likely words are not chosen, nor do they repeat more often: shares of some 60 tokens each
    likely = [judge(tokens) for tokens in (first, plain)]
    assert likely[0].mean() > likely[1].mean() - np.hypot(*map(chance, likely))
    new = [np.array([token not in tokens[:i] for i, token in enumerate(tokens)]) for tokens in (first, plain)]
    assert new[0].mean() > new[1].mean() - np.hypot(*map(chance, new))


Logits = dict[tuple[str, str, str], np.ndarray]


@pytest.fixture(scope="module")
def by_path(model: Model, botchan_path: Path) -> Logits:
    """Logits of the same single tokens, most of what they see cold, by cold type, attention and flash attention."""
    n_prompt, n_tokens = 300, 512
    tokens = model.tokenize(botchan_path.read_text(encoding="utf-8")[:8000])[: n_prompt + n_tokens]
    assert len(tokens) == n_prompt + n_tokens

    def run(key: tuple[str, str, str]) -> np.ndarray:
        cold, attn, flash_attn = key
        kv_mixed = KVMixedParams(hot=128, group=32, cold=cold, attn=attn)
        with Context(model, n_ctx=1024, n_threads=1, flash_attn=flash_attn, kv_mixed=kv_mixed) as context:
            context.decode(tokens[:n_prompt])
            rows = []
            for token in tokens[n_prompt:]:
                context.decode([token])
                rows.append(context.logits[0])
            assert context.stats.cold_used > 0.8 * len(tokens)
        return np.stack(rows)

    keys = [("f16", "compose", "on"), ("f16", "compose", "off"), *((t, "fused", "on") for t in ("f16", "q4_0"))]
    keys.append(("q4_0", "compose", "on"))
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(keys, pool.map(run, keys), strict=True))


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    return float(divergences(a, b).mean())


def test_fused_attention_gives_the_same_tokens(by_path: Logits) -> None:
    """With cold rows in F16 it is as near to the composed one as that with and without flash attention to each other.

    The weights' matrix products round their inputs to 8 bits, so that any difference is amplified to that of two exact
    caches; the most likely token may be another one where two are no farther from each other than that.
    """
    expected, other = (by_path["f16", "compose", flash] for flash in ("on", "off"))
    fused = by_path["f16", "fused", "on"]
    noise = np.abs(other - expected).max()
    # two samples of 25 million differences of one kind; flash attention, which adds up in F16, is one side of both
    assert np.sqrt(np.mean((fused - expected) ** 2)) < 1.25 * np.sqrt(np.mean((other - expected) ** 2))
    assert divergence(expected, fused) < 2 * divergence(expected, other)

    top2 = np.sort(expected, axis=1)[:, -2:]
    clear = top2[:, 1] - top2[:, 0] > noise
    assert len(clear) > 500 and clear.mean() > 0.25
    assert (fused.argmax(axis=1) == expected.argmax(axis=1))[clear].all()
    # the rest agree as often as two exact caches do, give or take chance
    same, same_other = (int((x.argmax(axis=1) == expected.argmax(axis=1)).sum()) for x in (fused, other))
    assert len(clear) - same < 2 * (len(clear) - same_other) + 8


def test_fused_attention_over_q4_0(by_path: Logits) -> None:
    """Next to that noise, the rounding of queries to 8 bits is nothing.

    It changes scores by 8 / 127 of what storing K as Q4_0 does (both are steps to the largest of 32 values), and the
    divergence goes with the square: (8 / 127)**2 of the divergence from a cache in F16.
    """
    exact, expected, fused = (
        by_path[key] for key in (("f16", "compose", "on"), ("q4_0", "compose", "on"), ("q4_0", "fused", "on"))
    )
    noise = divergence(exact, by_path["f16", "compose", "off"])
    stored = divergence(exact, expected)
    assert noise < stored  # or there would be nothing to see
    assert divergence(expected, fused) < 2 * noise + (8 / 127) ** 2 * stored
    # nor does it lose more of the text
    assert divergence(exact, fused) < stored + 2 * noise


@pytest.mark.parametrize(("cold", "bits"), [("auto", 18 * 8 / 32), ("q4_0", 18 * 8 / 32), ("q8_0", 34 * 8 / 32)])
def test_bytes(cold: str, bits: float, model: Model) -> None:
    """Blocks of 32 values are 18 bytes in Q4_0 and 34 in Q8_0, F16 is 2 a value."""
    n_ctx, n_hot, n_layer, n_values = 8192, 512, 30, 2 * 3 * 64  # K and V, 3 heads of 64
    with Context(model, n_ctx=n_ctx, n_threads=1, kv_mixed=KVMixedParams(cold=cold)) as context:
        stats = context.stats
    assert stats.bytes_plain == n_layer * n_values * n_ctx * 2
    assert stats.bytes_hot == n_layer * n_values * n_hot * 2
    means = n_layer * n_values // 2 * (n_ctx - n_hot) // 128 * 2  # of K, a page of 128 cells
    assert stats.bytes_cold == n_layer * n_values * (n_ctx - n_hot) * bits / 8 + means
    assert stats.bytes_total == stats.bytes_hot + stats.bytes_cold
    assert stats.ratio == stats.bytes_total / stats.bytes_plain
    if cold == "auto":  # the default
        assert stats.ratio <= 0.34


@pytest.mark.parametrize("n", [1, 70])
def test_the_processors_kernels_for_weights(smollm2_path: Path, botchan_path: Path, n: int) -> None:
    """Weights in the order that the processor's own kernels want (AMX, repacked) do what those in the file's order do.

    Both round what they multiply weights with to 8 bits. What lies near the middle between two of these values goes to one of
    them here and to the other there, since sums are in another order: a divergence of some thousandths. Kernels that are wrong
    make one above 1.
    """
    text = botchan_path.read_text(encoding="utf-8")[:2000]
    logits = []
    for anew in (True, False):
        with (
            Model(smollm2_path, use_extra_bufts=anew) as model,
            Context(model, n_ctx=128, n_threads=1, kv_mixed=False) as context,
        ):
            context.decode(model.tokenize(text)[:n], logits=np.ones(n, bool))
            logits.append(context.logits)
    assert divergences(*logits).mean() < 0.02
    assert np.exp(log_softmax(logits[0])).max() > 0.1  # it says something
