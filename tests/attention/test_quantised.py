"""Cold rows are what ggml's quantisation makes of hot ones, and the logits are what attention over both gives.

The expectation comes from tests/helpers: a forward pass in float64 (llama.py), a twin of the policy that says which rows are
cold when, and gguf's quantisation in numpy. The composed attention computes what it does; the fused one also rounds the
queries of single tokens to 8 bits where K has 4 or 5, which is allowed for (QUERY).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.allowances import ATOL, F32_ERROR, STEP, allowance, allowance_k, allowance_v, flips, rms
from helpers.llama import Llama, Tamper
from helpers.rows import Storage
from helpers.tiering import Tiering, View
from helpers.tiny_model import random_tokens, write_tiny_model

from llamamix import Context, KVMixedParams, Model

ATTN = ["compose", "fused"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[Model, Llama]]]:
    """Tiny models by write_tiny_model()'s parameters, each with its reference."""
    folder = tmp_path_factory.mktemp("models")
    loaded: list[Model] = []

    @cache
    def get(**params: Any) -> tuple[Model, Llama]:
        path = write_tiny_model(folder / f"{len(loaded)}.gguf", **params)
        loaded.append(Model(path))
        return loaded[-1], Llama(path)

    yield get
    for model in loaded:
        model.close()


class Run:
    """One sequence, a prompt of several ubatches and then single tokens, with 64 hot cells."""

    n_prompt, n_tokens, n_ubatch, n_ctx = 400, 500, 96, 512
    shape = {"hot": 64, "group": 16, "sink": 4, "threshold": 0.8}

    def __init__(self, **changes: int) -> None:
        self.__dict__.update(changes)
        self.shape = {name: changes.get(name, value) for name, value in self.shape.items()}
        self.tokens = random_tokens(self.n_tokens)

    def views(self) -> list[View]:
        """What each token could see, by the twin of the policy."""
        tiering = Tiering(**self.shape, cold=self.n_ctx - self.shape["hot"])
        tiering.decode(range(self.n_prompt), [0] * self.n_prompt, self.n_ubatch)
        for i in range(self.n_prompt, self.n_tokens):
            tiering.decode([i], [0], self.n_ubatch)
        self.n_migrations = tiering.n_migrations
        self.opened = tiering.opened
        return tiering.views

    def logits(
        self,
        model: Model,
        hot: str = "f32",
        flash_attn: str = "off",
        attn: str = "compose",
        mean: bool = False,
        **cold: str,
    ) -> np.ndarray:
        """What the library computes."""
        params = {"n_ctx": self.n_ctx, "n_ubatch": self.n_ubatch, "n_threads": 1, "flash_attn": flash_attn}
        types = {"type_k": hot, "type_v": hot, "kv_mixed": KVMixedParams(**self.shape, attn=attn, mean=mean, **cold)}
        with Context(model, **params, **types) as context:
            context.decode(self.tokens[: self.n_prompt], logits="all")
            rows = [context.logits]
            for token in self.tokens[self.n_prompt :]:
                context.decode([token])
                rows.append(context.logits)
            assert context.stats.n_migrations == self.n_migrations > 0
        return np.concatenate(rows)


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


@pytest.fixture(scope="module")
def views(run: Run) -> list[View]:
    return run.views()


@pytest.fixture(scope="module")
def expected(run: Run, views: list[View], models: Callable) -> Callable[..., np.ndarray]:
    """What the reference computes for ``run``, by hot and cold types."""

    @cache
    def get(hot: str = "f32", cold_k: str = "q4_0", cold_v: str = "q4_0", n_layer: int = 2) -> np.ndarray:
        return models(n_layer=n_layer)[1].logits(run.tokens, views, Storage(hot, cold_k, cold_v))

    return get


@pytest.fixture(scope="module")
def effect(expected: Callable) -> float:
    """What storing cold rows as Q4_0 changes, as a root mean square."""
    return rms(expected() - expected(cold_k="f32", cold_v="f32"))


#
# in F32, where nothing but the cold type rounds
#

TYPES = [
    *((t, t) for t in STEP),
    ("q8_0", "q4_0"),
    ("q4_0", "f16"),
    ("f16", "q4_0"),
    ("q5_1", "q4_1"),
    ("bf16", "q8_0"),
]


