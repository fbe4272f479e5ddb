"""What a migration on the CPU makes of rows: the same bits by every instruction set, and ggml's.

The expectation is numpy's float32 arithmetic, operation by operation: there is no rounding to allow for.
"""

from __future__ import annotations

import platform

import cffi
import numpy as np
import pytest
from helpers import emulated
from helpers.processes import library_dir
from helpers.rows import GRIDS, fwht, migrated, nearest

from llamamix import ggml
from llamamix._ffi import _file_name, ffi, lib
from llamamix.attention import isas
from llamamix.formats import FORMATS

ALL_ISAS = emulated.all_isas(isas())

N_ROWS = 40
SOURCES = ("f32", "f16", "bf16")
TARGETS = tuple(FORMATS)


def numbers(kind: str, n: int) -> np.ndarray:
    """Float32 [N_ROWS, n]."""
    rng = np.random.default_rng(n)
    normal = rng.normal(size=(N_ROWS, n)).astype(np.float32)
    if kind == "large":
        return normal * np.float32(1e3)
    if kind == "tiny":
        return normal * np.float32(1e-5)  # scales are subnormal in F16
    if kind == "outliers":
        return np.where(rng.random(normal.shape) < 0.02, normal * np.float32(100), normal)
    if kind == "ties":  # the largest value of a block with both signs, in either order, and values between two steps
        return rng.integers(-8, 9, normal.shape).astype(np.float32) / np.float32(2)
    if kind == "zeros":
        return np.where(rng.random((N_ROWS, n // 32, 1)) < 0.5, 0, normal.reshape(N_ROWS, -1, 32)).reshape(N_ROWS, n)
    if kind == "negative zeros":
        return np.full_like(normal, -0.0)
    return {"normal": normal, "negative": -np.abs(normal), "positive": np.abs(normal)}[kind]


KINDS = ["normal", "large", "tiny", "outliers", "ties", "zeros", "negative zeros", "negative", "positive"]


def expected(src: ggml.Tensor, kv_type: str, n_rot: int) -> np.ndarray:
    return migrated(ggml.cpy(src, "f32").data, kv_type, n_rot)


def quantize(src: ggml.Tensor, kv_type: str, n_rot: int = 0, isa: str | None = None) -> np.ndarray:
    if isa in emulated.emulated_isas():
        return emulated.quantize(isa, src, kv_type, n_rot)
    n, n_rows = src.ne
    # with bytes around it that must stay
    res = np.full(n_rows * ggml.row_size(kv_type, n) + 128, 0xA5, np.uint8)
    dst = ffi.from_buffer(res[64:])
    name = isa.encode() if isa else ffi.NULL
    args = ffi.from_buffer(src.data), FORMATS[src.type].type, dst, FORMATS[kv_type].type, n_rows, n, n_rot, name
    assert lib.llama_kv_mixed_quantize(*args) == 0
    assert (res[:64] == 0xA5).all() and (res[-64:] == 0xA5).all()
    return res[64:-64].reshape(n_rows, -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_rot", [0, 32, 64, 128, 512, 1024])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_the_bits(source: str, target: str, n_rot: int, kind: str) -> None:
    for n in {max(n_rot, 32), max(3 * n_rot, 96)}:
        src = ggml.quantize(numbers(kind, n), source)
        for isa in ALL_ISAS:
            np.testing.assert_array_equal(quantize(src, target, n_rot, isa), expected(src, target, n_rot), err_msg=isa)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere ggml fuses products and sums")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [t for t in TARGETS if t not in GRIDS])
def test_the_bits_are_ggmls(target: str, kind: str) -> None:
    src = ggml.quantize(numbers(kind, 1024), "f32")
    np.testing.assert_array_equal(quantize(src, target), ggml.cpy(src, target).data.view(np.uint8))


#
# scales that are searched
#


def blocks(kv_type: str, kind: str) -> np.ndarray:
    """Float32 [n, 32]."""
    rng = np.random.default_rng(1)
    n, grid = 4000, GRIDS[kv_type].astype(np.float64)
    normal = rng.normal(size=(n, 32))
    x = {
        "normal": normal,
        "Laplace": rng.laplace(size=(n, 32)),
        "heavy tails": rng.standard_t(2, size=(n, 32)),
        "uniform": rng.uniform(-1, 1, size=(n, 32)),
        "positive": np.abs(normal),
        "one value": np.eye(32).repeat(n // 32, axis=0) * normal[: n // 32 * 32, :1],
        "constant": np.repeat(normal[:, :1], 32, axis=1),
        "two values": np.where(rng.random((n, 32)) < 0.5, normal[:, :1], -normal[:, :1]),
        "on the grid": rng.choice(grid, (n, 32)) * rng.uniform(0.001, 1, (n, 1)).astype(np.float16).astype(float),
        "between two": rng.choice((grid[1:] + grid[:-1]) / 2, (n, 32)),
        "zero": np.zeros((1, 32)),
        "any size": normal * 2.0 ** rng.uniform(-30, 30, (n, 1)),
        "subnormal in F16": normal * 2.0 ** rng.uniform(-26, -12, (n, 1)),
        "subnormal": normal * 2.0**-140,
        "huge": normal * 1e5 * grid.max(),  # the largest scale is 65504
        "too large": normal * 1e36,
    }[kind]
    return x.astype(np.float32)


BLOCKS = [
    "normal", "Laplace", "heavy tails", "uniform", "positive", "one value", "constant", "two values", "on the grid",
    "between two", "zero", "any size", "subnormal in F16", "subnormal", "huge", "too large",
]  # fmt: skip


def squared_error(x: np.ndarray, rows: np.ndarray, kv_type: str) -> np.ndarray:
    """Of blocks [n, 32], in float64 [n]; infinite or NaN where a scale is."""
    with np.errstate(invalid="ignore", over="ignore"):
        values = ggml.Tensor(kv_type, (32, len(x)), np.ascontiguousarray(rows)).dequantize()
        return np.square(x - values.astype(np.float64)).sum(axis=1)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("kv_type", GRIDS)
def test_no_block_is_further_off_than_with_ggmls_scale(kv_type: str, kind: str) -> None:
    x = blocks(kv_type, kind)
    src = ggml.quantize(x, "f32")
    theirs = squared_error(x, ggml.cpy(src, kv_type).data, kv_type)
    # ggml's scale is among those that are tried, and one that is not better by more than all errors of F32 is not
    # taken. What remains: a value that is as near to two others, up to 2**-23.4 of itself, may go to the one that is
    # further off. For IQ4_NL that is by d**2 * 24 * 2 * 127 * 2**-23.4, where d is at most a 90th of the largest value;
    # 32 of these are 2**-18 of its square. (For Q5_0 16 takes the place of 127, 1 of 24, a 12th of a 90th.) And a
    # scale's sums are off by 2**-18 of it, so that it may be rounded to the F16 that is further off: by 2**-27 of the
    # sum of squares where steps are 2**-10 of a scale, by 2**-17 of it where they are as large as the scale.
    x = x.astype(np.float64)
    allowed = 2.0**-18 * np.square(x).max(axis=1)
    is_small = np.abs(x).max(axis=1) / np.abs(GRIDS[kv_type]).max() < 2.0**-13  # scales may be subnormal in F16
    allowed += np.where(is_small, 2.0**-17, 2.0**-27) * np.square(x).sum(axis=1)
    for isa in ALL_ISAS:
        ours = squared_error(x, quantize(src, kv_type, isa=isa), kv_type)
        assert (ours <= theirs + allowed)[np.isfinite(theirs)].all(), isa
        assert np.isfinite(ours)[np.isfinite(theirs)].all()


@pytest.mark.parametrize(
    ("kv_type", "kind", "gain"),
    [
        ("iq4_nl", "normal", 0.9), ("iq4_nl", "Laplace", 0.92),
        ("iq4_nl", "heavy tails", 0.96), ("iq4_nl", "uniform", 0.88),
        ("q5_0", "normal", 0.9), ("q5_0", "Laplace", 0.93), ("q5_0", "heavy tails", 0.98), ("q5_0", "uniform", 0.83),
    ],
)  # fmt: skip
def test_the_search_is_worth_it(kv_type: str, kind: str, gain: float) -> None:
    """The error as a share of ggml's; and of the least that there is, as found by trying 800 scales."""
    x = blocks(kv_type, kind)
    src = ggml.quantize(x, "f32")
    ours = squared_error(x, quantize(src, kv_type), kv_type).sum()
    assert ours < gain * squared_error(x, ggml.cpy(src, kv_type).data, kv_type).sum()

    x, grid = x.astype(np.float64), GRIDS[kv_type].astype(np.float64)
    most = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    least = np.full(len(x), np.inf)
    for end in np.concatenate([np.linspace(-1.6, -0.6, 400), np.linspace(0.6, 1.6, 400)]) * np.abs(grid).max():
        q = grid[nearest(kv_type, x * (end / most))]
        least = np.minimum(least, np.square(x).sum(axis=1) - np.square((q * x).sum(axis=1)) / np.square(q).sum(axis=1))
    assert ours < 1.004 * least.sum()


ffi_ggml = cffi.FFI()
ffi_ggml.cdef("""
    void * ggml_new_tensor_2d(void * ctx, int32_t type, int64_t ne0, int64_t ne1);
    void * ggml_mul_mat(void * ctx, void * a, void * b);
    void   ggml_mul_mat_set_hint(void * tensor, int32_t hint);
""")
HINT_SRC0_IS_HADAMARD = 1


@pytest.mark.parametrize("n_rot", [64, 128, 256])
def test_the_rotation_is_ggmls(n_rot: int) -> None:
    """The operation that a graph has for it."""
    base = ffi_ggml.dlopen(str(library_dir() / _file_name("ggml-base")))
    x = numbers("normal", 3 * n_rot)
    turned = np.empty_like(x)
    with ggml.graph(16) as (ctx, backend):
        c = ffi_ggml.cast("void *", int(ffi.cast("uintptr_t", ctx)))
        matrix, rows = (base.ggml_new_tensor_2d(c, FORMATS["f32"].type, n_rot, n) for n in (n_rot, x.size // n_rot))
        product = base.ggml_mul_mat(c, matrix, rows)
        base.ggml_mul_mat_set_hint(product, HINT_SRC0_IS_HADAMARD)
        matrix, rows, product = (
            ffi.cast("struct ggml_tensor *", int(ffi_ggml.cast("uintptr_t", t))) for t in (matrix, rows, product)
        )
        graph = lib.ggml_new_graph_custom(ctx, 16, False)
        lib.ggml_build_forward_expand(graph, product)
        with ggml.buffer(ctx, backend):
            lib.ggml_backend_tensor_set(rows, ffi.from_buffer(x), 0, x.nbytes)
            assert lib.ggml_backend_graph_compute(backend, graph) == 0
            lib.ggml_backend_tensor_get(product, ffi.from_buffer(turned), 0, turned.nbytes)
    np.testing.assert_array_equal(fwht(x, n_rot), turned)


def test_rotation_and_type_matter() -> None:
    """What the comparisons above would miss if everything came out the same."""
    src = ggml.quantize(numbers("normal", 128), "f16")
    found = {(t, n): quantize(src, t, n).tobytes() for t in TARGETS for n in (0, 32, 64, 128)}
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": 33}, "rows of 33 values of type 1, rotated in blocks of 0, do not go to type 2"),
        ({"n": 0}, "rows of 0 values of type 1, rotated in blocks of 0, do not go to type 2"),
        ({"n_rot": 16}, "rows of 96 values of type 1, rotated in blocks of 16, do not go to type 2"),
        ({"n_rot": 64}, "rows of 96 values of type 1, rotated in blocks of 64, do not go to type 2"),
        ({"n_rot": 96}, "rows of 96 values of type 1, rotated in blocks of 96, do not go to type 2"),
        ({"n_rot": -32}, "rows of 96 values of type 1, rotated in blocks of -32, do not go to type 2"),
        ({"n_rot": 2048, "n": 2048}, "rows of 2048 values of type 1, rotated in blocks of 2048, do not go to type 2"),
        ({"target": 10}, "rows of 96 values of type 1, rotated in blocks of 0, do not go to type 10"),
        ({"source": 8}, "rows of 96 values of type 8, rotated in blocks of 0, do not go to type 2"),
        ({"source": -1}, "rows of 96 values of type -1, rotated in blocks of 0, do not go to type 2"),
        ({"n_rows": -1}, "there are no rows"),
        ({"src": ffi.NULL}, "there are no rows"),
        ({"isa": b"sse2"}, f"this machine does not run 'sse2' (it has {' '.join(isas())})"),
    ],
    ids=str,
)
def test_what_can_not_be_is_refused(changes: dict[str, object], reason: str) -> None:
    src, dst = np.zeros(4096, np.float16), np.full(4096, 0xA5, np.uint8)
    args = {
        "src": ffi.from_buffer(src), "source": 1, "dst": ffi.from_buffer(dst), "target": 2, "n_rows": 1, "n": 96,
        "n_rot": 0, "isa": ffi.NULL,
    }  # fmt: skip
    assert lib.llama_kv_mixed_quantize(*(args | changes).values()) == -1
    assert ffi.string(lib.llama_kv_mixed_last_error()).decode() == reason
    assert (dst == 0xA5).all()
    assert lib.llama_kv_mixed_quantize(*args.values()) == 0
    assert not (dst[:54] == 0xA5).any()
