"""Attention nodes as a client of ggml-rpc sends them, every tensor in a buffer of its own size."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from llamamix import _ffi, ggml
from llamamix.formats import FORMATS

from .processes import library_dir
from .rows import hadamard
from .rpc import N_PARAMS, N_SRC, Connection, Tensor

F32, F16, I32, I64 = 0, 1, 26, 27  # enum ggml_type

# ops/op.h
MAGIC, VERSION, ATTN, JOIN, MEAN, MOVE = 0x564B584D, 1, 1, 2, 3, 4
Q, K_HOT, V_HOT, MASK, K_COLD, V_COLD, K_MEAN, SINKS = range(8)
FROM, TO, ROW_FROM, ROW_TO, PAGES, MEANS, PAGES_NEW = range(7)  # of a move; the last is a mean's
PAGE = 128

# an address at which nothing is: who calls it ends at once
NOWHERE = 0x10


@cache
def op(name: str) -> int:
    """The number of an operation (enum ggml_op)."""
    base = ctypes.CDLL(str(library_dir() / _ffi._file_name("ggml-base")))
    base.ggml_op_name.restype = ctypes.c_char_p
    return next(i for i in range(200) if base.ggml_op_name(i) == name.encode())


def strides(kv_type: int, ne: tuple[int, ...]) -> tuple[int, ...]:
    if kv_type in (I32, I64):
        size = 4 if kv_type == I32 else 8
        return size, size * ne[0], size * ne[0] * ne[1], size * ne[0] * ne[1] * ne[2]
    block, size = next((f.n_block, f.size_block) for f in FORMATS.values() if f.type == kv_type)
    nb = [size, ne[0] // block * size]
    for n in ne[1:3]:
        nb.append(nb[-1] * n)
    return tuple(nb)


def n_bytes(t: Tensor) -> int:
    """Of a contiguous tensor."""
    return t.nb[3] * t.ne[3]


def params(function: int = NOWHERE, magic: int = MAGIC, version: int = VERSION, kind: int = ATTN, is_host: int = 0,
           scale: float = 0.125, max_bias: float = 0.0, softcap: float = 0.0, n_rot_k: int = 0, n_rot_v: int = 0,
           v_skip: float = 0.0) -> tuple[int, ...]:  # fmt: skip
    """op_params of a node: a host function's address, the number of tasks, its data, then what it says of itself."""
    data = struct.pack("<QiiQihhifffiif", function, -1, 0, NOWHERE, magic, version, kind, is_host, scale, max_bias, softcap,
                       n_rot_k, n_rot_v, v_skip)  # fmt: skip
    return struct.unpack(f"<{N_PARAMS}i", data.ljust(4 * N_PARAMS, b"\0"))