def n_layers(attn: str) -> int:
    """The fused kernel rounds queries: with one layer no rows differ for that, and none of their values are other ones."""
    return 2 if attn == "compose" else 1


@pytest.mark.parametrize("attn", ATTN)
@pytest.mark.parametrize(("cold_k", "cold_v"), TYPES)
def test_any_types(cold_k: str, cold_v: str, attn: str, run: Run, models: Callable, expected: Callable) -> None:
    n_layer = n_layers(attn)
    exact = expected("f32", "f32", "f32", n_layer)
    effect_k = rms(expected("f32", cold_k, "f32", n_layer) - exact)
    effect_v = rms(expected("f32", "f32", cold_v, n_layer) - exact)
    bound = (flips(cold_k) + allowance_k(attn, cold_k)) * effect_k + (flips(cold_v) + allowance_v(attn, cold_v)) * effect_v
    difference = run.logits(models(n_layer=n_layer)[0], cold_k=cold_k, cold_v=cold_v, attn=attn)
    assert rms(difference - expected("f32", cold_k, cold_v, n_layer)) < bound


@pytest.mark.parametrize("attn", ATTN)
def test_f32(attn: str, run: Run, models: Callable, expected: Callable) -> None:
    """The reference is right, and so are all kinds of rows, before anything is quantised."""
    actual = run.logits(models(n_layer=2)[0], cold="f32", attn=attn)
    assert np.abs(actual - expected("f32", "f32", "f32")).max() < ATOL


def test_the_error_follows_the_step(run: Run, models: Callable, expected: Callable) -> None:
    """Errors of all types by themselves, without what the reference makes of the rows."""
    exact = expected("f32", "f32", "f32")
    error = {t: rms(run.logits(models(n_layer=2)[0], cold=t) - exact) for t in [*STEP, "iq4_nl"]}
    order = ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
    assert sorted(order, key=error.__getitem__) == order
    # rounding to multiples of a step is off by step / sqrt(12), and all that follows is nearly linear in that
    for kv_type in ("q4_1", "q5_0", "q5_1", "q8_0"):
        assert error[kv_type] / error["q4_0"] == pytest.approx(STEP[kv_type] / STEP["q4_0"], rel=0.25)
    # 16 values as in Q4_0, closer to each other where there are more of them
    assert 0.75 * error["q4_0"] < error["iq4_nl"] < error["q4_0"]


def test_errors_of_k_and_v_are_independent(run: Run, models: Callable, expected: Callable) -> None:
    exact = expected("f32", "f32", "f32")

    def error(**cold: str) -> float:
        return rms(run.logits(models(n_layer=2)[0], **cold) - exact)

    k, v = error(cold="f32", cold_k="q4_0"), error(cold="f32", cold_v="q4_0")
    assert min(k, v) > 0.1 * max(k, v)
    assert error(cold="q4_0") == pytest.approx(np.hypot(k, v), rel=0.1)


@pytest.mark.parametrize(
    "params",
    [
        {"head_size": 128},  # K is rotated in blocks of 128, V in blocks of 64
        {"head_size": 192, "n_head": 2, "n_head_kv": 1},  # both in blocks of 64
        {"head_size": 96},  # no rotation
        {"head_size": 32, "n_head": 8, "n_head_kv": 8},
        {"head_size": 256, "n_head": 2, "n_head_kv": 1, "n_layer": 1},
    ],
    ids=lambda params: f"head-{params['head_size']}",
)
@pytest.mark.parametrize("attn", ATTN)
def test_any_head_size(params: dict[str, int], attn: str, run: Run, views: list[View], models: Callable) -> None:
    model, reference = models(**{"n_layer": n_layers(attn), **params})
    expected = reference.logits(run.tokens, views, Storage())
    exact = reference.logits(run.tokens, views, Storage("f32", "f32", "f32"))
    share = flips("q4_0") + allowance(attn, head_size=params["head_size"])
    assert rms(run.logits(model, cold="q4_0", attn=attn) - expected) < share * rms(expected - exact)


