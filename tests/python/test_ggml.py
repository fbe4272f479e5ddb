"""Copies between ggml's types: bit for bit the gguf package's, within the types' bounds, refused where ggml aborts."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from llamamix import ParamsError, ggml
from llamamix.formats import FORMATS

QUANTIZED = [t for t in FORMATS if t not in ("f32", "f16", "bf16")]

# types that the gguf package can write; for iq4_nl it only reads
WRITTEN_BY_GGUF = [t for t in QUANTIZED if t != "iq4_nl"] + ["bf16"]


def data(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(64, 128)).astype(np.float32)
    zero_blocks = normal.copy()
    zero_blocks[::2] = 0
    return {
        "normal": normal,
        "large": normal * np.float32(1e4),
        "tiny": normal * np.float32(1e-7),  # the scales are subnormal in F16
        "zero": np.zeros_like(normal),
        "some zero": zero_blocks,
        "negative": -np.abs(normal),  # the largest magnitude has a negative sign
        "positive": np.abs(normal),
        "constant": np.full_like(normal, -3.25),
        "f16": normal.astype(np.float16).astype(np.float32),
    }[kind]


KINDS = ["normal", "large", "tiny", "zero", "some zero", "negative", "positive", "constant", "f16"]


def gguf_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


#
# types
#


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_are_ggufs(name: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[gguf_type(name)]
    assert (ggml.blck_size(name), ggml.type_size(name)) == (block, size)
    assert ggml.row_size(name, 4 * block) == 4 * size
    assert ggml.is_quantized(name) == (name in QUANTIZED)


def test_row_size_needs_whole_blocks() -> None:
    with pytest.raises(ParamsError, match="blocks of 32 elements, which do not divide a row of 100"):
        ggml.row_size("q4_0", 100)
    with pytest.raises(ParamsError, match="n must be a whole number"):
        ggml.row_size("q4_0", -32)


@pytest.mark.parametrize("name", ["q2_k", "", None, 2])
def test_unknown_types_are_refused(name: object) -> None:
    for call in (ggml.blck_size, ggml.type_size, ggml.dtype, lambda t: ggml.quantize(np.zeros(32), t)):
        with pytest.raises(ParamsError, match="type must be one of f32, f16"):
            call(name)


#
# the same bits as another implementation
#


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRITTEN_BY_GGUF)
def test_quantize_gives_ggufs_bits(name: str, kind: str) -> None:
    x = data(kind)
    ours = ggml.quantize(x, name).data.view(np.uint8)
    theirs = gguf.quants.quantize(x, gguf_type(name)).view(np.uint8).reshape(ours.shape)
    if name == "q8_0":
        # ggml's vector code rounds halves to even, and has x*(127/max) where gguf has x*(1/(max/127)): of numbers that
        # come out within a few float32 roundings of a half, one may become the next integer
        block = x.reshape(-1, 32).astype(np.float64)
        with np.errstate(invalid="ignore"):
            scaled = np.nan_to_num(block * 127 / np.abs(block).max(axis=1, keepdims=True))
        tie = np.abs(np.abs(scaled) % 1 - 0.5) < 127 * 4 * np.finfo(np.float32).eps
        a, b = (y.reshape(-1, 34) for y in (ours, theirs))
        np.testing.assert_array_equal(a[:, :2], b[:, :2])
        step = np.abs(a[:, 2:].view(np.int8).astype(int) - b[:, 2:].view(np.int8))
        assert (step[~tie] == 0).all() and (step[tie] <= 1).all()
    else:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*QUANTIZED, "bf16"])
def test_dequantize_gives_ggufs_numbers(name: str, kind: str) -> None:
    q = ggml.quantize(data(kind), name)
    theirs = gguf.quants.dequantize(q.data.view(np.uint8), gguf_type(name))
    np.testing.assert_array_equal(q.dequantize(), theirs.reshape(64, 128))


@pytest.mark.parametrize("kind", KINDS)
def test_f16_is_numpys(kind: str) -> None:
    x = data(kind)
    np.testing.assert_array_equal(ggml.quantize(x, "f16").data, x.astype(np.float16))


#
# bounds
#


@pytest.mark.parametrize(("name", "levels"), [("q4_0", 16), ("q4_1", 15), ("q5_0", 32), ("q5_1", 31), ("q8_0", 254)])
def test_error_is_at_most_a_step(name: str, levels: int) -> None:
    """The scale of a block is its range by the number of levels: half a step is lost, and for q4_0 and q5_0, whose
    range is not symmetric, a whole step at the far end; F16 rounds the scale, which counts up to all levels, and an
    offset.
    """
    x = data("normal")
    block = x.reshape(-1, 32)
    symmetric = name.endswith("_0")
    span = 2 * np.abs(block).max(axis=1) if symmetric else np.ptp(block, axis=1)
    step = span / levels
    rounding = 2.0**-11 * (levels * step + np.abs(block).max(axis=1))
    bound = step * (1.0 if name in ("q4_0", "q5_0") else 0.5) + rounding
    error = np.abs(ggml.quantize(x, name).dequantize().reshape(-1, 32) - block).max(axis=1)
    assert (error <= bound).all()
    assert error.max() > 0.25 * step.min()  # there is one


def test_f16_source_is_quantised_like_its_numbers_in_f32() -> None:
    x = data("f16")
    for name in QUANTIZED:
        np.testing.assert_array_equal(
            ggml.quantize(x.astype(np.float16), name).data, ggml.quantize(x, name).data, err_msg=name
        )


@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("target", FORMATS)
def test_numbers_go_to_every_type(source: str, target: str) -> None:
    x = np.arange(-64, 64, dtype=np.float32)  # exact in all three
    y = ggml.cpy(ggml.quantize(x, source), target)
    assert y.type == target
    np.testing.assert_array_equal(y.data, ggml.quantize(x, target).data)


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_is_quantised_goes_to_f32_or_stays(name: str) -> None:
    q = ggml.quantize(data("normal"), name)
    same = ggml.cpy(q, name)
    np.testing.assert_array_equal(same.data, q.data)
    assert not np.shares_memory(same.data, q.data)
    np.testing.assert_array_equal(ggml.cpy(q, "f32").data, q.dequantize())
    for target in set(FORMATS) - {"f32", name}:
        with pytest.raises(ParamsError, match=rf"copies {name} to f32 only, not to {target}: dequantize\(\)"):
            ggml.cpy(q, target)


#
# tensors
#


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (5, 2, 3, 64)])
@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q4_0"])
def test_dimensions_are_reversed(name: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    t = ggml.quantize(x, name)
    assert t.ne == shape[::-1]
    assert t.nbytes == t.data.nbytes == ggml.row_size(name, x.size)
    assert t.data.shape[:-1] == shape[:-1]
    assert t.dequantize().shape == shape
    flat = ggml.quantize(x.reshape(-1), name)
    np.testing.assert_array_equal(flat.data.reshape(-1), t.data.reshape(-1))


def test_views_are_copied_in_order() -> None:
    x = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    np.testing.assert_array_equal(ggml.quantize(x.T[:32], "f32").data, x.T[:32])
    np.testing.assert_array_equal(ggml.quantize(x[::2], "f32").data, x[::2])


@pytest.mark.parametrize("shape", [(0,), (0, 32), (3, 0, 32)])
def test_tensors_may_be_empty(shape: tuple[int, ...]) -> None:
    for name in FORMATS:
        t = ggml.quantize(np.zeros(shape), name)
        assert t.ne == shape[::-1] and t.nbytes == 0 and t.dequantize().shape == shape


def test_tensor_is_an_array() -> None:
    t = ggml.quantize(np.arange(32), "q4_0")
    np.testing.assert_array_equal(np.asarray(t), t.data)
    assert repr(t) == "<Tensor q4_0 [32]>"


def test_result_does_not_depend_on_its_source() -> None:
    x = np.ones(32, np.float32)
    t = ggml.quantize(x, "f32")
    x[:] = 2
    assert (t.data == 1).all()


@pytest.mark.parametrize(
    ("type", "ne", "array", "named"),
    [
        ("f32", (4,), np.zeros(4), r"data of f32 \[4\] must be float32 \[4\], not float64"),
        ("f32", (4,), np.zeros(5, np.float32), r"data of f32 \[4\] must be float32 \[4\], not float32 \[5\]"),
        ("q4_0", (32, 2), np.zeros((2, 17), np.uint8), r"must be uint8 \[2, 18\], not uint8 \[2, 17\]"),
        ("q4_0", (32, 2), np.zeros((2, 36), np.uint8)[:, ::2], "contiguous"),
        ("q4_0", (31,), np.zeros(18, np.uint8), "blocks of 32"),
        ("f32", (), np.zeros((), np.float32), "1 to 4 dimensions"),
        ("f32", (1, 1, 1, 1, 1), np.zeros((1, 1, 1, 1, 1), np.float32), "1 to 4 dimensions"),
        ("f32", (-1,), np.zeros(0, np.float32), "whole numbers"),
        ("f32", (2**16, 2**16), np.zeros(1, np.float32), "more than 2147483647"),
        ("f32", (4,), [0.0] * 4, "data of f32"),
    ],
)
def test_what_is_no_tensor_is_refused(type: str, ne: tuple[int, ...], array: np.ndarray, named: str) -> None:
    with pytest.raises(ParamsError, match=named):
        ggml.Tensor(type, ne, array)


@pytest.mark.parametrize(
    ("array", "type", "named"),
    [
        (np.zeros(31), "q4_0", "blocks of 32"),
        (np.array([np.nan] * 32), "q4_0", "finite"),
        (np.array([np.inf] * 32), "q8_0", "finite"),
        (np.array([1e300] * 32), "q8_0", "finite"),
        (np.zeros(32, bool), "q4_0", "numbers"),
        (np.zeros(32, complex), "f32", "numbers"),
        (["a"] * 32, "f32", "numbers"),
        (np.zeros((1, 1, 1, 1, 32)), "f32", "dimensions"),
        (1.0, "f32", "dimensions"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_can_not_be_stored_is_refused(array: object, type: str, named: str) -> None:
    with pytest.raises(ParamsError, match=named):
        ggml.quantize(array, type)


def test_what_is_not_finite_is_kept_by_types_that_can() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0], np.float32)
    for name in ("f32", "f16"):
        np.testing.assert_array_equal(ggml.quantize(x, name).data, x)
    with pytest.raises(ParamsError, match="finite"):
        ggml.cpy(ggml.quantize(np.repeat(x, 8), "bf16"), "q4_0")


def test_cpy_takes_tensors_only() -> None:
    with pytest.raises(ParamsError, match="src must be a Tensor"):
        ggml.cpy(np.zeros(32, np.float32), "f32")
