"""How far two ways to compute the same may be apart, and how much of what a type of rows does may be missed."""

from __future__ import annotations

from functools import cache

import numpy as np

from .attention_cases import COARSE, Case
from .rows import GRIDS, quantise

F32 = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}

# Two runs in F32 that differ in how tokens are batched differ in the order of sums alone. A sum of at most 400 products is
# off by at most 400 * 2**-24 of its magnitudes; with gains below 10 over the 2 layers, logits whose standard deviation is
# 3 are off by less than 400 * 2**-24 * 10 * 3.
F32_LOGITS = 7e-4

# The order of sums: sqrt(512) * 2**-24 = 1.3e-6 of values 3 in size, times 5 for two layers with queries of twice unit
# size, times 5 for the largest of many errors. A missing row of 500 changes logits by 1e-2 and more.
ATOL = 1.3e-6 * 3 * 5 * 5

# a value of a unit-variance row is off by about this where ggml computes in F32 and the reference in float64
F32_ERROR = 3e-7

# The distance of two neighbouring values that a type can store, for rows of unit variance: blocks of 32 reach to 2.5,
# or from -2.2 to 2.2, in so many steps. For the floating point types half the distance of neighbours between 1 and 2;
# for iq4_nl that of most values, which are in the middle of its table.
STEP = {
    "q4_0": 2.5 / 8,
    "q4_1": 4.4 / 15,
    "iq4_nl": 2.5 / 127 * 12,
    "q5_0": 2.5 / 16,
    "q5_1": 4.4 / 31,
    "q8_0": 2.5 / 127,
    "bf16": 2**-8,
    "f16": 2**-11,
}


@cache
def flips(kv_type: str) -> float:
    """How much of the effect of storing rows in a type may be missed, as a ratio of root mean squares.

    A value that is off by e ends up on the wrong side of a border with a probability of 2 * e / step, and is a step off
    then. Storing it is step / sqrt(12) off in any case. Where scales are searched, a block may also get another one that
    is as good, and all its values change: how often is found by trying. The factor is for rows of later layers, which are
    off by more.
    """
    if kv_type in GRIDS:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(20_000, 32))
        stored, other = (quantise(x + F32_ERROR * e, kv_type) for e in (0, rng.normal(size=x.shape)))
        return 4 * rms(other - stored) / rms(stored - x)
    return 4 * np.sqrt(12 * 2 * F32_ERROR / STEP[kv_type])


# The fused kernel may round a value of the query to one of 127 steps to the largest of its block, where K has values of 4
# or 5 bits. Relative to the size of the values, the largest are alike: the query's rounding changes scores by the ratio
# of the steps times what K's does. Twice that is for single tokens that see more cold rows than the average, and for
# later layers.
QUERY = 2.5 / 127


# Where it multiplies in BF16 it rounds both values of a product by 0.41 * 2**-8 of themselves on the average.
BF16 = 0.41 * np.sqrt(2) * 2**-8


def allowance_k(attn: str, cold_k: str, head_size: int = 64) -> float:
    """How much of the effect of storing K in a type the kernel may add, whether query rows are few or many."""
    if attn != "fused":
        return 0.0
    many, _ = Case(cold_k=cold_k, n_tokens=40).products(None)
    by_query = 2 * QUERY / STEP[cold_k] if many == "int" or (cold_k in COARSE and head_size % 64 == 0) else 0.0
    return max(by_query, 2 * BF16 * np.sqrt(12) / STEP[cold_k] if many == "bf16" else 0.0)


def allowance_v(attn: str, cold_v: str) -> float:
    """The same for V."""
    _, many = Case(cold_v=cold_v, n_tokens=40).products(None)
    return 2 * BF16 * np.sqrt(12) / STEP[cold_v] if attn == "fused" and many == "bf16" else 0.0


def allowance(attn: str, cold: str = "q4_0", head_size: int = 64) -> float:
    """The same for both: what is added is independent, and neither has more effect alone than both have together."""
    return float(np.hypot(allowance_k(attn, cold, head_size), allowance_v(attn, cold)))


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
