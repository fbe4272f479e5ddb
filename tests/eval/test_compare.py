"""Divergences and statistics, against the same in other words."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llamamix import ContextError
from llamamix.eval.compare import Reference, Scores
from llamamix.eval.statistics import mean, perplexity, perplexity_ratio, quantile, share

N_VOCAB = 4000


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In long double, and without the subtraction of the largest, which small logits can do without."""
    x = logits.astype(np.longdouble)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def scores(a: np.ndarray, b: np.ndarray, targets: np.ndarray) -> Scores:
    return Reference(np.arange(len(a)), targets, a).scores(b)


def some_logits(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (n, N_VOCAB)).astype(np.float32)


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_divergence(size: float) -> None:
    """Also where it is 1e-9, which float32 could not tell from nothing."""
    a = some_logits(20)
    b = (a + np.float32(size) * some_logits(20, seed=1) / 3).astype(np.float32)
    targets = np.random.default_rng(2).integers(0, N_VOCAB, 20)
    log_p, log_q = log_softmax(a), log_softmax(b)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    assert size**2 / 10 < expected.mean() < size**2 * 2
    found = scores(a, b, targets)
    # logarithms of up to 20 with a rounding of 2^-53 each, weighted by probabilities: 2e-15 in all, twice as it is a
    # difference; the sums of exponentials have 4000 terms and add less than as much again
    assert np.abs(found.kld - expected).max() < 1e-14
    rows = np.arange(20)
    assert np.abs(found.nll + log_q[rows, targets]).max() < 1e-14
    assert np.abs(found.nll_ref + log_p[rows, targets]).max() < 1e-14
    assert (found.same_top == (a.argmax(1) == b.argmax(1))).all()
    assert (found.hit == (b.argmax(1) == targets)).all()
    assert (found.positions == rows).all()


def test_large_logits_and_tokens_that_are_ruled_out() -> None:
    """exp(1000) is beyond float64, and minus infinity is no number to multiply nothing with."""
    a = np.array([[1000, 999, -np.inf, 100]], np.float32)
    b = np.array([[1000, 1000, -np.inf, 100]], np.float32)
    found = scores(a, b, np.array([1]))
    p, q = 1 / (1 + math.exp(-1)), 0.5
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / q)
    assert found.kld[0] == pytest.approx(expected, rel=1e-14)
    assert found.nll[0] == pytest.approx(math.log(2), rel=1e-14)
    assert found.nll_ref[0] == pytest.approx(-math.log(1 - p), rel=1e-14)
    # ruled out by one only: infinitely far
    assert scores(np.array([[0, 0]], np.float32), np.array([[0, -np.inf]], np.float32), np.array([0])).kld[0] == np.inf


def test_the_reference_itself() -> None:
    a = some_logits(5)
    targets = a.argmax(1) - np.array([0, 1, 0, 1, 0])
    own, other = Reference(np.arange(5), targets, a).own_scores(), scores(a, a, targets)
    assert (own.kld == 0).all() and own.same_top.all() and own.hit.tolist() == [True, False, True, False, True]
    assert np.abs(other.kld).max() == 0
    assert np.abs(own.nll - other.nll).max() < 1e-14 and (own.nll == own.nll_ref).all()


def test_logits_that_are_no_numbers() -> None:
    good, bad = some_logits(2), some_logits(2)
    bad[1, 7] = np.nan
    with pytest.raises(ContextError, match="not numbers"):
        scores(good, bad, np.zeros(2, int))
    with pytest.raises(ContextError, match="not numbers"):
        Reference(np.arange(2), np.zeros(2, int), bad)


def test_joined() -> None:
    a, b = some_logits(6), some_logits(6, seed=1)
    targets = np.arange(6)
    whole = scores(a, b, targets)
    parts = [Reference(np.arange(6)[s], targets[s], a[s]).scores(b[s]) for s in (slice(0, 1), slice(1, 6))]
    joined = Scores.join(parts)
    assert len(joined) == 6
    for name in Scores.__dataclass_fields__:
        assert (getattr(joined, name) == getattr(whole, name)).all()


#
# statistics
#


def test_means_by_hand() -> None:
    values = np.array([1.0, 2.0, 6.0])
    # deviations -2, -1 and 3: a mean square of 14/3
    assert mean(values) == pytest.approx((3, math.sqrt(14 / 3 / 2)))
    assert mean(values[:1]) == (1, None)
    assert share(np.array([True, True, False, True])) == pytest.approx((0.75, math.sqrt(0.75 * 0.25 / 3)))
    assert share(np.array([True] * 4)) == (1, 0)
    assert share(np.array([True])) == (1, None)


def test_perplexities_by_hand() -> None:
    nll, nll_ref = np.log([2.0, 8.0, 4.0]), np.log([4.0, 4.0, 2.0])
    assert perplexity(nll).value == pytest.approx(4)
    # ratios 1/2, 2 and 2: a mean logarithm of log(2)/3
    ratio = perplexity_ratio(nll, nll_ref)
    assert ratio.value == pytest.approx(2 ** (1 / 3))
    # as llama-perplexity puts it
    n = 3
    cov = np.mean(nll * nll_ref) - nll.mean() * nll_ref.mean()
    error = math.sqrt((nll.var() + nll_ref.var() - 2 * cov) / (n - 1))
    assert ratio.error == pytest.approx(ratio.value * error)


def test_quantiles_by_hand() -> None:
    values = np.array([5.0, 1.0, 3.0, 2.0, 4.0])
    # ranks 0 to 4: the median is at 2, one deviation is sqrt(5/4) = 1.118
    median = quantile(values, 0.5)
    assert median.value == 3
    assert median.error == pytest.approx(math.sqrt(5 / 4))  # the values are their ranks, and one
    # 99 % of 5 values: beyond the largest but one, so nothing is known of the error
    assert quantile(values, 0.99) == (pytest.approx(np.quantile(values, 0.99)), None)
    assert quantile(np.array([7.0]), 0.5) == (7, None)
    rng = np.random.default_rng(0)
    for n in (2, 10, 1023):
        sample = rng.exponential(size=n)
        for q in (0.5, 0.9, 0.99, 0.999):
            assert quantile(sample, q).value == pytest.approx(np.quantile(sample, q))


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_errors_of_quantiles_are_what_samples_scatter_by(q: float) -> None:
    """1000 samples of 2000 values: their quantiles' standard deviation, known to 2 %, and the mean of the errors.

    The error is a distance of order statistics whose own expectation differs from the deviation by the density's change
    over the interval: at 99 % of an exponential distribution (20 values above, 4.4 of them one deviation) by some 5 %.
    """
    rng = np.random.default_rng(1)
    found = [quantile(rng.exponential(size=2000), q) for _ in range(1000)]
    scatter = np.std([estimate.value for estimate in found])
    assert np.mean([estimate.error for estimate in found]) == pytest.approx(scatter, rel=0.1)


def test_errors_of_means_are_what_samples_scatter_by() -> None:
    rng = np.random.default_rng(2)
    found = [mean(rng.exponential(size=500)) for _ in range(1000)]
    scatter = np.std([estimate.value for estimate in found])
    assert np.mean([estimate.error for estimate in found]) == pytest.approx(scatter, rel=0.1)  # 4 times its own error
