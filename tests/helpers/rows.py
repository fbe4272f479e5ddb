"""How rows of K and V are stored, in numpy: rotated and quantised by ggml's operations, without its code."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import gguf
import numpy as np


def hadamard(n: int) -> np.ndarray:
    """The orthonormal Walsh-Hadamard matrix, its own inverse."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def rotation(n: int, head_size: int) -> np.ndarray:
    """Head-sized, with blocks of n."""
    return np.kron(np.eye(head_size // n), hadamard(n))


def fwht(x: np.ndarray, n: int) -> np.ndarray:
    """Float32 rows times hadamard(n) in blocks of n, by ggml's operations in ggml's order (ggml_compute_forward_fwht)."""
    res = x.reshape(-1, n) * (np.float32(1) / np.sqrt(np.float32(n)))
    for h in (2**i for i in range(n.bit_length() - 1)):
        a, b = np.moveaxis(res.reshape(-1, n // (2 * h), 2, h), 2, 0)
        res = np.stack([a + b, a - b], axis=2).reshape(-1, n)
    return res.reshape(x.shape)


def steps(kv_type: str, x: np.ndarray) -> np.ndarray:
    """ggml's quantize_row_q4_0_ref() and those of Q4_1, Q5_0 and Q5_1, in float32."""
    x = x.reshape(-1, 32)
    n_bits, above = int(kv_type[1]), kv_type[3] == "1"
    n = 2**n_bits
    if above:  # a number of steps from the smallest value to the largest one
        low = np.take_along_axis(x, x.argmin(axis=1)[:, None], axis=1)  # the first of several, as zeros have signs
        d = (x.max(axis=1, keepdims=True) - low) / np.float32(n - 1)
        d = np.where(d == 0, np.float32(0), d)
        x, middle = x - low, 0
    else:
        most = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
        d, middle = np.where(most == 0, np.float32(0), most) / np.float32(-n // 2), n // 2
    with np.errstate(divide="ignore"):
        factor = np.where(d == 0, np.float32(0), np.float32(1) / d)
    q = np.minimum(np.trunc(x * factor + np.float32(middle + 0.5)), n - 1).astype(np.uint8)
    return blocks(q, n_bits, d, *([low] if above else []))


def blocks(q: np.ndarray, n_bits: int, *numbers: np.ndarray) -> np.ndarray:
    """Blocks that begin with these numbers in F16, then have the fifth bits of values and at last the other four."""
    parts = [x.astype(np.float16).view(np.uint8) for x in numbers]
    if n_bits == 5:
        parts.append(np.packbits(q >> 4, axis=1, bitorder="little"))
    return np.hstack([*parts, q[:, :16] & 15 | q[:, 16:] << 4])


def q8_0(x: np.ndarray) -> np.ndarray:
    """ggml's quantize_row_q8_0() for x86, in float32."""
    x = x.reshape(-1, 32)
    most = np.abs(x).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        factor = np.where(most == 0, np.float32(0), np.float32(127) / most)
    d = (most / np.float32(127)).astype(np.float16)
    return np.hstack([d.view(np.uint8), np.rint(x * factor).astype(np.int8).view(np.uint8)])


# types whose scale is searched on the CPU: what the values of a block are multiples of it of
GRIDS = {
    "iq4_nl": np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32),
    "q5_0": np.arange(-16, 16, dtype=np.float32),
}
# where the largest value of a block is brought to, the first as ggml does
ENDS = {
    "iq4_nl": [-127, -140, -135, -131, -124.5, -122, -119.5, -112, -108, -103, 90, 108, 112, 116, 120, 125],
    "q5_0": [
        -16, -16.85, -16.6, -16.4, -16.2, -15.85, -15.65, -15.25, -15, -14.75, -14.3, -14.05, -13.75, -13.25, -12.9, -12.1,
    ],
}  # fmt: skip


def nearest(kv_type: str, x: np.ndarray) -> np.ndarray:
    """The how manieth of GRIDS is nearest, the larger one where two are as near."""
    if kv_type == "q5_0":  # as ggml rounds
        return np.clip(x + np.float32(16.5), 0, 31).astype(np.uint8)
    grid = GRIDS[kv_type]
    return np.searchsorted((grid[1:] + grid[:-1]) / 2, x, side="right").astype(np.uint8)


def searched(kv_type: str, x: np.ndarray) -> np.ndarray:
    """Blocks with the scale of ENDS that leaves the least squared error, refined by least squares, in float32."""
    x = x.reshape(-1, 32)
    grid, ends = GRIDS[kv_type], np.array(ENDS[kv_type], np.float32)
    most = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor = ends / most  # [block, scale]
        factor[:, :1] = np.float32(1) / (most / ends[0])
        sum_qx, sum_qq = np.zeros_like(factor), np.zeros_like(factor)
        for i in range(32):
            q = grid[nearest(kv_type, x[:, i : i + 1] * factor)]
            sum_qx += q * x[:, i : i + 1]
            sum_qq += q * q
        d = (sum_qx / sum_qq).astype(np.float16).astype(np.float32)
        gain = d * (sum_qx + sum_qx - d * sum_qq)
        gain[:, 0] *= np.float32(1 + 2**-16)
        key = gain.view(np.int32) & ~15 | np.arange(16)
        d = np.take_along_axis(d, np.maximum(key, 0).max(axis=1)[:, None] & 15, axis=1)
        d[np.abs(most) < np.float32(1e-15)] = 0
        q = nearest(kv_type, x * np.where(d == 0, np.float32(0), np.float32(1) / d))
    return blocks(q, 5 if len(grid) == 32 else 4, d)


def migrated(rows: np.ndarray, kv_type: str, n_rot: int) -> np.ndarray:
    """The bytes that a migration on the CPU makes of hot rows, every bit of them; n_rot 0: they are not rotated."""
    x = np.asarray(rows, np.float32)
    x = fwht(x, n_rot) if n_rot else x
    if kv_type in ("f32", "f16"):
        return x.astype({"f32": np.float32, "f16": np.float16}[kv_type]).view(np.uint8)
    if kv_type == "bf16":  # of numbers, no NaN
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)
    store = q8_0 if kv_type == "q8_0" else partial(searched if kv_type in GRIDS else steps, kv_type)
    return store(x).reshape(*rows.shape[:-1], -1)


def quantise(rows: np.ndarray, kv_type: str) -> np.ndarray:
    """What is left of rows, in float64, after they were stored in a type on the CPU. The last dimension holds the blocks."""
    rows = np.ascontiguousarray(rows, np.float32)
    if kv_type == "f32":
        return rows.astype(np.float64)
    if kv_type == "f16":
        return rows.astype(np.float16).astype(np.float64)
    number = gguf.GGMLQuantizationType[kv_type.upper()]
    stored = migrated(rows, kv_type, 0) if kv_type in GRIDS else gguf.quants.quantize(rows, number)
    return gguf.quants.dequantize(stored, number).astype(np.float64)


@dataclass(frozen=True)
class Storage:
    """The types that rows are stored in, and whether cold ones are rotated first (None: as the library does)."""

    hot: str = "f32"
    cold_k: str = "q4_0"
    cold_v: str = "q4_0"
    rotate: bool | None = None

    def rotations(self, head_size: int) -> tuple[np.ndarray, np.ndarray]:
        """For K the largest power of two that divides the head, for V blocks of 64; none for types with no blocks."""

        def one(kv_type: str, n: int) -> np.ndarray:
            wanted = kv_type not in ("f32", "f16", "bf16") and head_size % 64 == 0
            wanted = wanted if self.rotate is None else self.rotate
            return rotation(n, head_size) if wanted else np.eye(head_size)

        return one(self.cold_k, head_size & -head_size), one(self.cold_v, 64)
