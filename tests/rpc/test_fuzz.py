"""Nodes of ours that were damaged at random, sent to a server of ours: computed or refused, and the server lives.

Every tensor has a buffer of its own size, so that a sanitizer sees what is read outside of it. docs/testing.md has the
command for 100,000 of them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from helpers.processes import library_dir
from helpers.rpc import N_SRC, Connection, RpcServer, Tensor
from helpers.rpc_nodes import (
    K_COLD,
    K_HOT,
    K_MEAN,
    MASK,
    PAGE,
    PAGES,
    PAGES_NEW,
    ROW_FROM,
    ROW_TO,
    SINKS,
    V_COLD,
    V_HOT,
    Move,
    Node,
    Q,
    op,
    strides,
)

N_NODES = 100_000 if os.environ.get("LLAMAMIX_TEST_PROFILE") == "long" else 1000

SEEDS = [
    Node(),
    Node(cold=None),
    Node(cold="q4_0", mean=True, sinks=True),
    Node(cold="q8_0", n_tokens=3, n_stream=2, mean=True, options={"n_rot_k": 64, "n_rot_v": 64}),
    Node(cold="iq4_nl", n_tokens=20, options={"max_bias": 8.0}),
    Node(cold="q5_1", n_cold=700, n_embd=128, options={"softcap": 20.0}),
    Node(cold="q4_0", n_cold=700, options={"v_skip": 0.3}),
    Node(cold="f32", hot="f32", mask_f16=False, n_embd=40, n_head=3, n_head_kv=3),
    Node(cold="bf16", n_embd=96, n_head=8, n_head_kv=1, n_hot=129),
    Move("q4_0", 64),
    Move("iq4_nl", 0),
]

# sizes at which something begins or ends
SIZES = [0, 1, 2, 3, 16, 31, 32, 33, 64, 127, 128, 129, 1024, 1025, 2**16, 2**31 - 1, 2**31, 2**32 - 32, 2**32 - 1]
TYPES = [*range(42), 1000, 2**32 - 1]
OPS = ["CUSTOM", "CUSTOM", "CUSTOM", "MAP_CUSTOM1", "MAP_CUSTOM2", "MAP_CUSTOM3"]


def pick(rng: np.random.Generator, values: list[int]) -> int:
    return values[rng.integers(len(values))]


def other_size(rng: np.random.Generator, n: int) -> int:
    near = [n - 1, n + 1, 2 * n, n // 2, n + 32, n - 32]
    return pick(rng, near if rng.random() < 0.5 else SIZES) % 2**32


def other_param(rng: np.random.Generator, value: int) -> int:
    choice = rng.integers(4)
    if choice == 0:
        return value ^ (1 << int(rng.integers(31)))
    if choice == 1:
        return int(rng.integers(-(2**31), 2**31))
    return pick(rng, [0, 1, -1, 16, 24, 32, 64, 128, 1024, 2048, -(2**31), 2**31 - 1, 0x7F800000, 0x7FC00000])


def reshape(rng: np.random.Generator, node: Node) -> dict[int, Tensor]:
    """The node with other sizes, which fit together, over the same memory: it may be too small for them."""

    def other(n: int) -> int:
        if rng.random() < 0.05:
            return n + int(rng.integers(1, 3))
        return max(1, pick(rng, [n, n, n, n - 1, n // 2, int(rng.integers(1, n + 1))]))

    n_embd = pick(rng, [node.n_embd, node.n_embd, 32, other(node.n_embd)])
    n_head_kv, n_stream, n_tokens = (other(n) for n in (node.n_head_kv, node.n_stream, node.n_tokens))
    n_head = n_head_kv * other(node.n_head // node.n_head_kv)
    n_cold, n_hot = other(node.n_cold) if K_COLD in node.tensors else 0, other(node.n_hot)
    sizes = {
        Q: (n_embd, n_head, n_tokens * n_stream, 1),
        K_HOT: (n_embd, n_head_kv, n_hot, n_stream),
        V_HOT: (n_embd, n_head_kv, n_hot, n_stream),
        K_COLD: (n_embd, n_head_kv, n_cold, n_stream),
        V_COLD: (n_embd, n_head_kv, n_cold, n_stream),
        MASK: (n_cold + n_hot, n_tokens, 1, n_stream),
        K_MEAN: (n_embd * n_head_kv, -(-n_cold // PAGE), n_stream, 1),
        SINKS: (n_head, 1, 1, 1),
        -1: (n_embd * n_head, n_tokens * n_stream, 1, 1),
    }
    tensors = {}
    for which, t in node.tensors.items():
        tensors[which] = t.with_(ne=sizes[which])
        if which == -1 or rng.random() < 0.5:
            tensors[which] = tensors[which].with_(nb=strides(t.type, sizes[which]))
    return tensors


def damage(rng: np.random.Generator, node: Node | Move) -> dict[int, Tensor]:
    """A few fields changed, or other sizes that fit together and perhaps a field."""
    fits = rng.random() < 0.5
    tensors = reshape(rng, node) if fits and isinstance(node, Node) else dict(node.tensors)
    for _ in range(rng.integers(0, 2) if fits else rng.integers(1, 4)):
        which = pick(rng, list(tensors))
        t = tensors[which]
        what = pick(rng, list(range(9)))
        i = int(rng.integers(4))
        if what < 3:
            t = t.with_(ne=(*t.ne[:i], other_size(rng, t.ne[i]), *t.ne[i + 1 :]))
        elif what < 5:
            t = t.with_(nb=(*t.nb[:i], other_size(rng, t.nb[i]), *t.nb[i + 1 :]))
        elif what == 5:
            t = t.with_(type=pick(rng, TYPES))
        elif what == 6:
            t = t.with_(data=(t.data + pick(rng, [1, 2, 4, -4, 64, 2**20, -(2**40), 2**63])) % 2**64)
        elif which < 0 and what == 7:
            i = int(rng.integers(14))
            params = list(t.params)
            params[i] = other_param(rng, params[i])
            t = t.with_(params=tuple(params))
        elif which < 0:
            src = list(t.src)
            src[int(rng.integers(N_SRC))] = pick(rng, [0, *[each.id for each in tensors.values() if each.id != t.id]])
            t = t.with_(src=tuple(src), op=op(OPS[rng.integers(len(OPS))]))
        else:
            t = t.with_(buffer=pick(rng, [0, 1, *[each.buffer for each in tensors.values()]]))
        tensors[which] = t
    return tensors


def damage_lists(rng: np.random.Generator, move: Move, connection: Connection) -> None:
    """Rows and pages that there may not be."""
    for which, rows, n_there in (
        (ROW_FROM, move.row_from, move.n_from),
        (ROW_TO, move.row_to, move.n_to),
        (PAGES, move.page, 3),
        (PAGES_NEW, move.page_new, 3),
    ):
        info = np.iinfo(rows.dtype)
        some = [-1, 0, n_there - 1, n_there, info.min, info.max, int(rng.integers(info.min, info.max))]
        values = rng.integers(0, n_there, len(rows)).astype(rows.dtype)
        values[rng.integers(len(rows))] = pick(rng, some)
        connection.set(move.tensors[which], values.tobytes())


def test_damaged_nodes(tmp_path: Path) -> None:
    counts = {"computed": 0, "refused": 0}
    with RpcServer(tmp_path / "log", library_dir(), n_threads=2) as server:
        connection = None
        for number in range(N_NODES):
            rng = np.random.default_rng([N_NODES, number])
            seed = SEEDS[number // 50 % len(SEEDS)]
            if connection is None or number % 50 == 0:
                if connection is not None:
                    connection.close()
                connection = Connection(server.endpoint)
                seed.place(connection)
            tensors = damage(rng, seed)
            try:
                if isinstance(seed, Move):
                    damage_lists(rng, seed, connection)
                connection.compute([t.id for i, t in tensors.items() if i < 0], list(tensors.values()))
                connection.get(seed.node, 4)
                counts["computed"] += 1
            except ConnectionError:
                connection.close()
                connection = None
                counts["refused"] += 1
                assert server.is_running, f"node {number} has ended the server: {tensors}\n{server.text()[-3000:]}"
        if connection is not None:
            connection.close()
        with Connection(server.endpoint) as connection:
            node = Node()
            node.place(connection)
            np.testing.assert_allclose(node.compute(connection), node.expected(), rtol=0, atol=0.005)
        assert server.is_running
        assert "Sanitizer" not in server.text() and "runtime error" not in server.text()
    print(counts)
    assert min(counts.values()) > 0.1 * N_NODES  # both happen, and often
