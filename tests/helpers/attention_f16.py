"""What attention on a device may be off by, where rows, queries and weights are rounded to F16.

Ways to compute it: "node", a kernel over rows as they are stored; "host", the CPU's one; "join", which expands cold
rows to F16 and rotates hot ones, and "compose", which does it by ggml's operations in the type of the hot rows: both
then take ggml_flash_attn_ext().

All of them round the scaled query to F16 (after its rotation in F32, where it is rotated), rows to F16 and weights to
F16, relative to the largest weight so far or up to 8 times that; products are added up in F32. ggml_flash_attn_ext()
may also round products of Q and K and sums of P V to F16 (ggml's vector and matrix kernels for CUDA do, and the
CPU's), and meets BF16 rows with a query in BF16 (the CPU's). The CPU's kernel works in F32, but rounds the query to 8
bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llamamix import ggml

from .attention_cases import BLOCK, Data, rotations
from .attention_reference import MINIMA, Expected, by_kv_head, scales, to_out

U = 2.0**-24  # a rounding to F32 is off by this share of its result at most,
H = 2.0**-11  # one to F16 by this one
B = 2.0**-9  # one to BF16 by this one
TINY = 2.0**-25  # but one to F16 by as much where the result is small
TANH = 2.0**-11  # a device's fast tanh is off by this share
WEIGHT = 2.0**-22  # of the largest weight: TINY, for weights of up to 8 times that
EXP = 4e-7  # a device's e^x is off by this share, and 2 U for a unit of x

# Root mean squares are over at least 64 outputs of a query row, which may all have a few common causes.
CHANCE = 3.0


@dataclass
class _Part:
    """Cells and a basis in which they are met."""

    cells: slice
    q: np.ndarray  # [stream, KV head, query head of it, token, value], scaled
    k: np.ndarray  # [stream, KV head, 1, value, cell]
    v: np.ndarray  # [stream, KV head, 1, cell, value]
    back: np.ndarray  # what the sum of P V is multiplied with
    e_q: np.ndarray  # what rounding does to Q, K and V at most
    e_k: np.ndarray
    e_v: np.ndarray


def _size(data: Data, which: int) -> np.ndarray:
    """Of the terms that a cold value is the sum of: [stream, head, 1, cell, value]."""
    c = data.case
    kv_type, n_embd = ((c.cold_k, c.n_embd_k), (c.cold_v, c.n_embd_v))[which]
    stored = np.ascontiguousarray(data.cold[which])
    tensor = ggml.Tensor(kv_type, (n_embd, c.n_head_kv, c.n_cold, c.n_stream), stored)
    values = tensor.dequantize().astype(np.float64).transpose(0, 2, 1, 3)[:, :, None]
    low = scales(stored, kv_type)[1] if kv_type in MINIMA else 0.0
    return np.abs(values - low) + np.abs(low)


def _e_stored(data: Data, which: int, values: np.ndarray) -> np.ndarray:
    """What a cold value of K or V, [.., cell, value], is off by at most when a kernel makes an F16 number of it."""
    c = data.case
    kv_type = (c.cold_k, c.cold_v)[which]
    if kv_type == "f16":
        return np.zeros_like(values)
    if not ggml.is_quantized(kv_type):
        return H * np.abs(values) * (kv_type == "f32") + TINY
    # scale times steps (plus the smallest value), then plus the mean
    mean = H * np.abs(values) if which == 0 and data.means is not None else 0
    return H * _size(data, which) + mean + 2 * TINY


def _parts(data: Data, how: str) -> list[_Part]:
    c = data.case
    q, k, v = by_kv_head(data, data.q)
    q = q * data.scale
    rot_k, rot_v = rotations(c)
    cold, hot = slice(0, c.n_cold), slice(c.n_cold, c.n_cold + c.n_hot)

    def e_hot(kv_type: str, values: np.ndarray) -> np.ndarray:
        return np.full_like(values, 0.0 if kv_type == "f16" else TINY)

    def e_query(q: np.ndarray, unit: float = H) -> np.ndarray:
        return unit * np.abs(q) + TINY * max(1.0, c.logit_softcap)  # (may be divided by it before)

    if how in ("node", "host") or c.n_cold == 0:
        eye = np.eye(c.n_embd_v)
        k_hot, v_hot = k[..., hot], v[..., hot, :]
        e_q = e_query(q, B if how not in ("node", "host") and c.hot_k == "bf16" else H)
        parts = [_Part(hot, q, k_hot, v_hot, eye, e_q, e_hot(c.hot_k, k_hot), e_hot(c.hot_v, v_hot))]
        if c.n_cold > 0:
            q_cold, k_cold, v_cold = q @ rot_k, rot_k @ k[..., cold], v[..., cold, :] @ rot_v
            e_q = e_query(q_cold)
            if how == "host":  # steps of 1/127 of the largest value of a block
                most = np.abs(q_cold).reshape(*q_cold.shape[:-1], -1, BLOCK).max(axis=-1)
                e_q = e_q + np.repeat(most / 254, BLOCK, axis=-1)
            e_k = _e_stored(data, 0, k_cold.swapaxes(-1, -2)).swapaxes(-1, -2)
            parts.append(_Part(cold, q_cold, k_cold, v_cold, rot_v, e_q, e_k, _e_stored(data, 1, v_cold)))
        return parts

    def unit(hot_type: str) -> float:
        return B if how == "compose" and hot_type == "bf16" else H

    k, v = rot_k @ k, v @ rot_v
    e_k, e_v = (2 * unit(t) * np.abs(x) + 2 * TINY for t, x in ((c.hot_k, k), (c.hot_v, v)))
    if how == "join":
        e_k[..., cold] = _e_stored(data, 0, k[..., cold].swapaxes(-1, -2)).swapaxes(-1, -2)
        e_v[..., cold, :] = _e_stored(data, 1, v[..., cold, :])
    q = q @ rot_k
    return [_Part(slice(0, c.n_cold + c.n_hot), q, k, v, rot_v, e_query(q, unit(c.hot_k)), e_k, e_v)]


def bounds(data: Data, expected: Expected, how: str) -> tuple[np.ndarray, float]:
    """The most that each output may be off by, and the root mean square that is to be expected.

    Where nothing is cold, "join" and "compose" are ggml_flash_attn_ext() alone.
    """
    c = data.case
    parts = _parts(data, how)
    theirs = how not in ("node", "host")
    n_kv, n = c.n_cold + c.n_hot, c.n_embd_k
    rot_k, _ = rotations(c)
    rng = np.random.default_rng(1)

    p = np.where(expected.p < 1e-30, 0, expected.p)  # (subnormal numbers are slow)
    seen = expected.x > -np.inf
    q_plain, _, v = by_kv_head(data, data.q * data.scale)
    o = p @ v
    cap = 1.0 if not c.logit_softcap else 1 - np.square(np.tanh(expected.dot / c.logit_softcap))

    # Scores. A query's rounding is the same for all cells, those of rows are their own. Sums are in F32, which a tensor
    # core may cut off rather than round, after partial sums of the size of all products.
    at_most, square = np.zeros_like(p), np.zeros_like(p)
    samples = [np.zeros_like(p) for _ in range(8)]
    for part in parts:
        q, k = np.abs(part.q), np.abs(part.k)
        products = q @ k
        at_most[..., part.cells] = part.e_q @ k + q @ part.e_k + ((H if theirs else 0) + 4 * U * n) * products
        at_most[..., part.cells] += 16 * U * (np.abs(q_plain) @ np.abs(rot_k) @ k)
        square[..., part.cells] = np.square(q) @ np.square(part.e_k) / 3
        if theirs:
            square[..., part.cells] += H**2 / 3 * (np.square(q) @ np.square(k))
        for sample in samples:
            sample[..., part.cells] = (part.e_q * rng.uniform(-1, 1, part.e_q.shape)) @ part.k
    x = np.where(p > 0, expected.x, 0)
    below = np.where(p > 0, x.max(axis=-1, keepdims=True) - x, 0)
    other = U * (np.abs(x) + 4 * below) + EXP
    if c.logit_softcap:
        other = (
            other + 4.2e-7 * c.logit_softcap + TANH * np.abs(c.logit_softcap * np.tanh(expected.dot / c.logit_softcap))
        )

    # a score that is off by e changes p by p (e - mean of e), and o by p e (v - o)
    w = p * (cap * at_most + other)
    worst = 2 * (w @ np.abs(v) + w.sum(axis=-1, keepdims=True) * np.abs(o))  # 2: what is not linear
    w2 = np.square(p) * (np.square(cap) * square + np.square(other))
    typical = np.maximum(w2 @ np.square(v) - 2 * (w2 @ v) * o + w2.sum(axis=-1, keepdims=True) * np.square(o), 0)
    changes = [p * cap * sample for sample in samples]
    typical += np.mean([np.square(w @ v - w.sum(axis=-1, keepdims=True) * o).mean() for w in changes])

    # Weights, whose sum may be one of rounded or of other ones; a sink is the largest one in their place. Values.
    most = np.maximum(p.max(axis=-1, keepdims=True), (1 - p.sum(axis=-1, keepdims=True)) if c.sinks else 0)
    e_p = np.where(seen, H * p + WEIGHT * most, 0)
    worst += e_p.sum(axis=-1, keepdims=True) * np.abs(o)
    typical += np.square(e_p).sum(axis=-1, keepdims=True) * np.square(o) / 3
    u_sum = H if theirs else U
    for part in parts:
        w, e = p[..., part.cells], e_p[..., part.cells]
        size = w @ np.abs(part.v)
        worst += (e @ np.abs(part.v) + w @ part.e_v + 2 * u_sum * (n_kv + 20) * size) @ np.abs(part.back)
        worst += 16 * U * np.abs(w @ part.v) @ np.abs(part.back)
        # a partial sum of i of n terms of random signs is sqrt(i / n) of the whole, and one of equal signs i / n
        w2, o2 = np.square(w), np.square(w @ part.v)
        sums = u_sum**2 * (n_kv / 6 * (w2 @ np.square(part.v)) + (n_kv / 12 + 8) * o2)
        values = (np.square(e) @ np.square(part.v) + w2 @ np.square(part.e_v)) / 3
        typical += (sums + values) @ np.square(part.back)

    return to_out(c, worst), math.sqrt(typical.mean())


@dataclass
class Judgement:
    worst: float  # the largest share of what an output may be off by
    typical: float  # root mean square of errors as a share of what is to be expected
    dead: bool  # whether tokens that see nothing get zeros, as from the CPU

    @property
    def ok(self) -> bool:
        return self.worst <= 1 and self.typical <= CHANCE and self.dead

    def __str__(self) -> str:
        res = f"{self.worst:.3g} of the most, {self.typical:.3g} times the rms to be expected"
        return res if self.dead else f"{res}, and tokens that see nothing get something"


def sees_nothing(expected: Expected) -> np.ndarray:
    """Whether a token and head does: [n_stream, n_tokens, n_head]."""
    p = expected.p.sum(axis=-1).transpose(0, 3, 1, 2)
    return p.reshape(*p.shape[:2], -1) == 0


def judge(actual: np.ndarray, data: Data, expected: Expected, limits: tuple[np.ndarray, float], how: str) -> Judgement:
    """How attention by a device compares with that in float64.

    What ggml_flash_attn_ext() makes of a token that sees nothing depends on the device, and is not looked at.
    """
    worst, typical = limits
    dead = sees_nothing(expected)
    if how in ("join", "compose"):
        actual = np.where(dead[..., None], 0, actual)
    error = np.abs(actual - expected.out)
    error[~np.isfinite(actual)] = np.inf
    with np.errstate(invalid="ignore", divide="ignore"):
        share = float(np.nan_to_num(error / worst, nan=0.0, posinf=np.inf).max())  # 0 of 0 is right
    rms = math.sqrt(np.mean(np.square(error)))
    return Judgement(share, 0.0 if rms == 0 else rms / typical if typical else math.inf, not np.any(actual[dead]))


def as_f16(data: Data) -> Data:
    """The data with a mask of F16 numbers, whatever they are stored as: ggml_flash_attn_ext() takes no others."""
    if data.mask is not None:
        data.mask = data.mask.astype(np.float16).astype(data.mask.dtype)
    return data


def join_bounds(data: Data, which: int) -> tuple[np.ndarray, np.ndarray]:
    """The join of K (0) or V (1), [n_stream, cell, n_head_kv, n_embd], and the most each value may be off by."""
    c = data.case
    rows, kv_type, n_rot = ((data.k, c.hot_k, c.n_rot_k), (data.v, c.hot_v, c.n_rot_v))[which]
    rotation = rotations(c)[which]
    exact = rows @ rotation
    most = H * np.abs(exact) + TINY + (16 * U * (np.abs(rows) @ np.abs(rotation)) if n_rot else 0)
    if c.n_cold:
        cold = exact[:, : c.n_cold].transpose(0, 2, 1, 3)[:, :, None]
        most[:, : c.n_cold] += _e_stored(data, which, cold)[:, :, 0].transpose(0, 2, 1, 3)
    return exact, most
