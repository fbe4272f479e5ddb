"""Rows as the kernels expand them for many queries: bit for bit what ggml's to_float makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.attention_cases import ALL_ISAS, MAX_ROWS_DIRECT, Case, make_data

from llamamix import ggml
from llamamix.formats import FORMATS

N = 130  # cells: a tile and a bit


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Numbers rounded to 8 bits, to even ones where two are as near; float32."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("n_embd", [32, 64, 96, 256])
@pytest.mark.parametrize("kind", ["normal", "subnormal", "outliers", "bytes"])
@pytest.mark.parametrize("kv_type", FORMATS)
def test_a_cell_that_is_seen_alone(kv_type: str, kind: str, n_embd: int) -> None:
    """Every token sees one cell: its weight is 1 and the output is that cell's row of V."""
    data = make_data(
        Case(
            cold_k="f16",
            cold_v=kv_type,
            n_cold=N,
            n_hot=0,
            n_gqa=1,
            n_head_kv=1,
            n_tokens=N,
            n_embd_v=n_embd,
            mask="causal",
        )
    )
    assert not data.case.direct and N > MAX_ROWS_DIRECT
    rng = np.random.default_rng(3)
    x = rng.normal(size=(1, N, 1, n_embd))
    if kind == "subnormal":
        x *= 1e-5  # as F16 scales are
    elif kind == "outliers":
        x = np.where(rng.random(x.shape) < 0.02, 1000 * x, x)
    rows = ggml.quantize(x.astype(np.float32), kv_type)
    if kind == "bytes" and ggml.is_quantized(kv_type):  # all codes; scales and minima are finite
        blocks = rows.data.reshape(-1, FORMATS[kv_type].size_block)
        blocks[:, 4:] = rng.integers(0, 256, blocks[:, 4:].shape)
    data.cold = (data.cold[0], rows.data)
    data.mask = np.where(np.eye(N, dtype=bool), 0, -np.inf).astype(np.float16)[None]
    for isa in ALL_ISAS:
        expected = rows.dequantize()[0, :, 0]
        if data.case.products(isa)[1] == "bf16":
            expected = to_bf16(expected)
        np.testing.assert_array_equal(data.compute(isa)[0, :, 0], expected, err_msg=isa)