@pytest.mark.parametrize("attn", ATTN)
@pytest.mark.parametrize(
    "changes",
    [
        {"sink": 0},
        {"sink": 30},
        {"hot": 1, "sink": 0},
        {"hot": 7, "sink": 3, "n_ubatch": 512},
        {"hot": 64, "group": 1},
        {"hot": 300, "group": 100},
        {"threshold": 1.0, "group": 5},
        {"threshold": 0.05},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
def test_any_shape(changes: dict[str, Any], attn: str, models: Callable) -> None:
    model, reference = models(n_layer=n_layers(attn))
    run = Run(**changes)
    views = run.views()
    expected = reference.logits(run.tokens, views, Storage())
    exact = reference.logits(run.tokens, views, Storage("f32", "f32", "f32"))
    share = flips("q4_0") + allowance(attn)
    assert rms(run.logits(model, cold="q4_0", attn=attn) - expected) < share * rms(expected - exact)


@pytest.mark.parametrize("attn", ATTN)
@pytest.mark.parametrize("mean", [False, True], ids=["", "mean"])
@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "streams"])
def test_several_sequences(kv_unified: bool, mean: bool, attn: str, models: Callable) -> None:
    """Every sequence is that of a run with the rows that the policy says, whoever it shares the cache with."""
    model, reference = models()
    shape = {"hot": 96, "group": 10, "sink": 3}
    n_cells = 768 if kv_unified else 256
    tiering = Tiering(**shape, cold=n_cells - 96, n_stream=1 if kv_unified else 3)
    lengths = [240, 100, 170]
    tokens = [random_tokens(n, seed) for seed, n in enumerate(lengths)]
    at = [0, 0, 0]
    decoded: list[int] = []
    rng = np.random.default_rng(5)

    params = {"type_k": "f32", "type_v": "f32", "flash_attn": "off", "n_seq_max": 3, "kv_unified": kv_unified}
    cache_params = KVMixedParams(**shape, cold="q4_0", attn=attn, mean=mean)
    with Context(model, n_ctx=768, n_ubatch=40, n_threads=1, kv_mixed=cache_params, **params) as context:
        rows = []
        while at != lengths:
            # up to 30 tokens of each sequence, shuffled
            counts = [int(min(rng.integers(0, 31), lengths[s] - at[s])) for s in range(3)]
            seqs = rng.permutation(np.repeat(range(3), counts)).tolist()
            if not seqs:
                continue
            pos = [0] * len(seqs)
            for i, s in enumerate(seqs):
                pos[i] = at[s]
                at[s] += 1
            batch = [int(tokens[s][p]) for s, p in zip(seqs, pos, strict=True)]
            context.decode_batch(batch, seqs, pos=pos, logits="all")
            tiering.decode(pos, seqs, 40)
            decoded += batch
            rows.append(context.logits)
            assert {name: getattr(context.stats, name) for name in tiering.counts} == tiering.counts
        actual = np.concatenate(rows)

    assert tiering.n_migrations > 20
    expected = reference.logits(decoded, tiering.views, Storage(), opened=tiering.opened if mean else None)
    exact = reference.logits(decoded, tiering.views, Storage("f32", "f32", "f32"))
    assert rms(actual - expected) < (flips("q4_0") + allowance(attn)) * rms(expected - exact)


@pytest.mark.parametrize("attn", ATTN)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"group": 7},  # pages that several migrations come to
        {"hot": 300, "group": 100, "n_prompt": 450},
        {"hot": 1, "sink": 0},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()) or "as others",
)
@pytest.mark.parametrize("cold_k", [t for t in STEP if t not in ("f16", "bf16")])
def test_means(cold_k: str, changes: dict[str, Any], attn: str, models: Callable) -> None:
    """Rows of K are stored less the mean of the rows that came first to their page, and attention adds it again."""
    model, reference = models(n_layer=1)
    run = Run(**changes)
    views = run.views()
    storage = Storage("f32", cold_k, "f32")
    assert len({tuple(tokens) for tokens in run.opened.values()}) >= 2
    expected, others = (reference.logits(run.tokens, views, storage, opened=o) for o in (run.opened, None))
    exact = reference.logits(run.tokens, views, Storage("f32", "f32", "f32"))
    actual = run.logits(model, cold="f32", cold_k=cold_k, attn=attn, mean=True)
    # A mean near a border of F16 becomes the number next to it, 2**-11 of 2.5 in size: less than 2**-7 of a step for any type
    # of at most 5 bits (2.5 / 16), which moves codes like any other rounding; the step of Q8_0 is 2.5 / 127.
    share = (flips(cold_k) + allowance(attn, cold_k)) * (4 if cold_k == "q8_0" else 1.5)
    assert rms(actual - expected) < share * rms(expected - exact)
    # and that it would show: other codes are other errors, of the same size
    assert rms(actual - others) > 0.5 * rms(others - exact)


