"""Rows of V that are left unread: which ones, and what that does to the output."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.attention_cases import ALL_ISAS, ISAS, TILE, Case, Data, make_data
from helpers.attention_reference import reference

from llamamix import Context, Model, ParamsError, ggml
from llamamix.attention import Attention
from llamamix.formats import FORMATS

V_SKIP = 0.03

# several streams; tasks of one head and of several, the last tile is not full
SHAPES = [
    {"n_cold": 1000, "n_head_kv": 1, "n_gqa": 3, "n_stream": 2},
    {"n_cold": 900, "n_head_kv": 2, "n_gqa": 4, "n_tokens": 2},
    {"n_cold": 5000, "n_head_kv": 4, "n_gqa": 2},
]


def make(cold_v: str, shape: dict[str, int]) -> Data:
    """Most of a query's weight is on hot cells, so that what these have is nearly all that there is."""
    data = make_data(Case(cold_k="f16", cold_v=cold_v, n_hot=100, v_skip=V_SKIP, **shape))
    c = data.case
    assert c.skips
    # a hot key for each query of a KV head; the more there are, the fewer cells are of no use to any
    q = data.q.reshape(c.n_stream, c.n_tokens, c.n_head_kv, c.n_gqa, -1).transpose(0, 1, 3, 2, 4)
    keys = q.reshape(c.n_stream, -1, c.n_head_kv, c.n_embd_k)
    keys = (6 + 0.4 * keys.shape[1]) / np.linalg.norm(keys, axis=-1, keepdims=True) * keys
    data.hot[0][:, : keys.shape[1]] = keys.astype(np.float16)
    data.k[:, c.n_cold : c.n_cold + keys.shape[1]] = keys.astype(np.float16)
    return data


def read_cells(data: Data, p: np.ndarray, share: float) -> np.ndarray:
    """Which cold cells some query of a KV head gives more than that share of its total: [stream, KV head, cell].

    All of a tile are read where these are more than three quarters.
    """
    c = data.case
    wanted = (p[..., : c.n_cold] > share / (c.n_cold + c.n_hot)).any(axis=(2, 3))
    for start in range(0, c.n_cold, TILE):
        tile = wanted[..., start : start + TILE]
        tile |= (tile.sum(axis=-1) > 3 * tile.shape[-1] // 4)[..., None]
    return wanted


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cold", FORMATS)
def test_rows_of_small_weights_are_not_read(cold: str, shape: dict[str, int]) -> None:
    """NaN in them changes nothing; where all are read, it does."""
    data = make(cold, shape)
    c = data.case
    p = reference(data).p
    unread = ~read_cells(data, p, V_SKIP / 2)  # by far less than what the hot cells have of the total
    assert 0.2 < unread.mean() < 1 and p[..., c.n_cold :].sum(axis=-1).min() > 0.5
    poisoned = replace(data, cold=(data.cold[0], data.cold[1].copy()))
    rows = poisoned.cold[1].transpose(0, 2, 1, 3)
    if cold in ("f32", "f16", "bf16"):
        rows[unread] = np.nan if cold != "bf16" else 0x7FC0
    else:
        blocks = rows.reshape(*rows.shape[:3], -1, ggml.row_size(cold, 32))
        blocks[..., :2][unread] = np.array([np.nan], np.float16).view(np.uint8)
        poisoned.cold = (data.cold[0], blocks.reshape(rows.shape).transpose(0, 2, 1, 3))
    for isa in ALL_ISAS:
        assert poisoned.compute(isa).tobytes() == data.compute(isa).tobytes()
        assert np.isnan(replace(poisoned, case=replace(c, v_skip=0.0)).compute(isa)).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cold", FORMATS)
def test_what_is_dropped(cold: str, shape: dict[str, int]) -> None:
    """Where all of V is 1, the output is the share of the weights that is left: 1 - v_skip at least."""
    data = make(cold, shape)
    c = data.case
    one = ggml.quantize(np.ones((c.n_stream, c.n_cold, c.n_head_kv, c.n_embd_v), np.float32), cold)
    assert abs(one.dequantize() - 1).max() < 2e-3
    data.cold, data.v[:, : c.n_cold] = (data.cold[0], one.data), one.dequantize()
    data.hot[1][:], data.v[:, c.n_cold :] = 1, 1

    p = reference(data).p
    read = read_cells(data, p, V_SKIP)[:, :, None, None]
    expected = (p[..., : c.n_cold] * ~read).sum(axis=-1)  # [stream, KV head, query head of it, token]
    expected = expected.transpose(0, 3, 1, 2).reshape(c.n_stream, c.n_tokens, -1, 1)
    for isa in ALL_ISAS:
        dropped = replace(data, case=replace(c, v_skip=0.0)).compute(isa) - data.compute(isa)
        assert (dropped > -1e-5).all() and (dropped < V_SKIP).all()
        # the kernel's threshold is lower by what it has not seen of the total yet, which is little here
        assert 0.9 * expected.mean() < dropped.mean() < 1.01 * expected.mean() + 1e-5, (dropped.mean(), expected.mean())
        assert (dropped < 1.05 * expected + 1e-4).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_threads_leave_unread_what_one_does(shape: dict[str, int]) -> None:
    """They wait until hot cells are done, whoever does them."""
    data = make("q4_0", shape)
    for isa in ISAS:
        alone = data.compute(isa).tobytes()
        assert all(data.compute(isa, n).tobytes() == alone for n in (2, 5) for _ in range(3))


@pytest.mark.parametrize(
    "shape",
    [{"n_hot": 0}, {"n_cold": 256, "n_hot": 256}, {"n_tokens": 40}, {"n_cold": 0}, {"n_embd_v": 40, "cold_v": "f16"}],
    ids=str,
)
def test_where_all_is_read(shape: dict[str, int]) -> None:
    """Many queries, no more cold tiles than hot ones, heads that are not whole blocks: the same bits as without."""
    data = make_data(Case(n_cold=shape.pop("n_cold", 1000), v_skip=0.5, q_size=4.0, **shape))
    assert not data.case.skips
    off = replace(data, case=replace(data.case, v_skip=0.0))
    for isa in ALL_ISAS:
        assert data.compute(isa).tobytes() == off.compute(isa).tobytes()


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), float("inf")])
def test_shares_that_there_are_not(value: float) -> None:
    data = make_data(Case())
    with pytest.raises(ParamsError, match="v_skip must be"):
        Attention(data.q, data.cold, data.hot, types=("q4_0", "f16"), v_skip=value)


def test_a_model_decodes_with_it(tiny_model: Model) -> None:
    """Its prompt is computed as without, and what it decodes is off by little."""
    prompt = np.random.default_rng(0).integers(3, 400, 600).tolist()
    logits = {}
    for v_skip in (0, 0.3, 0.9):
        with Context(tiny_model, n_ctx=768, n_threads=2, kv_mixed=f"hot=64,v_skip={v_skip}") as ctx:
            assert ctx.kv_mixed is not None and ctx.kv_mixed.v_skip == v_skip
            ctx.decode(prompt)
            before = ctx.logits[-1].copy()
            ctx.decode([5])
            logits[v_skip] = before, ctx.logits[-1].copy()
    (prompt_off, off), (prompt_little, little), (prompt_much, much) = logits.values()
    assert prompt_little.tobytes() == prompt_off.tobytes() == prompt_much.tobytes()
    assert 0 < np.abs(little - off).max() < np.abs(much - off).max() < 1
