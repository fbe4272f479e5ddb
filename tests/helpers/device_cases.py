"""Cases for attention on a device: shapes that kernels for GPUs are written for, and how their results are judged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamamix import ggml
from llamamix.formats import FORMATS

from . import attention_f16 as f16
from .attention_cases import TILE, Case, Data, cover, make_data
from .attention_reference import Expected, reference
from .requests import Program
from .rows import fwht

COLD = tuple(name for name in FORMATS if name != "f32")

AXES: dict[str, tuple[Any, ...]] = {
    "cold_k": COLD,
    "cold_v": COLD,
    "hot_k": ("f16", "bf16"),
    "hot_v": ("f16", "bf16"),
    "n_embd": (64, 96, 128, 256),
    "n_gqa": (1, 2, 3, 4, 5, 7, 8, 12, 16),
    "n_head_kv": (1, 2, 3),
    "n_tokens": (1, 2, 5, 17),
    "n_stream": (1, 2, 3),
    "n_cold": (0, 1, 31, 64, 127, 129, 500, 3000),
    "n_hot": (1, 3, 31, 64, 127, 129, 500),
    "mask": ("none", "causal", "sequences", "sparse"),
    "max_bias": (0.0, 8.0),
    "logit_softcap": (0.0, 20.0),
    "sinks": (False, True),
    "q_size": (0.3, 2.0, 8.0),
    "n_rot_k": (0, 64, 128),
    "n_rot_v": (0, 64, 128),
    "mean": (0.0, 0.3, 3.0),
}
_COST_MAX = 20_000_000
_SMALLEST = {"n_embd": 64, "n_gqa": 1, "n_head_kv": 1, "n_tokens": 1, "n_stream": 1, "n_cold": 0, "n_hot": 1}


def _case(values: dict[str, Any], seed: int = 0) -> Case:
    n_embd = values["n_embd"]
    rest = {name: value for name, value in values.items() if name != "n_embd"}
    return Case(n_embd_k=n_embd, n_embd_v=n_embd, seed=seed, **rest)


def _is_possible(values: dict[str, Any]) -> bool:
    """Whether there can be a case with these values, whatever the others."""
    n_rot = [values[name] for name in ("n_rot_k", "n_rot_v") if values.get(name)]
    if any(values.get("n_embd", 128) % n for n in n_rot):
        return False
    if values.get("mean") and not ggml.is_quantized(values.get("cold_k", "q4_0")):
        return False
    return _case(_SMALLEST | {"n_embd": max([64, *n_rot])} | values).cost <= _COST_MAX


# as models have them
REAL = [
    Case(n_embd_k=128, n_embd_v=128, n_head_kv=8, n_cold=7680, n_hot=512, n_rot_k=128, n_rot_v=64, mask="causal"),
    Case(n_embd_k=128, n_embd_v=128, n_head_kv=1, n_cold=32256, n_hot=512, n_rot_k=128, n_rot_v=64, mean=0.3),
    Case(
        cold_k="q5_0", cold_v="iq4_nl", n_embd_k=128, n_embd_v=128, n_head_kv=2, n_gqa=4, n_tokens=8, n_cold=4096,
        n_hot=768, n_rot_k=128, n_rot_v=64, mask="causal", mean=1.0,
    ),
    Case(
        cold_k="q8_0", cold_v="q8_0", n_embd_k=256, n_embd_v=256, n_head_kv=1, n_gqa=4, n_tokens=2, n_cold=4096,
        n_hot=512, logit_softcap=20.0, mask="sequences", n_rot_k=256, n_rot_v=64,
    ),
    Case(
        cold_k="iq4_nl", cold_v="iq4_nl", n_embd_k=64, n_embd_v=64, n_head_kv=2, n_gqa=8, n_tokens=2, n_cold=2048,
        n_hot=512, sinks=True, mask="causal", n_stream=2, n_rot_k=64, n_rot_v=64,
    ),
    Case(
        n_embd_k=128, n_embd_v=128, n_head_kv=1, n_tokens=130, n_cold=1024, n_hot=512, mask="causal", n_rot_k=128,
        n_rot_v=64,
    ),
]  # fmt: skip

# that a sanitizer has done with in seconds
_SHAPE = {"n_embd_k": 128, "n_embd_v": 128, "n_rot_k": 128, "n_rot_v": 64, "n_cold": 129, "n_hot": 63}
SMALL = [
    Case(mask="causal", **_SHAPE),
    Case(cold_k="q8_0", cold_v="iq4_nl", hot_k="bf16", n_tokens=5, n_stream=2, mean=0.3, mask="sparse", **_SHAPE),
    Case(
        cold_k="q5_0", cold_v="q4_1", n_gqa=3, n_tokens=2, sinks=True, mask="sequences",
        **_SHAPE | {"n_cold": 31, "n_hot": 1},
    ),
    Case(n_gqa=8, n_tokens=2, mask="causal", logit_softcap=20.0, **_SHAPE | {"n_cold": 0}),
]  # fmt: skip


def cases(quick: bool = False) -> list[Case]:
    """Every possible pair of values of any two axes, and some as models have them; quick: an eighth of them."""
    res = [_case(values, i) for i, values in enumerate(cover(AXES, _is_possible))] + REAL
    return res[::8] if quick else res


@dataclass
class Prepared:
    """A case's data, what attention over it is, and what it may be off by, by the way it is computed."""

    data: Data
    expected: Expected
    limits: dict[str, tuple[np.ndarray, float]]


