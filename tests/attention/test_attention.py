"""The fused attention kernel against attention in float64 over the same rows.

The kernel computes in F32, with two exceptions where there are at most 16 query rows to a KV head: for quantised K and
heads of whole pairs of blocks the query is rounded to 8 bits (for Q8_0 to 16), for quantised V the weights are to 16
bits. For more query rows some instruction sets round the query to 8 bits as well, and others multiply with quantised rows of
four and five bits in BF16. What that may do to an output is derived in bounds() from the data of each case: how much it is at most, and
typically.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from helpers.allowances import BF16, rms
from helpers.attention_cases import (
    ALL_ISAS,
    AXES,
    BLOCK,
    COARSE,
    ISAS,
    OTHER_PRODUCTS,
    TILE,
    Case,
    Data,
    by_cell,
    make_data,
    pairwise,
    rotations,
)
from helpers.attention_reference import MINIMA, Expected, by_kv_head, reference, scales, to_out
from helpers.paths import ROOT
from helpers.processes import environment, library_dir

from llamamix import ParamsError, ggml
from llamamix._ffi import ffi, lib
from llamamix.attention import Attention, FlashAttnExt, attention
from llamamix.formats import FORMATS

U = 2.0**-24  # an F32 operation is off by this share of its result at most
# rows of these meet few query rows as they are stored
WHOLE_NUMBERS = ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q8_0")
B = 2.0**-8  # and rounding to BF16
EXP = 4e-7  # so is the kernel's e^x, beside what rounding x does


#
# what the kernel may be off by
#


def bounds(data: Data, expected: Expected, isa: str | None = None) -> tuple[np.ndarray, float]:
    """The most that each output may be off by, and the root mean square that is to be expected."""
    c = data.case
    products_k, products_v = c.products(isa)
    p = np.where(expected.p < 1e-30, 0, expected.p)  # (subnormal numbers are slow)
    q, k, v = by_kv_head(data, data.q)
    o = p @ v
    n_kv = p.shape[-1]

    # cold rows are met as they are stored, by a query that is rotated, and their sum is rotated back
    rot_k, rot_v = rotations(c)
    cold, hot = slice(0, c.n_cold), slice(c.n_cold, n_kv)
    q_cold, k_cold, v_cold = q @ rot_k, rot_k @ k[..., cold], v[..., cold, :] @ rot_v
    mean = np.zeros_like(k_cold) if data.means is None else by_cell(data.means, c.n_cold).transpose(0, 2, 3, 1)[:, :, None]
    stored = k_cold - mean

    def dot(f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """f(Q) f(K^T), of numbers as the kernel multiplies them."""
        return np.concatenate([f(q_cold) @ (f(stored) + f(mean)), f(q) @ f(k[..., hot])], axis=-1)

    def out(f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """f(P) f(V), likewise."""
        return f(p[..., cold]) @ f(v_cold) @ f(rot_v) + f(p[..., hot]) @ f(v[..., hot, :])

    def sum_abs(w: np.ndarray) -> np.ndarray:
        """Of w (v - o), at most."""
        return w @ np.abs(v) + w.sum(axis=-1, keepdims=True) * np.abs(o)

    def sum_sq(w: np.ndarray) -> np.ndarray:
        """Of (w (v - o))^2."""
        w2 = np.square(w)
        return np.maximum(w2 @ np.square(v) - 2 * (w2 @ v) * o + w2.sum(axis=-1, keepdims=True) * np.square(o), 0)

    # An output is o = sum of p v. A score that is off by e changes p by p (e - mean of e), and o by p e (v - o).
    # A score is a sum of n products in F32, whose partial sums are off by U each, with the scale multiplied in before;
    # for random signs the partial sum of i products is sqrt(i) of them in size, and its error uniform up to U of that,
    # which adds up to U sqrt(n / 6) times the size of the sum. The mask is added, the maximum subtracted, e^x taken.
    live = p > 0
    x = np.where(live, expected.x, 0)
    below = np.where(live, x.max(axis=-1, keepdims=True) - x, 0)  # (masked cells may make the maximum 0: still a bound)
    n = c.n_embd_k
    n_other = 4 if data.means is None else 6  # the mean is added to the row, or to the score
    cap = 1.0 if not c.logit_softcap else 1 - np.square(np.tanh(expected.dot / c.logit_softcap))
    other = U * (np.abs(x) + 4 * below) + EXP + 4.2e-7 * c.logit_softcap  # tanh: e^2x, and a quotient
    worst = p * (U * (n + n_other) * data.scale * cap * dot(np.abs) + U * np.abs(x) + other)
    typical = p * (U * math.sqrt(n / 6 + n_other) * data.scale * cap * np.sqrt(dot(np.square)) + U * np.abs(x))
    worst_out = 2 * sum_abs(worst)  # 2: what is not linear
    square = sum_sq(typical + p * other / 2) + np.square(sum_abs(p * EXP / 4))

    # The sums of p v and p, in F32 as well; the latter has no signs, so that partial sums grow with i.
    worst_out += 2 * U * (n_kv + 20) * out(np.abs)
    square += np.square(U) * (n_kv / 6 * out(np.square) + (n_kv / 12 + 8) * np.square(o))

    def with_cold(e: np.ndarray) -> np.ndarray:
        """What an error of the dot products with cold rows makes of the weights."""
        return p * data.scale * cap * np.concatenate([e, np.zeros((*e.shape[:-1], c.n_hot))], axis=-1)

    def roundings(n_rot: int) -> float:
        """A rotation multiplies by the inverse of a root, both rounded, and adds two values or sums at a time."""
        return 3 + math.log2(n_rot)

    if c.n_rot_k:
        n_sums = roundings(c.n_rot_k)
        worst_out += 2 * sum_abs(with_cold(U * n_sums * (np.abs(q) @ np.abs(rot_k) @ np.abs(k_cold))))
        square += sum_sq(with_cold(U * np.sqrt(n_sums / 6 * (np.square(q) @ np.square(rot_k) @ np.square(k_cold)))))
    if c.n_rot_v:
        n_sums = roundings(c.n_rot_v)
        o_cold = p[..., cold] @ v_cold
        worst_out += U * n_sums * (np.abs(o_cold) @ np.abs(rot_v))
        square += np.square(U) * n_sums / 6 * (np.square(o_cold) @ np.square(rot_v))

    if (c.direct and c.cold_k in WHOLE_NUMBERS and n % (2 * BLOCK) == 0) or products_k == "int":
        # The query is rounded to whole steps of 1/127 (for Q8_0 1/32512) of a block's largest value. What random
        # roundings of that kind do on the average is taken from the reference.
        blocks = q_cold.reshape(*q.shape[:-1], -1, BLOCK)
        n_steps = 127 * 255 + 127 if c.cold_k == "q8_0" else 127
        step = np.repeat(np.abs(blocks).max(axis=-1) / n_steps, BLOCK, axis=-1)
        worst_out += 2 * sum_abs(with_cold((step / 2) @ np.abs(stored)))
        rng = np.random.default_rng(1)
        samples = [with_cold((step * rng.uniform(-0.5, 0.5, step.shape)) @ stored) for _ in range(16)]
        square += np.mean([np.square(w @ v - w.sum(axis=-1, keepdims=True) * o).mean() for w in samples])
        if c.cold_k in MINIMA and c.n_cold > 0:
            # Steps and minima are multiplied apart, and cancel each other in part: for each block a product and two
            # sums are rounded, and the reference has rounded their sums.
            _, low = scales(data.cold[0], c.cold_k)
            low = low.swapaxes(-1, -2)
            size = np.abs(stored - low) + np.abs(low)
            worst_out += 2 * sum_abs(with_cold(4 * U * (np.abs(q_cold) @ size)))
            square += sum_sq(with_cold(U * np.sqrt(np.square(q_cold) @ np.square(size))))

    if c.direct and c.cold_v in WHOLE_NUMBERS and c.n_cold > 0:
        # A weight times its block's scale is rounded to a whole number of units. A unit is the 32767th part of the
        # largest possible one, within a factor of 2, of the tile.
        d, low = scales(data.cold[1], c.cold_v)
        low += MINIMA.get(c.cold_v, 0) * d  # whole numbers are those of steps from the middle
        for start in range(0, c.n_cold, TILE):
            tile = slice(start, min(start + TILE, c.n_cold))
            most = p[..., tile].max(axis=-1, keepdims=True)
            unit = 2 * most * d[..., tile, :].max(axis=-2, keepdims=True) / 32767
            with np.errstate(invalid="ignore", divide="ignore"):
                code = np.nan_to_num((v_cold - low)[..., tile, :] / d[..., tile, :])
            worst_out += 0.51 * (unit * np.abs(code).sum(axis=-2, keepdims=True)) @ np.abs(rot_v)
            square += (np.square(unit) / 12 * np.square(code).sum(axis=-2, keepdims=True)) @ np.square(rot_v)
        if c.cold_v in MINIMA:
            # weighted middles are added up in F32, as in the sums of p v
            total = p[..., cold] @ np.abs(low)
            worst_out += 2 * U * (n_kv + 20) * total @ np.abs(rot_v)
            square += np.square(U) * (n_kv / 12 + 8) * np.square(total) @ np.square(rot_v)

    # Rounded to BF16 a number is off by 2**-8 of itself at most, and 0.41 of that on the average; so are both of a product.
    most, mean = 2 * B + B**2, BF16
    if products_k == "bf16":
        worst_out += 2 * sum_abs(with_cold(most * (np.abs(q_cold) @ np.abs(stored))))
        square += sum_sq(with_cold(mean * np.sqrt(np.square(q_cold) @ np.square(stored))))
    if products_v == "bf16":
        worst_out += most * (p[..., cold] @ np.abs(v_cold)) @ np.abs(rot_v)
        square += mean**2 * (np.square(p[..., cold]) @ np.square(v_cold)) @ np.square(rot_v)

    if c.skips:
        # Of these cells V may be left unread. The kernel's weights are off by what its scores are: 2 is far more.
        dropped = np.where(p[..., cold] <= 2 * c.v_skip / n_kv, p[..., cold], 0)
        worst_out += dropped @ np.abs(v[..., cold, :])
        square += np.square(dropped) @ np.square(v[..., cold, :])

    return to_out(c, worst_out), math.sqrt(square.mean())


# Root mean squares are over at least 16 outputs of one query row, which may all have a few common causes; those of many
# rows are below what is to be expected, which leaves nothing out.
CHANCE = 3.0


def assert_within(actual: np.ndarray, data: Data, expected: Expected, limits: tuple[np.ndarray, float]) -> None:
    error = np.abs(actual - expected.out)
    worst, typical = limits
    assert np.isfinite(actual).all()
    assert (error <= worst).all(), f"{(error / np.maximum(worst, 1e-30)).max():.3g} times the most there may be"
    assert rms(error) <= CHANCE * typical, f"{rms(error) / typical:.3g} times what is to be expected"
    dead = expected.p.sum(axis=-1) == 0
    if dead.any():  # exactly 0, as ggml has it
        assert not actual[dead.transpose(0, 3, 1, 2).reshape(actual.shape[:3])].any()


CASES = pairwise()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_case(case: Case) -> None:
    """Within the bounds on every instruction set, and the same bits for any number of threads."""
    data = make_data(case)
    expected = reference(data)
    for isa in ALL_ISAS:
        base = OTHER_PRODUCTS.get(isa.removeprefix("emulated "))
        if base and case.products(isa) == case.products(base):
            continue  # the same code
        actual = data.compute(isa)
        assert_within(actual, data, expected, bounds(data, expected, isa))
        assert data.compute(isa, case.n_threads).tobytes() == actual.tobytes()


@pytest.mark.parametrize("axis", AXES)
def test_every_value_is_among_the_cases(axis: str) -> None:
    assert {getattr(case, axis) for case in CASES} == set(AXES[axis])


def test_the_instruction_sets_agree() -> None:
    """Better than they need to: where the query is rounded, all round it in the same way."""
    for cold, n_tokens in itertools.product(FORMATS, (1, 40)):
        data = make_data(Case(cold_k=cold, cold_v="f16", n_tokens=n_tokens))
        exact = make_data(Case(cold_k="f16", cold_v="f16", n_tokens=n_tokens))
        _, typical = bounds(exact, reference(exact))
        results = [data.compute(isa) for isa in ALL_ISAS if data.case.products(isa) == data.case.products(ISAS[-1])]
        assert results
        assert all(rms(result - results[0]) < 2 * CHANCE * typical for result in results)


@pytest.mark.parametrize("cold", COARSE)
def test_what_may_be_rounded_is(cold: str) -> None:
    """Where the bounds allow for a rounding there is one: they are no wider than they need to be."""
    data = make_data(Case(cold_k=cold, cold_v=cold, n_tokens=40, n_hot=0))
    expected = reference(data)
    for isa in ALL_ISAS:
        _, typical = bounds(data, expected, isa)
        if data.case.products(isa) != ("float", "float"):
            assert rms(data.compute(isa) - expected.out) > typical / CHANCE


@pytest.mark.parametrize("name", ["amx", "avx512bf16", "avx512", "avxvnni", "avx2", "neonbf16", "dotprod", "neon", "generic"])
def test_the_best_instruction_set_is_the_default(name: str) -> None:
    data = make_data(Case(n_tokens=40))
    if name in ISAS:
        assert (data.compute(name).tobytes() == data.compute().tobytes()) == (name == ISAS[0])
    else:
        with pytest.raises(ParamsError, match=f"isa must be one of {', '.join(ISAS)} or None, not '{name}'"):
            data.compute(name)


#
# what random numbers do not meet
#


def check(data: Data, signs: bool = True) -> None:
    """signs: those of what is added up are random."""
    expected = reference(data)
    for isa in ALL_ISAS:
        worst, typical = bounds(data, expected, isa)
        assert_within(data.compute(isa, 2), data, expected, (worst, typical if signs else math.inf))


DIRECT_AND_NOT = [1, 40]
STORED = ["f16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]


@pytest.mark.parametrize("n_tokens", DIRECT_AND_NOT)
@pytest.mark.parametrize("cold", STORED)
def test_scores_that_are_far_apart(cold: str, n_tokens: int) -> None:
    """Weights from 1 to less than the smallest number, in ascending and descending order of the cells."""
    for sign in (-1, 1):
        data = make_data(Case(cold_k=cold, cold_v=cold, n_tokens=n_tokens, mask="causal", mask_dtype="float32"))
        assert data.mask is not None
        data.mask += sign * np.linspace(0, 400, data.mask.shape[2], dtype=np.float32)
        check(data)


@pytest.mark.parametrize("n_tokens", DIRECT_AND_NOT)
def test_masks_that_are_finite(n_tokens: int) -> None:
    """-65504, the lowest F16, is not -inf: a token whose cells all have it sees them all alike."""
    for mask_dtype in ("float16", "float32"):
        data = make_data(Case(n_tokens=n_tokens, mask="sparse", mask_dtype=mask_dtype))
        assert data.mask is not None
        data.mask[np.isinf(data.mask)] = -65504
        data.mask[:, -1] = -65504
        check(data)


@pytest.mark.parametrize("n_tokens", DIRECT_AND_NOT)
@pytest.mark.parametrize("cold", STORED)
def test_zeros(cold: str, n_tokens: int) -> None:
    for what in ("q", "k", "v"):
        data = make_data(Case(cold_k=cold, cold_v=cold, n_tokens=n_tokens))
        if what == "q":
            data.q[:] = 0
        else:
            zero = ggml.quantize(np.zeros((1, 500, 2, 64)), cold)
            i = "kv".index(what)
            data.cold = tuple(zero.data if j == i else x for j, x in enumerate(data.cold))  # type: ignore[assignment]
            getattr(data, what)[:, :500] = zero.dequantize()
        check(data)


@pytest.mark.parametrize("n_tokens", DIRECT_AND_NOT)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(
    ("cold", "byte", "value"),
    [
        ("q4_0", 0x00, -8), ("q4_0", 0xFF, 7), ("iq4_nl", 0x00, -127), ("iq4_nl", 0xFF, 113),
        ("q5_0", 0x00, -16), ("q5_0", 0xFF, 15), ("q8_0", 0x80, -128), ("q8_0", 0x7F, 127),
        ("q4_1", 0x00, 0), ("q4_1", 0xFF, 15), ("q5_1", 0x00, 0), ("q5_1", 0xFF, 31),
    ],
)  # fmt: skip
def test_sums_of_the_largest_integers(cold: str, byte: int, value: int, sign: int, n_tokens: int) -> None:
    """Query and values at the ends of their ranges: sums in 16 bits must not overflow."""
    data = make_data(Case(cold_k=cold, cold_v=cold, n_tokens=n_tokens, n_embd_k=256, n_embd_v=256))
    data.q[:] = np.float32(sign) * np.linspace(0.5, 1.5, data.q.shape[2], dtype=np.float32)[:, None]
    for rows, values in zip(data.cold, (data.k, data.v), strict=True):
        blocks = rows.reshape(1, 500, 2, 8, -1)  # [..., block, bytes]: a view
        blocks[..., 4 if cold in MINIMA else 2 :] = byte
        numbers = blocks[..., :4].copy().view(np.float16).astype(np.float64)  # a scale, and a minimum where it has one
        block = value * numbers[..., 0] + (numbers[..., 1] if cold in MINIMA else 0)
        values[:, :500] = np.repeat(block, BLOCK, axis=-1)
    check(data, signs=False)


@pytest.mark.parametrize("n_tokens", DIRECT_AND_NOT)
@pytest.mark.parametrize("cold", ["q4_0", "iq4_nl", "q5_0", "q8_0"])
def test_scales_of_any_size(cold: str, n_tokens: int) -> None:
    """Blocks of one tile whose scales differ by 2**20, subnormal ones and negative ones."""
    data = make_data(Case(cold_k=cold, cold_v=cold, n_tokens=n_tokens))
    rng = np.random.default_rng(2)
    for rows, values in zip(data.cold, (data.k, data.v), strict=True):
        blocks = rows.reshape(1, 500, 2, 2, -1)
        d = (rng.choice([-1, 1], size=(1, 500, 2, 2, 1)) * 2.0 ** rng.uniform(-23, -2, (1, 500, 2, 2, 1))).astype("f2")
        before = blocks[..., :2].copy().view(np.float16).astype(np.float64)
        blocks[..., :2] = d.view(np.uint8)
        values[:, :500] *= np.repeat(d.astype(np.float64) / before, BLOCK, axis=-1).reshape(1, 500, 2, 64)
    check(data)


@pytest.mark.parametrize("n_head", [1, 3, 6, 12, 71])
def test_alibi_with_any_number_of_heads(n_head: int) -> None:
    """Heads beyond a power of 2 have slopes of their own."""
    check(make_data(Case(n_gqa=1, n_head_kv=n_head, n_tokens=3, mask="causal", max_bias=8.0)))


@pytest.mark.parametrize("n_tokens", DIRECT_AND_NOT)
def test_a_sink_that_takes_it_all(n_tokens: int) -> None:
    data = make_data(Case(n_tokens=n_tokens, mask="sparse", sinks=True))
    assert data.sinks is not None
    data.sinks[:] = [1000, -1000, 60, 0, -np.inf, 8, 8, 8]
    data.mask[:, 0] = -np.inf  # type: ignore[index]
    check(data)


@pytest.mark.parametrize("n_tokens", DIRECT_AND_NOT)
@pytest.mark.parametrize("cold", ["f16", "q4_0", "iq4_nl", "q5_1"])
def test_any_stride(cold: str, n_tokens: int) -> None:
    """Parts of larger arrays, dimensions in any order, odd addresses: the same bits."""
    data = make_data(Case(cold_k=cold, cold_v=cold, n_tokens=n_tokens, n_stream=2, mask="causal", sinks=True))
    result = data.compute()

    def inside(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        """The same array within a larger one that has its axes in another order."""
        shape = [array.shape[i] + 3 for i in axes]
        n_bytes = math.prod(shape) * array.itemsize
        whole = np.full(n_bytes + 1, 0xFF, np.uint8)[1:].view(array.dtype).reshape(shape)  # NaN in every float type
        back = tuple(np.argsort(axes))
        part = whole[tuple(slice(1, 1 + array.shape[i]) for i in axes)].transpose(back)
        part[:] = array
        return part

    assert data.mask is not None and data.sinks is not None
    data.q = inside(data.q, (2, 1, 0, 3))
    data.cold = inside(data.cold[0], (1, 0, 2, 3)), inside(data.cold[1], (2, 1, 0, 3))
    data.hot = inside(data.hot[0], (0, 2, 1, 3)), inside(data.hot[1], (0, 1, 2, 3))[::1]
    data.mask = inside(data.mask, (1, 0, 2))
    data.sinks = inside(data.sinks, (0,))
    assert data.compute().tobytes() == result.tobytes()
    data.q, data.mask = np.asfortranarray(data.q), data.mask[:, ::-1][:, ::-1].astype(">f2")
    assert data.compute().tobytes() == result.tobytes()


# Every array ends where memory ends that may be read; what is read behind it ends the program.
PROGRAM = """
import ctypes, itertools, mmap
import numpy as np
from helpers.attention_cases import ISAS, Case, make_data