def test_every_code(models: Callable) -> None:
    """Small enough that no value is near a border: not one of 13,000 codes differs, so neither do the logits."""
    model, reference = models(n_layer=1, n_head=2, n_head_kv=1, seed=10)
    run = Run(hot=24, n_prompt=70, n_tokens=100, n_ubatch=32, n_ctx=256)
    views = run.views()
    nearest = []

    def look(_layer: int, k: np.ndarray, _k_cold: np.ndarray, v: np.ndarray, _v_cold: np.ndarray) -> None:
        for rows in (k, v):
            nearest.append(distance_to_border(rows))

    expected = reference.logits(run.tokens, views, Storage(), look)
    assert min(nearest) > 10 * F32_ERROR
    actual = run.logits(model, cold="q4_0")
    assert np.abs(actual - expected).max() < ATOL


def distance_to_border(rows: np.ndarray) -> float:
    """How much a value must change, at least, for a Q4_0 code or scale to become another one."""
    blocks = rows.reshape(-1, 32)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), 1)
    code = blocks / (extreme / -8) + 8.5
    # the step moves with the extreme value, so a code can have two causes
    to_code = np.abs(code - np.round(code)) * np.abs(extreme) / 8 / 2
    to_code[blocks == extreme] = np.inf
    scale = extreme[:, 0] / -8
    lower = scale.astype(np.float16).astype(np.float64)
    spacing = np.abs(np.spacing(lower.astype(np.float16)).astype(np.float64))
    to_scale = np.abs(np.abs(scale - lower) - spacing / 2) * 8
    return float(min(to_code.min(), to_scale.min()))


#
# what these tests would notice
#


def stale(_layer: int, _k: np.ndarray, k_cold: np.ndarray, _v: np.ndarray, _v_cold: np.ndarray) -> None:
    k_cold[100] = k_cold[99]


def never_copied(_layer: int, _k: np.ndarray, _k_cold: np.ndarray, _v: np.ndarray, v_cold: np.ndarray) -> None:
    v_cold[100:116] = 0


def not_quantised(_layer: int, k: np.ndarray, k_cold: np.ndarray, v: np.ndarray, v_cold: np.ndarray) -> None:
    k_cold[:], v_cold[:] = k, v


def swapped(_layer: int, _k: np.ndarray, k_cold: np.ndarray, _v: np.ndarray, _v_cold: np.ndarray) -> None:
    k_cold[[100, 101]] = k_cold[[101, 100]]


@pytest.mark.parametrize("tamper", [stale, never_copied, not_quantised, swapped])
def test_one_wrong_row_would_show(
    tamper: Tamper, run: Run, views: list[View], models: Callable, expected: Callable, effect: float
) -> None:
    wrong = models(n_layer=2)[1].logits(run.tokens, views, Storage(), tamper)
    assert rms(wrong - expected()) > 10 * flips("q4_0") * effect


@pytest.mark.parametrize("n_cells", [1, 16])
def test_a_mask_that_is_off_would_show(
    n_cells: int, run: Run, views: list[View], models: Callable, expected: Callable, effect: float
) -> None:
    off = [View(v.index, v.pos, v.hot, v.cold[n_cells:]) for v in views]
    wrong = models(n_layer=2)[1].logits(run.tokens, off, Storage())
    assert rms(wrong - expected()) > 4 * flips("q4_0") * effect


def test_rows_that_are_not_rotated_would_show(
    run: Run, views: list[View], models: Callable, expected: Callable, effect: float
) -> None:
    unrotated = models(n_layer=2)[1].logits(run.tokens, views, Storage(rotate=False))
    assert rms(unrotated - expected()) > 10 * flips("q4_0") * effect


#
# in F16, the default
#


