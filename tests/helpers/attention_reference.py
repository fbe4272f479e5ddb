"""Attention in float64 over the rows of a case."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llamamix import ggml

from .attention_cases import BLOCK, Case, Data

MINIMA = {"q4_1": 8, "q5_1": 16}  # values are steps above the smallest one of their block: how many to the middle


def slopes(n_head: int, max_bias: float) -> np.ndarray:
    """ALiBi: a geometric sequence for the largest power of 2 of the heads, one of half the ratio for the others."""
    if max_bias == 0:
        return np.ones(n_head)
    n = 2 ** int(math.log2(n_head))
    first = [2.0 ** (-max_bias / n * (h + 1)) for h in range(n)]
    return np.array(first + [2.0 ** (-max_bias / 2 / n * (2 * h + 1)) for h in range(n_head - n)])


@dataclass
class Expected:
    out: np.ndarray  # [n_stream, n_tokens, n_head, n_embd_v]
    dot: np.ndarray  # [stream, KV head, query head of it, token, cell], as all that follow: products with Q, scaled
    x: np.ndarray  # scores
    p: np.ndarray  # weights


def by_kv_head(data: Data, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q, K^T and V as operands of matrix products."""
    c = data.case
    q = q.astype(np.float64).reshape(c.n_stream, c.n_tokens, c.n_head_kv, c.n_gqa, c.n_embd_k)
    k, v = data.k.transpose(0, 2, 3, 1), data.v.transpose(0, 2, 1, 3)
    return q.transpose(0, 2, 3, 1, 4), k[:, :, None], v[:, :, None]


def to_out(case: Case, y: np.ndarray) -> np.ndarray:
    return y.transpose(0, 3, 1, 2, 4).reshape(case.n_stream, case.n_tokens, -1, case.n_embd_v)


def reference(data: Data, q: np.ndarray | None = None) -> Expected:
    c = data.case
    rows, k, v = by_kv_head(data, data.q if q is None else q)
    dot = rows @ k * data.scale
    x = c.logit_softcap * np.tanh(dot / c.logit_softcap) if c.logit_softcap else dot.copy()
    if data.mask is not None:
        slope = slopes(c.n_gqa * c.n_head_kv, c.max_bias).reshape(c.n_head_kv, c.n_gqa, 1, 1)
        x += slope * data.mask[:, None, None].astype(np.float64)
    m = x.max(axis=-1, keepdims=True)
    if data.sinks is not None:
        sinks = data.sinks.astype(np.float64).reshape(c.n_head_kv, c.n_gqa, 1, 1)
        m = np.maximum(m, sinks)
    m = np.where(m == -np.inf, 0, m)  # a token that sees nothing
    p = np.exp(x - m)
    total = p.sum(axis=-1, keepdims=True) + (np.exp(sinks - m) if data.sinks is not None else 0)
    p /= np.where(total == 0, 1, total)
    return Expected(to_out(c, p @ v), dot, x, p)


def scales(rows: np.ndarray, kv_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Scales of the blocks of rows, without sign, and minima; for every value: [stream, head, 1, cell, value]."""
    blocks = rows.reshape(*rows.shape[:3], -1, ggml.row_size(kv_type, BLOCK))
    d, low = (blocks[..., i : i + 2].copy().view(np.float16)[..., 0].astype(np.float64) for i in (0, 2))
    low = low if kv_type in MINIMA else np.zeros_like(d)
    return tuple(np.repeat(x.transpose(0, 2, 1, 3), BLOCK, axis=-1)[:, :, None] for x in (np.abs(d), low))