libc = ctypes.CDLL(None, use_errno=True)
keep = []

def at_the_end(array):
    n_pages = -(-array.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (n_pages + 1) * mmap.PAGESIZE)
    keep.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + n_pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    start = n_pages * mmap.PAGESIZE - array.nbytes
    res = np.frombuffer(memory, np.uint8)[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    res[:] = array
    return res

for kv_type, n_tokens, (n_cold, n_hot), n_embd in itertools.product(
    ["q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1", "q8_0", "f16", "f32"],
    [1, 40],
    [(64, 1), (63, 64), (5, 3), (0, 7), (299, 70)],
    [64, 96],
):
    case = Case(
        cold_k=kv_type, cold_v=kv_type, n_embd_k=n_embd, n_embd_v=n_embd, n_cold=n_cold, n_hot=n_hot, n_head_kv=1,
        n_tokens=n_tokens, mask="causal", sinks=True, v_skip=0.1,
    )
    data = make_data(case)
    expected = [data.compute(isa).tobytes() for isa in ISAS]
    data.q, data.mask, data.sinks = at_the_end(data.q), at_the_end(data.mask), at_the_end(data.sinks)
    data.cold, data.hot = tuple(map(at_the_end, data.cold)), tuple(map(at_the_end, data.hot))
    assert [data.compute(isa).tobytes() for isa in ISAS] == expected
print("end")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect()")
def test_nothing_is_read_behind_the_arrays() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "end\n", f"exit code {result.returncode}: {result.stderr[-2000:]}"


#
# what these tests would notice
#


def drop(start: int, end: int) -> Callable[[Data], Data]:
    def tamper(data: Data) -> Data:
        mask = np.zeros((1, data.case.n_tokens, data.k.shape[1]), np.float16)
        mask[:, :, start:end] = -np.inf
        return replace(data, mask=mask)

    return tamper


def with_case(**changes: Any) -> Callable[[Data], Data]:
    return lambda data: replace(data, case=replace(data.case, **changes))


def one_scale(data: Data) -> Data:
    rows = data.cold[1].copy()
    d = rows[0, 100, :, :2].copy().view(np.float16)
    rows[0, 100, :, :2] = (d * np.float16(1.5)).view(np.uint8)  # of one block of one cell
    return replace(data, cold=(data.cold[0], rows))


def halves_swapped(data: Data) -> Data:
    """Low nibbles for high ones in a single cell."""
    rows = data.cold[0].copy()
    blocks = rows[0, 100].reshape(2, 2, 18)
    blocks[..., 2:] = blocks[..., 2:] >> 4 | blocks[..., 2:] << 4
    return replace(data, cold=(rows, data.cold[1]))


def fifth_bits_swapped(data: Data) -> Data:
    """Those of the low nibbles for those of the high ones, in four cells."""
    rows = data.cold[0].copy()
    blocks = rows[0, 100:104].reshape(4, 2, 2, 22)
    blocks[..., 2:6] = blocks[..., [4, 5, 2, 3]]
    return replace(data, cold=(rows, data.cold[1]))


def other_values(data: Data) -> Data:
    """The value next to each in the table, in 32 cells."""
    rows = data.cold[0].copy()
    rows[0, 100:132].reshape(32, 2, 2, 18)[..., 2:] ^= 0x11
    return replace(data, cold=(rows, data.cold[1]))


TAMPERS: dict[str, Callable[[Data], Data]] = {
    "scale": lambda data: replace(data, scale=data.scale * 1.02),
    "last tile": drop(564, 627),
    "one tile": drop(128, 192),
    "one cell": drop(300, 301),
    "last cell": drop(626, 627),
    "no sinks": lambda data: replace(data, sinks=None),
    "sinks of other heads": lambda data: replace(data, sinks=np.roll(data.sinks, 1)),
    "no cap": with_case(logit_softcap=0.0),
    "one scale of V": one_scale,
    "halves of K swapped": halves_swapped,
    "fifth bits of K swapped": fifth_bits_swapped,
    "other values of K": other_values,
    "heads swapped": lambda data: replace(data, hot=(data.hot[0], data.hot[1][:, :, ::-1])),
    "cold for hot": lambda data: replace(data, hot=(data.hot[0], data.hot[1][:, ::-1])),
    "K not rotated": with_case(n_rot_k=0),
    "V not rotated": with_case(n_rot_v=0),
    "rotated in smaller blocks": with_case(n_rot_v=32),
    "no means": lambda data: replace(data, means=None),
    "means of other pages": lambda data: replace(data, means=data.means[:, ::-1]),
    "means of other heads": lambda data: replace(data, means=data.means[:, :, ::-1]),
}


@pytest.mark.parametrize("n_tokens", DIRECT_AND_NOT)
@pytest.mark.parametrize("name", TAMPERS)
def test_small_mistakes_would_show(name: str, n_tokens: int) -> None:
    types = {"halves of K swapped": "q4_0", "fifth bits of K swapped": "q5_0", "other values of K": "iq4_nl"}
    cold_k = types.get(name, "f16")
    rows = dict(sinks=True, logit_softcap=20.0, q_size=1.0, n_rot_k=64, n_rot_v=64, mean=0.3)
    cold_v = "f16" if name == "no sinks" else "q4_0"  # rounded weights would hide so little
    data = make_data(Case(cold_k=cold_k, cold_v=cold_v, n_tokens=n_tokens, **rows))
    expected = reference(data)
    limits = bounds(data, expected)
    assert_within(data.compute(), data, expected, limits)
    with pytest.raises(AssertionError, match="times"):
        assert_within(TAMPERS[name](data).compute(), data, expected, limits)


def test_a_mask_of_another_token_would_show() -> None:
    data = make_data(Case(n_tokens=40, mask="causal", max_bias=8.0))
    expected = reference(data)
    limits = bounds(data, expected)
    assert_within(data.compute(), data, expected, limits)
    for tampered in (replace(data, mask=np.roll(data.mask, 1, axis=1)), with_case(max_bias=7.8)(data)):
        with pytest.raises(AssertionError, match="times"):
            assert_within(tampered.compute(), data, expected, limits)


#
# ggml's own kernel
#


@pytest.mark.parametrize("n_tokens", DIRECT_AND_NOT)
@pytest.mark.parametrize(
    "changes",
    [
        {"mask": "sparse"},
        {"mask": "causal", "max_bias": 8.0, "n_gqa": 3},
        {"logit_softcap": 20.0},
        {"mask": "sparse", "sinks": True},
        {"mask": "sequences", "n_stream": 2, "max_bias": 4.0, "logit_softcap": 5.0, "sinks": True, "n_embd_v": 128},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_is_computed_is_what_ggml_computes(changes: dict[str, Any], n_tokens: int) -> None:
    """With F32 rows both kernels round little, so that a bias, a cap or a sink of another meaning shows."""
    case = Case(n_cold=0, n_hot=300, hot_k="f32", hot_v="f32", n_tokens=n_tokens, **changes)
    data = make_data(case)
    expected = reference(data)
    worst, typical = bounds(data, expected)
    k, v = data.hot
    with FlashAttnExt(
        data.q, k, v, types="f32", mask=data.mask, sinks=data.sinks, scale=data.scale,
        logit_softcap=case.logit_softcap, max_bias=case.max_bias,
    ) as flash:  # fmt: skip
        theirs = flash.compute().copy()
    assert_within(data.compute(), data, expected, (worst, typical))
    # ggml adds up cell by cell, which is off by more than what the bounds allow for
    assert rms(theirs - expected.out) < 10 * typical + 1e-6


@cache
def errors(kv_type: str, n_tokens: int) -> tuple[float, float, float]:
    """Ours, ggml's, and the distance of both, relative to the outputs' size."""
    squares = np.zeros(4)
    for seed in range(8):
        data = make_data(
            Case(hot_k="f16", n_cold=640, n_hot=0, cold_k=kv_type, cold_v=kv_type, n_tokens=n_tokens, seed=seed)
        )
        expected = reference(data).out
        ours = data.compute()
        with FlashAttnExt(data.q, *data.cold, types=kv_type, scale=data.scale) as flash:
            theirs = flash.compute()
            squares += np.square([rms(x) for x in (ours - expected, theirs - expected, ours - theirs, expected)])
    return tuple(np.sqrt(squares[:3] / squares[3]))


@pytest.mark.parametrize("n_tokens", [1, 64])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"])
def test_the_error_is_not_above_ggmls(kv_type: str, n_tokens: int, record_property: Callable) -> None:
    ours, theirs, distance = errors(kv_type, n_tokens)
    record_property("ours", float(ours))
    record_property("ggml", float(theirs))
    if kv_type not in ("f16", "q8_0") and n_tokens == 1:
        # Both round the query to the same 8 bits, so that the errors are nearly the same. ggml rounds its scales and
        # sums to F16 (2**-12 of scores that are 2 in size) and we the weights (to 2**-15 of the largest): smaller than
        # the query's error by an order, and of independent signs, they move the whole by less than their square.
        assert distance < 0.1 * theirs
        assert ours < theirs * (1 + 0.1**2)
    else:
        # ggml adds up F16 rows in F16 (2**-11 of each partial sum) unless there are many tokens, when it is as exact as
        # we are, but for the order of the sums; and rounds the query to 8 bits for any number of tokens (2**-8 of a
        # block's largest value); we round weights of Q8_0 rows to 2**-15 of the largest where tokens are few
        share = 1.0 if n_tokens == 64 and kv_type == "f16" else 2**-4 if n_tokens == 1 and kv_type == "q8_0" else 1e-2
        products = Case(cold_k=kv_type, cold_v=kv_type, n_tokens=n_tokens).products(None)
        if products[0] != "float":
            share = 1.0  # 8 bits of every number, or of a block's largest one: as ggml's query, which is all that is off then
        # where the query is rounded as ggml's is, and V beside that to BF16 (see bounds()), the squares add up
        beside = BF16 if products == ("int", "bf16") else 0.0
        assert ours < math.hypot(share * theirs, beside)


#
# what is refused
#


def arguments(**changes: Any) -> dict[str, Any]:
    data = make_data(Case(mask="causal", sinks=True, n_tokens=2))
    return {
        "q": data.q, "cold": data.cold, "hot": data.hot, "types": ("q4_0", "f16"), "mask": data.mask,
        "sinks": data.sinks,
    } | changes  # fmt: skip


def zeros(dtype: Any, *shape: int) -> np.ndarray:
    return np.zeros(shape, dtype)


F16_ROWS = (zeros("f2", 1, 127, 2, 64), zeros("f2", 1, 127, 2, 64))

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"q": zeros("f8", 1, 2, 8, 64)}, r"q must be a float32 array of 4 dimensions, not float64 \[1, 2, 8, 64\]"),
    ({"q": zeros("f4", 2, 8, 64)}, r"q must be a float32 array of 4 dimensions, not float32 \[2, 8, 64\]"),
    ({"q": [[[[0.0]]]]}, "q must be a float32 array of 4 dimensions, not "),
    ({"q": zeros("f4", 1, 0, 8, 64)}, "q must not be empty"),
    ({"q": zeros("f4", 1, 2, 7, 64)}, "q must have a multiple of 2 heads, not 7"),
    ({"q": zeros("f4", 1, 2, 8, 96)}, "cold must have 1 streams, 2 KV heads and heads of 96"),
    ({"q": zeros("f4", 2, 2, 8, 64)}, "cold must have 2 streams"),
    ({"cold": None, "hot": None}, "cold and hot must not both be None"),
    ({"cold": F16_ROWS}, "cold's K must be a uint8 array of 4 dimensions, not float16"),
    ({"cold": F16_ROWS[0]}, "cold must be a pair of arrays, K and V, or None"),
    ({"cold": "kv"}, "cold must be a pair of arrays"),
    ({"cold": (zeros("u1", 1, 9, 2, 35),) * 2}, "cold's K must have rows of whole q4_0 blocks of 18 bytes, not 35"),
    ({"cold": (zeros("u1", 1, 9, 2, 0),) * 2}, "cold's K must have rows of whole q4_0 blocks of 18 bytes, not 0"),
    ({"hot": (F16_ROWS[0], F16_ROWS[1][:, :100])}, "hot must have K and V of as many streams, cells and heads"),
    ({"hot": (F16_ROWS[0], F16_ROWS[1][:, :, :1])}, "hot must have K and V of as many streams, cells and heads"),
    ({"hot": (F16_ROWS[0], F16_ROWS[1].astype("f4"))}, "hot's V must be a float16 array"),
    ({"hot": (F16_ROWS[0], F16_ROWS[1][..., :32])}, r"hot must have .* heads of 64 \(K\) and 64 \(V\) values"),
    ({"hot": tuple(x[:, :, :1] for x in F16_ROWS)}, "hot must have 1 streams, 2 KV heads"),
    ({"types": "f16"}, "types must be a pair"),
    ({"types": ("q4_0",)}, "types must be a pair"),
    ({"types": ("q2_k", "f16")}, "type must be one of f32, f16"),
    ({"types": (("q4_0", "f16"), "f16")}, "cold's V must be a float16 array"),
    ({"mask": zeros("f4", 1, 2, 626)}, r"mask must be \[1, 2, 627\], not \[1, 2, 626\]"),
    ({"mask": zeros("f4", 1, 1, 627)}, r"mask must be \[1, 2, 627\]"),
    ({"mask": zeros("f8", 1, 2, 627)}, "mask must be a float32 or float16 array of 3 dimensions, not float64"),
    ({"mask": zeros("f4", 2, 627)}, "mask must be a float32 or float16 array of 3 dimensions"),
    ({"sinks": zeros("f4", 7)}, r"sinks must be \[8\], not \[7\]"),
    ({"sinks": zeros("f8", 8)}, "sinks must be a float32 array"),
    ({"scale": math.nan}, "scale must be a finite number, not nan"),
    ({"scale": "1"}, "scale must be a finite number, not '1'"),
    ({"logit_softcap": -1.0}, "logit_softcap must be from 0"),
    ({"max_bias": -1.0}, "max_bias must be from 0"),
    ({"max_bias": math.inf}, "max_bias must be a finite number"),
    ({"n_threads": 0}, "n_threads must be from 1 to 512, not 0"),
    ({"n_threads": 1.5}, "n_threads must be a whole number"),
    ({"n_rot": 64}, "n_rot must be a pair, the blocks of K and of V, not 64"),
    ({"n_rot": (0, 24)}, "n_rot must be powers of 2 from 16 that divide the heads of 64 values, not 24"),
    ({"n_rot": (8, 0)}, "n_rot must be powers of 2 from 16 that divide the heads of 64 values, not 8"),
    ({"n_rot": (128, 0)}, "n_rot must be from 0 to 64, not 128"),
    ({"isa": "sse2"}, "isa must be one of .*, not 'sse2'"),
    ({"isa": ""}, "isa must be one of .*, not ''"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED)
def test_what_can_not_be_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ParamsError, match=named):
        attention(**arguments(**changes))


