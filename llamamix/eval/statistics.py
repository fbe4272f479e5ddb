"""Statistics of scores, with their standard errors. Pure arithmetic.

The means, their errors and that of the ratio of perplexities are those of llama-perplexity: positions count as
independent of each other, which those of one text are not quite, so that the errors are somewhat too small.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A value and its standard error; None: there are too few positions to know it."""

    value: float
    error: float | None


def mean(values: np.ndarray) -> Estimate:
    """The mean of n values; its error is the standard deviation (of the values as they are) over sqrt(n - 1)."""
    n = len(values)
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(n - 1)) if n > 1 else None)


def share(flags: np.ndarray) -> Estimate:
    """How many of n flags are set, from 0 to 1; the error is that of a binomial distribution."""
    n, p = len(flags), float(flags.mean())
    return Estimate(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None)


def quantile(values: np.ndarray, q: float) -> Estimate:
    """The value below which a share q of n values lies, linear between neighbours.

    How many of n values lie below it is binomial, with the mean n q and the standard deviation sqrt(n q (1 - q)). So
    the values of those ranks, one deviation below and above, enclose it in two of three cases, whatever their
    distribution (Conover, Practical Nonparametric Statistics, 3rd edition, 3.2); half their distance is the error.
    Where there is no value of the higher rank the largest stands for it, and the error is a lower bound; None where the
    rank itself is beyond the largest but one, so that nothing is known.
    """
    ordered = np.sort(values)
    n = len(ordered)
    middle, spread = q * (n - 1), math.sqrt(n * q * (1 - q))
    value = _at(ordered, middle)
    if n < 2 or middle > n - 2:
        return Estimate(value, None)
    return Estimate(value, (_at(ordered, middle + spread) - _at(ordered, middle - spread)) / 2)


def perplexity(nll: np.ndarray) -> Estimate:
    """exp(mean), the error by the derivative."""
    log, error = mean(nll)
    return Estimate(math.exp(log), None if error is None else math.exp(log) * error)


def perplexity_ratio(nll: np.ndarray, nll_ref: np.ndarray) -> Estimate:
    """The perplexity as a multiple of the reference's: exp of the mean difference, position by position.

    That difference's variance is var(nll) + var(nll_ref) - 2 cov(nll, nll_ref), as llama-perplexity has it.
    """
    return perplexity(nll - nll_ref)


def _at(ordered: np.ndarray, rank: float) -> float:
    rank = min(max(rank, 0.0), len(ordered) - 1.0)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (rank - low) * (ordered[high] - ordered[low]))