@dataclass
class Node:
    """An attention node with random rows; ``tensors`` are by source, the node itself is at -1.

    cold  ggml's name of the type of cold rows; None: all are hot
    """

    cold: str | None = "f16"
    hot: str = "f16"
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    n_tokens: int = 1  # of a stream
    n_stream: int = 1
    n_cold: int = 200
    n_hot: int = 40
    mean: bool = False
    sinks: bool = False
    mask_f16: bool = True
    options: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        n_cold = self.n_cold if self.cold else 0
        e, h, s = self.n_embd, self.n_head_kv, self.n_stream
        self.tensors: dict[int, Tensor] = {}
        self.data: dict[int, bytes] = {}
        self.values: dict[int, np.ndarray] = {}  # what the data mean, float64, dimensions reversed

        def add(which: int, kv_type: str, ne: tuple[int, ...], values: np.ndarray) -> None:
            ne = (*ne, 1, 1, 1)[:4]
            number = FORMATS[kv_type].type
            self.tensors[which] = Tensor(which + 100, number, ne, strides(number, ne))
            stored = ggml.quantize(np.ascontiguousarray(values, np.float32), kv_type)
            self.data[which] = stored.data.tobytes()
            self.values[which] = stored.dequantize().astype(np.float64)

        add(Q, "f32", (e, self.n_head, self.n_tokens * s), rng.normal(size=(self.n_tokens * s, self.n_head, e)))
        for which, kv_type, n in (
            (K_HOT, self.hot, self.n_hot),
            (V_HOT, self.hot, self.n_hot),
            (K_COLD, self.cold, n_cold),
            (V_COLD, self.cold, n_cold),
        ):
            if kv_type and n:
                add(which, kv_type, (e, h, n, s), rng.normal(size=(s, n, h, e)))
        n_kv = n_cold + self.n_hot
        mask = np.where(rng.random((s, 1, self.n_tokens, n_kv)) < 0.2, -np.inf, 0.0)
        mask[..., -1] = 0.0
        number = F16 if self.mask_f16 else F32
        ne = (n_kv, self.n_tokens, 1, s)
        self.tensors[MASK] = Tensor(MASK + 100, number, ne, strides(number, ne))
        self.data[MASK] = mask.astype(np.float16 if self.mask_f16 else np.float32).tobytes()
        self.values[MASK] = mask
        if self.mean and n_cold:
            n_page = -(-n_cold // PAGE)
            add(K_MEAN, "f16", (e * h, n_page, s), 0.3 * rng.normal(size=(s, n_page, e * h)))
        if self.sinks:
            add(SINKS, "f32", (self.n_head,), rng.normal(size=self.n_head))

        src = [self.tensors[i].id if i in self.tensors else 0 for i in range(8)] + [0, 0]
        ne = (e * self.n_head, self.n_tokens * s, 1, 1)
        self.tensors[-1] = Tensor(
            99, F32, ne, strides(F32, ne), op=op("CUSTOM"), params=params(**self.options), src=tuple(src[:N_SRC])
        )

    @property
    def node(self) -> Tensor:
        return self.tensors[-1]

    @property
    def by_id(self) -> dict[int, Tensor]:
        return {t.id: t for t in self.tensors.values()}

    def place(self, connection: Connection) -> None:
        """Give every tensor a buffer of its size, and its data."""
        for which, tensor in self.tensors.items():
            buffer, base = connection.allocate(n_bytes(tensor))
            self.tensors[which] = tensor.with_(buffer=buffer, data=base)
        for which, data in self.data.items():
            connection.set(self.tensors[which], data)

    def result(self, connection: Connection) -> np.ndarray:
        """[n_tokens, n_embd * n_head]; raises ConnectionError when the node was refused."""
        n = n_bytes(self.node)
        return np.frombuffer(connection.get(self.node, n), np.float32).reshape(self.node.ne[1], -1)

    def compute(self, connection: Connection) -> np.ndarray:
        connection.compute([self.node.id], list(self.tensors.values()))
        return self.result(connection)

    def expected(self) -> np.ndarray:
        """The same in float64, without rotation and the like."""
        v, s, t = self.values, self.n_stream, self.n_tokens
        q = v[Q].reshape(s, t, self.n_head, self.n_embd)
        k, values = (
            np.concatenate([v[i] for i in (cold, hot) if i in v], axis=1)
            for cold, hot in ((K_COLD, K_HOT), (V_COLD, V_HOT))
        )
        if K_MEAN in v:
            mean = np.repeat(v[K_MEAN].reshape(s, -1, self.n_head_kv, self.n_embd), PAGE, axis=1)[:, : self.n_cold]
            k[:, : self.n_cold] += mean
        group = self.n_head // self.n_head_kv
        k, values = (np.repeat(x, group, axis=2) for x in (k, values))  # [s, n_kv, n_head, n_embd]
        scores = np.einsum("sthe,sche->stch", q, k) * 0.125 + v[MASK].reshape(s, t, -1, 1)
        top = scores.max(axis=2, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(axis=2, keepdims=True)
        if SINKS in v:
            total = total + np.exp(v[SINKS] - top)
        return np.einsum("stch,sche->sthe", weights / total, values).reshape(s * t, -1)


class Move:
    """Twenty rows of a hot part that go to a cold one of 300, and to three pages, of which two are new.

    The nodes, of which the first makes the means, are at -2 and -1 of ``tensors``.
    """

    n_embd, n_from, n_to, n = 128, 40, 300, 20

    def __init__(self, to: str, n_rot: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.to, self.n_rot = to, n_rot
        self.row_from = rng.permutation(self.n_from)[: self.n].astype(np.int32)
        self.row_to = np.concatenate([np.arange(5, 12), np.arange(130, 137), np.arange(260, 266)]).astype(np.int64)
        self.page = (self.row_to // PAGE).astype(np.int32)
        self.page_new = np.array([0, 2], np.int64)
        self.rows = rng.normal(size=(self.n_from, self.n_embd)).astype(np.float16)
        self.means = (0.1 * rng.normal(size=(3, self.n_embd))).astype(np.float16)
        self.tensors: dict[int, Tensor] = {}

    def place(self, connection: Connection) -> None:
        data = {
            FROM: (F16, (self.n_embd, self.n_from), self.rows),
            TO: (FORMATS[self.to].type, (self.n_embd, self.n_to), None),
            ROW_FROM: (I32, (self.n,), self.row_from),
            ROW_TO: (I64, (self.n,), self.row_to),
            PAGES: (I32, (self.n,), self.page),
            MEANS: (F16, (self.n_embd, 3), self.means),
            PAGES_NEW: (I64, (len(self.page_new),), self.page_new),
            -2: (I32, (1,), None),
            -1: (I32, (1,), None),
        }
        for which, (number, ne, values) in data.items():
            ne = (*ne, 1, 1, 1)[:4]
            tensor = Tensor(which + 100, number, ne, strides(number, ne))
            buffer, base = connection.allocate(n_bytes(tensor))
            self.tensors[which] = tensor.with_(buffer=buffer, data=base)
            connection.set(self.tensors[which], bytes(n_bytes(tensor)) if values is None else values.tobytes())
        for which, kind, src in (
            (-2, MEAN, (FROM, MEANS, ROW_FROM, PAGES_NEW, PAGES)),
            (-1, MOVE, (FROM, TO, ROW_FROM, ROW_TO, PAGES, MEANS)),
        ):
            ids = ([self.tensors[i].id for i in src] + [0] * N_SRC)[:N_SRC]
            of = params(kind=kind, scale=0.0, n_rot_k=self.n_rot)
            self.tensors[which] = self.tensors[which].with_(op=op("CUSTOM"), params=of, src=tuple(ids))

    @property
    def nodes(self) -> list[Tensor]:
        return [self.tensors[-2], self.tensors[-1]]

    @property
    def node(self) -> Tensor:
        return self.tensors[-1]

    @property
    def by_id(self) -> dict[int, Tensor]:
        return {t.id: t for t in self.tensors.values()}

    def compute(self, connection: Connection) -> tuple[np.ndarray, np.ndarray]:
        """Cold rows as numbers, and the means; raises ConnectionError when a node was refused."""
        connection.compute([t.id for t in self.nodes], list(self.tensors.values()))
        stored = np.frombuffer(connection.get(self.tensors[TO], n_bytes(self.tensors[TO])), ggml.dtype(self.to))
        rows = ggml.Tensor(self.to, (self.n_embd, self.n_to), stored.reshape(self.n_to, -1)).dequantize()
        means = connection.get(self.tensors[MEANS], n_bytes(self.tensors[MEANS]))
        return rows, np.frombuffer(means, np.float16).reshape(3, -1)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows that are moved before they are quantised, [n, n_embd], and the means."""
        rows = self.rows[self.row_from].astype(np.float64)
        if self.n_rot:
            rows = (rows.reshape(-1, self.n_rot) @ hadamard(self.n_rot)).reshape(rows.shape)
        means = self.means.astype(np.float64)
        for page in self.page_new:
            means[page] = rows[self.page == page].mean(axis=0)
        return rows - means[self.page], means
