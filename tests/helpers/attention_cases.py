"""Cases of attention over hot and cold rows: their shapes, their data, and the kernel that computes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamamix import ggml
from llamamix.attention import attention, isas
from llamamix.formats import FORMATS

from . import emulated
from .rows import rotation

ISAS = isas()
ALL_ISAS = emulated.all_isas(ISAS)

TILE = 128  # cells of a segment that share a unit for the weights, at most
BLOCK = 32
MAX_ROWS_DIRECT = 16  # query rows (query heads to a KV head, times tokens) up to which rows are used as they are stored
MAX_ROWS = 128

# With more query rows than that, rows of these types are rounded, or what they meet is, where the processor has fast products
# for that: of bytes and of BF16.
COARSE = ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
PRODUCTS = {
    "amx": ("bf16", "bf16"), "avx512bf16": ("int", "bf16"), "avx512": ("int", "float"),
    "avxvnni": ("int", "float"), "avx2": ("int", "float"), "neonbf16": ("int", "bf16"), "dotprod": ("int", "float"),
}  # fmt: skip

# instruction sets whose kernels differ from another one's in their products of many query rows alone
OTHER_PRODUCTS = {"amx": "avx512", "avx512bf16": "avx512", "neonbf16": "dotprod"}

AXES: dict[str, tuple[Any, ...]] = {
    "cold_k": tuple(FORMATS),
    "cold_v": tuple(FORMATS),
    "hot_k": ("f16", "bf16", "f32"),
    "hot_v": ("f16", "bf16", "f32"),
    "n_embd_k": (64, 80, 96, 128, 192, 256, 16, 40, 72),
    "n_embd_v": (64, 80, 96, 128, 192, 256, 16, 40, 72),
    "n_gqa": (*range(1, 17), 71),
    "n_head_kv": (1, 2, 3, 16),
    "n_tokens": (1, 2, 5, 17, 40, 130),
    "n_stream": (1, 2, 3),
    "n_cold": (0, 1, 3, 31, 63, 64, 65, 127, 128, 129, 500, 5000),  # 5000: heads are worked on together
    "n_hot": (0, 1, 3, 31, 63, 64, 65, 127, 128, 129, 500),
    "mask": ("none", "causal", "sequences", "sparse"),
    "mask_dtype": ("float16", "float32"),
    "n_threads": (2, 5),  # beside 1
    "max_bias": (0.0, 8.0),
    "logit_softcap": (0.0, 20.0),
    "sinks": (False, True),
    "q_size": (0.3, 2.0, 8.0),  # 8: nearly all the weight is on a cell
    "layout": ("cells", "heads"),  # what lies next to each other
    "n_rot_k": (0, 16, 64, 128),  # how cold rows are rotated
    "n_rot_v": (0, 16, 64, 128),
    "mean": (0.0, 0.3, 3.0),  # size of the means of K, 0: rows are stored as they are
    "v_skip": (0.0, 0.01, 0.5),
}


@dataclass(frozen=True)
class Case:
    cold_k: str = "q4_0"
    cold_v: str = "q4_0"
    hot_k: str = "f16"
    hot_v: str = "f16"
    n_embd_k: int = 64
    n_embd_v: int = 64
    n_gqa: int = 4
    n_head_kv: int = 2
    n_tokens: int = 1
    n_stream: int = 1
    n_cold: int = 500
    n_hot: int = 127
    mask: str = "none"
    mask_dtype: str = "float16"
    n_threads: int = 2
    max_bias: float = 0.0
    logit_softcap: float = 0.0
    sinks: bool = False
    q_size: float = 2.0
    layout: str = "cells"
    n_rot_k: int = 0
    n_rot_v: int = 0
    mean: float = 0.0
    v_skip: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        return "-".join(str(getattr(self, name)) for name in AXES)

    @property
    def direct(self) -> bool:
        return self.n_gqa * self.n_tokens <= MAX_ROWS_DIRECT

    def products(self, isa: str | None) -> tuple[str, str]:
        """How many query rows are multiplied with cold rows of K, and their weights with those of V."""
        name = (isa or ISAS[0]).removeprefix("emulated ")
        k, v = PRODUCTS.get(name, ("float", "float"))
        if self.cold_k not in COARSE or (name == "avx2" and self.cold_k == "iq4_nl"):
            k = "float"
        return ("float", "float") if self.direct else (k, v if self.cold_v in COARSE else "float")

    @property
    def skips(self) -> bool:
        """Whether rows of V may be left unread."""
        n_cold, n_hot = (-(-n // TILE) for n in (self.n_cold, self.n_hot))
        return self.v_skip > 0 and self.direct and self.n_embd_v % BLOCK == 0 and n_cold > n_hot > 0

    @property
    def cost(self) -> int:
        """Products."""
        rows = self.n_gqa * self.n_head_kv * self.n_tokens * self.n_stream
        return rows * (self.n_cold + self.n_hot) * (self.n_embd_k + self.n_embd_v)


COST_MAX = 50_000_000

Pair = tuple[str, Any, str, Any]


def is_possible(values: dict[str, Any]) -> bool:
    """Whether there can be a case with these values, whatever the others."""
    for which in "kv":
        n_embd, kv_type = values.get(f"n_embd_{which}"), values.get(f"cold_{which}")
        if n_embd and kv_type not in (None, "f32", "f16", "bf16") and n_embd % BLOCK != 0:
            return False
        if n_embd and n_embd % (values.get(f"n_rot_{which}") or 1) != 0:
            return False
    if values.get("mean") and values.get("n_embd_k", BLOCK) % BLOCK != 0:
        return False
    small = {f"n_embd_{which}": values.get(f"n_rot_{which}") or 16 for which in "kv"}
    if values.get("mean"):
        small["n_embd_k"] = max(BLOCK, small["n_embd_k"])
    small |= {"n_head_kv": 1, "n_cold": 1, "n_hot": 1, "n_gqa": 1}
    return values.get("n_cold", 1) + values.get("n_hot", 1) > 0 and Case(**small | values).cost <= COST_MAX


def cover(axes: dict[str, Any], possible: Callable[[dict[str, Any]], bool], seed: int = 0) -> list[dict[str, Any]]:
    """Values of axes, so that every possible pair of values of any two is among them, found greedily at random."""
    rng = np.random.default_rng(seed)
    missing: dict[Pair, None] = {
        (a, x, b, y): None
        for a, b in itertools.combinations(axes, 2)
        for x, y in itertools.product(axes[a], axes[b])
        if possible({a: x, b: y})
    }
    res = []
    while missing:
        a, x, b, y = next(iter(missing))
        best: tuple[dict[str, Any], set[Pair]] = ({}, set())
        for _ in range(10):
            values = {name: axis[rng.integers(len(axis))] for name, axis in axes.items()} | {a: x, b: y}
            if possible(values):
                covered = {(*i, *j) for i, j in itertools.combinations(values.items(), 2)} & missing.keys()
                if len(covered) > len(best[1]):
                    best = values, covered
        if best[1]:
            res.append(best[0])
            for pair in best[1]:
                del missing[pair]
    return res


def pairwise() -> list[Case]:
    """Cases that have every possible pair of values of any two axes."""
    return [Case(**values, seed=i) for i, values in enumerate(cover(AXES, is_possible))]


@dataclass
class Data:
    """A case's arrays, and its rows as the numbers that their types hold."""

    case: Case
    q: np.ndarray  # [n_stream, n_tokens, n_head, n_embd_k]
    cold: tuple[np.ndarray, np.ndarray]  # as attention() takes them
    hot: tuple[np.ndarray, np.ndarray]
    k: np.ndarray  # [n_stream, n_kv, n_head_kv, n_embd_k], F64
    v: np.ndarray
    means: np.ndarray | None  # of cold K, as attention() takes them
    mask: np.ndarray | None
    sinks: np.ndarray | None
    scale: float

    @property
    def segments(self) -> list[tuple[tuple[str, np.ndarray], tuple[str, np.ndarray]]]:
        """Types and rows of K and V, cold and hot."""
        c = self.case
        (cold_k, cold_v), (hot_k, hot_v) = self.cold, self.hot
        return [((c.cold_k, cold_k), (c.cold_v, cold_v)), ((c.hot_k, hot_k), (c.hot_v, hot_v))]

    @property
    def options(self) -> dict[str, Any]:
        """What attention() takes beside rows."""
        c = self.case
        return {
            "mask": self.mask, "sinks": self.sinks, "scale": self.scale, "logit_softcap": c.logit_softcap,
            "max_bias": c.max_bias, "n_rot": (c.n_rot_k, c.n_rot_v), "means": self.means, "v_skip": c.v_skip,
        }  # fmt: skip

    def compute(self, isa: str | None = None, n_threads: int = 1) -> np.ndarray:
        c = self.case
        if isa in emulated.emulated_isas():
            return emulated.compute(isa, self.q, self.segments, **self.options, n_threads=n_threads)
        types = ((c.cold_k, c.cold_v), (c.hot_k, c.hot_v))
        return attention(self.q, self.cold, self.hot, types=types, **self.options, n_threads=n_threads, isa=isa)