def test_what_is_given_is_right() -> None:
    assert np.isfinite(attention(**arguments())).all()
    assert np.isfinite(attention(**arguments(cold=None, mask=None))).all()


@pytest.mark.parametrize(
    ("n_gqa", "n_embd", "named"),
    [
        (129, 64, "heads of more than 1024 values, or more than 128 heads to a KV head"),
        (1, 1056, "heads of more than 1024 values"),
    ],
)
def test_what_is_too_large_is_refused(n_gqa: int, n_embd: int, named: str) -> None:
    rows = (zeros("f2", 1, 3, 1, n_embd),) * 2
    with pytest.raises(ParamsError, match=named):
        attention(zeros("f4", 1, 1, n_gqa, n_embd), None, rows, types=("f16", "f16"))


@pytest.mark.parametrize("n_tokens", DIRECT_AND_NOT)
@pytest.mark.parametrize("changes", [{"n_gqa": 128, "n_head_kv": 1}, {"n_embd_k": 1024, "n_embd_v": 1024}])
def test_the_largest_that_is_not(changes: dict[str, Any], n_tokens: int) -> None:
    check(make_data(Case(n_tokens=n_tokens, n_cold=70, n_hot=70, mask="sparse", **changes)))


def args_of(field: str, value: Any) -> tuple[Any, int]:
    """The C arguments with one of them changed, and the number of threads."""
    args = Attention(**arguments())._args
    if field == "n_threads":
        return args, value
    target, names = args, field.split(".")
    for name in names[:-1]:
        target = target.seg[0] if name == "cold" else getattr(target, name)
    setattr(target, names[-1], value)
    return args, 1


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("q", ffi.NULL, "q and dst must not be NULL"),
        ("dst", ffi.NULL, "q and dst must not be NULL"),
        ("cold.k", ffi.NULL, "k and v must not be NULL"),
        ("cold.v", ffi.NULL, "k and v must not be NULL"),
        ("n_threads", 0, "n_threads=0 is below 1"),
        ("n_tokens", 0, "a size is below 1"),
        ("n_stream", -1, "a size is below 1"),
        ("n_head", 7, "n_head_kv does not divide n_head"),
        ("n_head_kv", 0, "a size is below 1"),
        ("cold.n_kv", -1, "n_kv is negative"),
        ("cold.type_k", 10, "the type 10 is not a KV cache type"),
        ("cold.type_v", -1, "the type -1 is not a KV cache type"),
        ("n_rot_k", 8, "blocks of 8 values can not be rotated in heads of 64"),
        ("n_rot_k", 48, "blocks of 48 values can not be rotated in heads of 64"),
        ("n_rot_v", 128, "blocks of 128 values can not be rotated in heads of 64"),
        ("n_rot_v", -1, "blocks of -1 values can not be rotated in heads of 64"),
        ("n_embd_k", 40, "a head of 40 values is not made of whole blocks of q4_0"),
        ("n_embd_v", 33, "a head of 33 values is not made of whole blocks of q4_0"),
    ],
)
def test_the_library_refuses_it_too(field: str, value: Any, reason: str) -> None:
    args, n_threads = args_of(field, value)
    assert lib.llama_kv_mixed_attn(args, n_threads, ffi.NULL) == -1
    assert ffi.string(lib.llama_kv_mixed_last_error()).decode() == reason
    assert lib.llama_kv_mixed_attn(Attention(**arguments())._args, 1, ffi.NULL) == 0
    assert ffi.string(lib.llama_kv_mixed_last_error()) == b""