@pytest.mark.parametrize(("flash_attn", "attn"), [("off", "compose"), ("on", "compose"), ("on", "fused")])
@pytest.mark.parametrize("cold", ["q8_0", "q5_1", "q4_0"])
def test_f16(cold: str, flash_attn: str, attn: str, run: Run, models: Callable, expected: Callable) -> None:
    # one layer: what its attention rounds does not change the rows of a next one, and with them the codes
    model, _ = models(n_layer=1)

    def residual(kv_type: str) -> float:
        actual = run.logits(model, hot="f16", flash_attn=flash_attn, attn=attn, cold=kv_type)
        return rms(actual - expected("f16", kv_type, kv_type, n_layer=1))

    # with F16 cold rows the residual is that of the attention, which rounds to F16 on the way; quantising adds to it
    # values that fall on the other side of a border, of which F16 has some exactly half way between two codes
    wanted, exact = (expected("f16", t, t, n_layer=1) for t in (cold, "f16"))
    attention = residual("f16")
    assert attention < 3 * 2**-8  # flash attention keeps sums in F16: some 2**-9 of values 3 in size
    assert residual(cold) < 1.5 * attention + (flips(cold) + allowance(attn, cold)) * rms(wanted - exact)


@pytest.mark.parametrize("attn", ATTN)
def test_all_cold_is_what_a_uniform_cache_is(attn: str, models: Callable) -> None:
    """With a single hot cell, all but the newest token is as in upstream's Q4_0 cache."""
    model, reference = models(n_layer=1)
    run = Run(hot=1, sink=0)
    views = run.views()
    assert all(len(v.hot) == 1 for v in views)
    uniform_views = [View(v.index, v.pos, [], v.hot + v.cold) for v in views]
    types = {"type_k": "q4_0", "type_v": "q4_0", "flash_attn": "on", "kv_mixed": False}
    with Context(model, n_ctx=run.n_ctx, n_threads=1, **types) as context:
        context.decode(run.tokens, logits="all")
        uniform = context.logits
    mixed = run.logits(model, cold="q4_0", attn=attn)

    # The newest row is all that is stored in another way, and the reference knows what that does. Upstream multiplies
    # Q4_0 rows with queries of 8 bits, steps of 2.5 / 127 for unit size; queries are 2 in size: scores are off by
    # 2 * 2.5 / 127 / sqrt(12) = 0.011, and so is what attention adds to logits 3 in size. Fused attention does so too.
    newest = reference.logits(run.tokens, views, Storage()) - reference.logits(run.tokens, uniform_views, Storage())
    assert rms(mixed - uniform - newest) < 0.011 * 3
    # all of that is small beside what both lose
    exact = reference.logits(run.tokens, views, Storage("f32", "f32", "f32"))
    assert rms(mixed - uniform) < 0.25 * rms(mixed - exact)


#
# a real model
#


def test_less_is_lost_than_in_a_uniform_cache(smollm2_path: Path, botchan_path: Path) -> None:
    """Mean Kullback-Leibler divergence from an F16 cache, over the second half of 640 tokens of text."""
    n_tokens, n_logits = 640, 320

    with Model(smollm2_path) as model:
        text = botchan_path.read_text(encoding="utf-8")[20_000:24_000]
        tokens = model.tokenize(text)[:n_tokens]
        assert len(tokens) == n_tokens

        def log_p(**params: Any) -> np.ndarray:
            with Context(model, n_ctx=1024, n_threads=1, **params) as context:
                context.decode(tokens, logits=np.arange(n_tokens) >= n_tokens - n_logits)
                x = context.logits.astype(np.float64)
            x -= x.max(axis=1, keepdims=True)
            return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

        runs = [
            {"kv_mixed": False},
            {"kv_mixed": False, "type_k": "q4_0", "type_v": "q4_0"},
            {"kv_mixed": KVMixedParams(hot=8, sink=0)},
            {"kv_mixed": KVMixedParams(hot=256)},
        ]
        # two at a time with one thread each; two threads of one wait for each other on a busy machine
        with ThreadPoolExecutor(2) as pool:
            f16, *others = pool.map(lambda params: log_p(**params), runs)
    uniform, all_cold, mixed = (float((np.exp(f16) * (f16 - x)).sum(axis=1).mean()) for x in others)

    # the same rows are Q4_0 but for the newest, which matter the most
    assert 0.25 * uniform < all_cold < 1.25 * uniform
    # tokens attend to those near them and to the first ones the most, and these are F16
    assert mixed < 0.25 * uniform