def make_rows(rng: np.random.Generator, case: Case, n_kv: int, kv_type: str, n_embd: int) -> tuple[np.ndarray, ...]:
    """Rows as they are stored, and as numbers."""
    order = (1, 0) if case.layout == "cells" else (0, 1)
    dims = np.array([case.n_head_kv, n_kv])[list(order)]
    tensor = ggml.quantize(rng.normal(size=(case.n_stream, *dims, n_embd)).astype(np.float32), kv_type)
    # numpy's order of [stream, cell, head]
    axes = (0, 1, 2, 3) if case.layout == "cells" else (0, 2, 1, 3)
    return tensor.data.transpose(axes), tensor.dequantize().transpose(axes).astype(np.float64)


def make_means(rng: np.random.Generator, case: Case) -> np.ndarray | None:
    if case.mean == 0 or case.n_cold == 0:
        return None
    shape = (case.n_stream, -(-case.n_cold // TILE), case.n_head_kv, case.n_embd_k)
    return (case.mean * rng.normal(size=shape)).astype(np.float16)


def by_cell(means: np.ndarray, n_cold: int) -> np.ndarray:
    """The mean of each cell's page: float64 [n_stream, n_cold, n_head_kv, n_embd_k]."""
    return np.repeat(means.astype(np.float64), TILE, axis=1)[:, :n_cold]


def make_mask(rng: np.random.Generator, case: Case) -> np.ndarray | None:
    n_kv = case.n_cold + case.n_hot
    shape = (case.n_stream, case.n_tokens, n_kv)
    cell, token = np.arange(n_kv), np.arange(case.n_tokens)[:, None]
    distance = (n_kv - case.n_tokens + token) - cell  # the newest tokens are in the last cells
    if case.mask == "none":
        return None
    if case.mask == "causal":  # with fewer cells than tokens, the first of these see none
        seen = np.broadcast_to(distance >= 0, shape)
    elif case.mask == "sequences":  # which take turns of 100 cells: whole tiles are another one's
        seen = np.broadcast_to((cell // 100 % 3 == token % 3) & (distance >= 0), shape)
    else:
        seen = rng.random(shape) < 0.3
        seen &= rng.random((*shape[:2], 1)) < 0.8  # tokens that see nothing at all
        seen &= np.repeat(rng.random((*shape[:2], -(-n_kv // TILE))) < 0.7, TILE, axis=2)[:, :, :n_kv]
    bias = -np.abs(distance) / 8 if case.max_bias > 0 else 0.0
    with np.errstate(divide="ignore"):
        return np.where(seen, bias, -np.inf).astype(case.mask_dtype)


def rotations(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """What cold rows of K and V are multiplied with: matrices that are their own inverses."""
    sides = ((case.n_rot_k, case.n_embd_k), (case.n_rot_v, case.n_embd_v))
    k, v = (rotation(n, n_embd) if n else np.eye(n_embd) for n, n_embd in sides)
    return k, v


def make_data(case: Case) -> Data:
    rng = np.random.default_rng(case.seed)
    shape = (case.n_stream, case.n_tokens, case.n_gqa * case.n_head_kv, case.n_embd_k)
    q = (case.q_size * rng.normal(size=shape)).astype(np.float32)
    (kc, kc_f), (vc, vc_f) = (
        make_rows(rng, case, case.n_cold, t, n) for t, n in ((case.cold_k, case.n_embd_k), (case.cold_v, case.n_embd_v))
    )
    (kh, kh_f), (vh, vh_f) = (
        make_rows(rng, case, case.n_hot, t, n) for t, n in ((case.hot_k, case.n_embd_k), (case.hot_v, case.n_embd_v))
    )
    means = make_means(rng, case)
    if means is not None:
        kc_f = kc_f + by_cell(means, case.n_cold)
    kc_f, vc_f = (x @ r for x, r in zip((kc_f, vc_f), rotations(case), strict=True))
    sinks = rng.normal(size=shape[2]).astype(np.float32) + 1 if case.sinks else None
    k, v = np.concatenate([kc_f, kh_f], axis=1), np.concatenate([vc_f, vh_f], axis=1)
    scale = float(np.float32(1 / math.sqrt(case.n_embd_k)))
    return Data(case, q, (kc, vc), (kh, vh), k, v, means, make_mask(rng, case), sinks, scale)