def prepare(case: Case, ways: Iterable[str]) -> Prepared:
    """ways: of attention_f16.bounds()."""
    data = f16.as_f16(make_data(case))
    expected = reference(data)
    return Prepared(data, expected, {how: f16.bounds(data, expected, how) for how in ways})


#
# the join, migration
#


def judge_join(program: Program, data: Data, which: int) -> float:
    """The largest share of what a value of the join of K (0) or V (1) may be off by.

    Raises:
        Refused: When it can not be computed.
    """
    c = data.case
    n_rot = (c.n_rot_k, c.n_rot_v)[which]
    actual = program.join(data.segments[0][which], data.segments[1][which], n_rot, data.means if which == 0 else None)
    exact, most = f16.join_bounds(data, which)
    with np.errstate(invalid="ignore"):
        error = np.abs(actual.astype(np.float64) - exact)
    return float((np.where(np.isnan(error), np.inf, error) / most).max())


@dataclass
class Migration:
    same: float  # share of blocks that have the bytes of ggml's operations on the CPU
    rms: float  # of the error of rows, in units of that of ggml's operations on the CPU
    mean: float  # the largest error of a mean, as a share of what it may be off by

    @property
    def ok(self) -> bool:
        """Sums in another order make a few values fall on the other side of a rounding: the error stays what it is. A
        device may also search scales where the CPU does not: it becomes smaller."""
        return (0.9 <= self.rms <= 1.02 or self.same == 1) and self.mean <= 1


def judge_migration(
    program: Program,
    how: str,
    hot: str,
    cold: str,
    n_rot: int,
    has_means: bool = False,
    n_rows: int = 3 * TILE,
    n: int = 1024,
) -> Migration:
    """Rows of n values that a device rotates and stores in another type, beside what the CPU's operations make of them.

    how        "migrate": by ggml's operations, "move": by nodes of ours
    has_means  they are stored less the means of their pages

    Raises:
        Refused: When the device can not.
    """
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n_rows, n)) + 2 * rng.normal(size=n)  # channels have means of their own
    src = ggml.quantize(rows.astype(np.float32), hot)
    actual, means = program.migrate(how, src, cold, n_rot, n_rows // TILE if has_means else 0)
    rotated = src.dequantize()
    rotated = fwht(rotated, n_rot) if n_rot else rotated
    share = 0.0
    if has_means:
        pages = rotated.astype(np.float64).reshape(-1, TILE, n)
        exact, size = pages.mean(axis=1), np.abs(pages).mean(axis=1)
        # rounded to F16; a GPU's matrix product may cut numbers off after 10 bits (TF32)
        most = f16.H * np.abs(exact) + f16.TINY + 2.0**-10 * size
        share = float(np.nan_to_num(np.abs(means - exact) / most, nan=np.inf).max())
        rotated = rotated - np.repeat(means.astype(np.float32), TILE, axis=0)
    theirs = ggml.quantize(rotated, cold)
    ours = ggml.Tensor(cold, src.ne, actual.view(theirs.data.dtype).reshape(theirs.data.shape))
    blocks = [x.reshape(-1, ggml.type_size(cold)) for x in (actual, theirs.data.view(np.uint8))]
    errors = [np.sqrt(np.mean(np.square(x.dequantize().astype(np.float64) - rotated))) for x in (ours, theirs)]
    same = float((blocks[0] == blocks[1]).all(axis=1).mean())
    return Migration(same, float(errors[0] / errors[1]) if errors[1] else 1.0 + float(errors[0]), share)