THREADS = """
import resource, sys, threading
import numpy as np
from llamamix.attention import Attention

rng = np.random.default_rng(0)
rows = tuple(rng.standard_normal((1, 3000, 2, 64)).astype(np.float16) for _ in range(2))
q = rng.standard_normal((1, 1, 4, 64)).astype(np.float32)
attention = Attention(q, None, rows, types=("f16", "f16"))
expected = attention.compute(1).copy()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), resource.RLIM_INFINITY))
for _ in range(20):
    assert np.array_equal(attention.compute(16), expected)
# that so many can not be started
end = threading.Event()
threads = [threading.Thread(target=end.wait) for _ in range(15)]
n = 0
try:
    for thread in threads:
        thread.start()
        n += 1
except (RuntimeError, MemoryError):
    pass
end.set()
print(n)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an address space that can be limited")
@pytest.mark.skipif("LLAMAMIX_TEST_SANITIZER" in os.environ, reason="sanitizers take the address space")
@pytest.mark.parametrize("more", [7 << 20, 40 << 20], ids=["none", "a few"])
def test_threads_that_can_not_be_started_are_not_missed(more: int) -> None:
    """There is no memory for their stacks; those that there are do the work, in the same bits."""
    env = environment(LLAMAMIX_LIB_PATH=str(library_dir()), PYTHONPATH=str(ROOT))
    command = ["sh", "-c", 'ulimit -s 8192 && exec "$@"', "sh", sys.executable, "-c", THREADS, str(more)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    n = int(result.stdout)
    assert n == 0 if more < 8 << 20 else 0 < n < 15


def test_the_library_names_the_instruction_sets_it_has() -> None:
    assert lib.llama_kv_mixed_attn(Attention(**arguments())._args, 1, b"sse2") == -1
    reason = ffi.string(lib.llama_kv_mixed_last_error()).decode()
    assert reason == f"this machine does not run 'sse2' (it has {' '.join(ISAS)})"
    assert lib.llama_kv_mixed_attn(ffi.NULL, 1, ffi.NULL) == -1


def test_ggmls_kernel_is_asked_for_nothing_it_aborts_on() -> None:
    rows = {"q": zeros("f4", 1, 2, 8, 64), "k": F16_ROWS[0], "v": F16_ROWS[1], "types": "f16"}
    for changes, named in (
        ({"mask": zeros("f4", 1, 2, 127)}, "mask must be float16 for ggml, not float32"),
        ({"max_bias": 8.0}, "mask must not be None for ggml"),
        ({"k": F16_ROWS[0].astype("f4")}, "hot's K must be a float16 array"),
        ({"n_threads": 0}, "n_threads must be from 1"),
    ):
        with pytest.raises(ParamsError, match=named):
            FlashAttnExt(**rows | changes)
    flash = FlashAttnExt(**rows)
    assert not flash.compute().any()
    flash.close()
    flash.close()


#
# rows that are not finite
#


def fill(rows: np.ndarray, kv_type: str, value: float) -> None:
    """Makes all values of rows of a type this one: outright, or by the scale that each block begins with."""
    if kv_type in ("f16", "f32"):
        rows[...] = value
    else:
        n_bytes = ggml.row_size(kv_type, BLOCK)
        blocks = rows.reshape(*rows.shape[:-1], -1, n_bytes)  # a view
        blocks[..., :2] = np.array([value], np.float16).view(np.uint8)
        if value == 0 and kv_type in MINIMA:
            blocks[..., 2:4] = 0  # what is added to all values


@pytest.mark.parametrize("n_tokens", [2, 40])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", "kv")
@pytest.mark.parametrize("cold", STORED)
def test_rows_that_are_not_finite_stay_with_those_who_see_them(
    cold: str, which: str, value: float, n_tokens: int
) -> None:
    """Some cells hold NaN or infinity. Tokens that do not see them get what they would get with zeros there."""
    case = Case(cold_k=cold, cold_v=cold, n_tokens=n_tokens, mask="causal")
    side, cells = "kv".index(which), {"cold": np.r_[20:23, 110:128, 490:500], "hot": np.r_[50:60, 120:127]}
    columns = np.r_[cells["cold"], case.n_cold + cells["hot"]]
    half = n_tokens // 2

    def make(value: float) -> Data:
        data = make_data(case)
        assert data.mask is not None
        data.mask[...] = 0
        data.mask[:, half:, columns] = -np.inf
        for tier, kv_type in (("cold", cold), ("hot", case.hot_k)):
            rows = [np.array(x) for x in getattr(data, tier)]
            part = np.ascontiguousarray(rows[side][:, cells[tier]])
            fill(part, kv_type, value)
            rows[side][:, cells[tier]] = part
            setattr(data, tier, tuple(rows))
        getattr(data, which)[:, columns] = 0  # for the reference of those that do not see them
        return data

    zeros, data = make(0.0), make(value)
    expected = reference(zeros)
    for isa in ALL_ISAS:
        worst, _ = bounds(zeros, expected, isa)
        actual = data.compute(isa)
        assert np.all(np.abs(actual - expected.out)[:, half:] <= worst[:, half:])
        if which == "v" and cold == "f16":
            assert not np.any(np.isfinite(actual[:, :half]))  # but those that see them get them
