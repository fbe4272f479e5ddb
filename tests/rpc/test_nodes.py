"""Nodes that a client sends to a server of ours: computed, or refused without a look at the client's functions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import library_dir
from helpers.rpc import MARK, Connection, RpcServer, find_upstream
from helpers.rpc_nodes import (
    F16,
    F32,
    FROM,
    I32,
    I64,
    JOIN,
    K_COLD,
    K_HOT,
    K_MEAN,
    MASK,
    MEANS,
    MOVE,
    PAGES,
    ROW_FROM,
    ROW_TO,
    SINKS,
    TO,
    V_COLD,
    V_HOT,
    Move,
    Node,
    Q,
    op,
    params,
    strides,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RpcServer]:
    with RpcServer(tmp_path_factory.mktemp("rpc") / "log", library_dir(), n_threads=2) as server:
        yield server
        assert server.is_running, server.text()


@pytest.fixture
def connection(server: RpcServer) -> Iterator[Connection]:
    with Connection(server.endpoint) as connection:
        yield connection


NODES = {
    "hot": Node(cold=None),
    "f16": Node(),
    "f32": Node(cold="f32", hot="f32", mask_f16=False),
    "q8_0": Node(cold="q8_0"),
    "q4_0": Node(cold="q4_0"),
    "prompt": Node(cold="q8_0", n_tokens=50),
    "streams": Node(cold="q8_0", n_tokens=3, n_stream=2),
    "means": Node(cold="q8_0", mean=True),
    "sinks": Node(sinks=True),
    "many cells": Node(cold="q8_0", n_cold=3000),  # several tasks, and a merge
}


@pytest.mark.parametrize("name", NODES)
def test_a_node_is_computed(name: str, connection: Connection) -> None:
    """Again and again, as the graph of a token is."""
    node = NODES[name]
    node.place(connection)
    assert connection.mark == MARK
    assert connection.reason(node.node, node.by_id) == ""
    expected = node.expected()
    # Rows are what their types hold, so only sums and rounding differ: sums of values of unit size in F32, where
    # weights meet V in F16 (2**-11 of a weight), and queries as int8 beside K of 4 bits, which are off by half a step
    # of 127 to 2.5 times their size: scores by sqrt(64) * 0.125 * 2.5/127/sqrt(12) = 0.006, results, which are below
    # 0.5, by as much of that, and the largest of 256 by three times as much.
    atol = 0.02 if node.cold == "q4_0" else 0.005
    for _ in range(2):
        np.testing.assert_allclose(node.compute(connection), expected, rtol=0, atol=atol)
    # without a new graph, from other queries
    connection.set(node.tensors[Q], bytes(len(node.data[Q])))
    connection.recompute()
    changed = node.result(connection)
    assert np.abs(changed - expected).max() > 5 * atol


def test_several_nodes_share_their_memory(connection: Connection) -> None:
    nodes = [Node(n_cold=n, cold="q8_0", n_tokens=t, seed=n) for n, t in ((3000, 1), (100, 1), (500, 40))]
    tensors = []
    for i, node in enumerate(nodes):
        node.place(connection)
        rename = {t.id: t.id + 1000 * i for t in node.tensors.values()} | {0: 0}
        for which, t in node.tensors.items():
            node.tensors[which] = t.with_(id=rename[t.id], src=tuple(rename[s] for s in t.src))
        tensors += node.tensors.values()
    connection.compute([node.node.id for node in nodes], tensors)
    for node in nodes:
        np.testing.assert_allclose(node.result(connection), node.expected(), rtol=0, atol=0.005)


@pytest.mark.parametrize("to", ["f16", "q8_0", "q4_0", "iq4_nl"])
@pytest.mark.parametrize("n_rot", [0, 64])
def test_rows_are_moved(n_rot: int, to: str, connection: Connection) -> None:
    """As the kernels of this process move them: rotated, less their page's mean, which the node before has made."""
    move = Move(to=to, n_rot=n_rot)
    move.place(connection)
    for node in move.nodes:
        assert connection.reason(node, move.by_id) == ""
    rows, means = move.compute(connection)
    expected_rows, expected_means = move.expected()
    # sums of ten values of unit size in F32, in F16: half a step of 2**-11
    np.testing.assert_allclose(means, expected_means, rtol=2**-10, atol=1e-4)
    # a step of each type for values up to 4, and twice that where a code falls to the other side
    step = {"f16": 2**-10 * 4, "q8_0": 4 / 127, "q4_0": 4 / 8, "iq4_nl": 4 / 127 * 24}[to]
    np.testing.assert_allclose(rows[move.row_to], expected_rows, rtol=0, atol=2 * step)
    others = np.setdiff1d(np.arange(move.n_to), move.row_to)
    np.testing.assert_array_equal(rows[others], 0)


@pytest.mark.parametrize(
    ("which", "i", "value"),
    [
        ("row_from", 3, -1), ("row_from", 3, 1000), ("row_to", 3, -1), ("row_to", 3, 2**40), ("page", 3, -1),
        ("page", 3, 2**30), ("page_new", 0, -1), ("page_new", 1, 2**60),
    ],
)  # fmt: skip
def test_rows_that_there_are_not_are_left_out(which: str, i: int, value: int, connection: Connection) -> None:
    move = Move(to="q8_0", n_rot=64)
    getattr(move, which)[i] = value
    move.place(connection)
    rows, means = move.compute(connection)
    assert np.isfinite(rows).all() and np.isfinite(means).all()
    moved = [r for j, r in enumerate(move.row_to) if j != 3 or which == "page_new"]
    assert (np.abs(rows[moved]).max(axis=1) > 0.5).all()
    if which != "page_new":
        others = np.setdiff1d(np.arange(move.n_to), moved)
        np.testing.assert_array_equal(rows[others], 0)


@pytest.mark.parametrize(
    ("which", "changes"),
    [
        (FROM, {"type": I32}),
        (FROM, {"nb": (2, 128, 2560, 2560)}),
        (TO, {"ne": (64, 300, 1, 1)}),
        (ROW_FROM, {"ne": (19, 1, 1, 1)}),
        (ROW_TO, {"type": I32}),
        (ROW_TO, {"ne": (1, 20, 1, 1), "nb": (8, 8, 160, 160)}),
        (PAGES, {"ne": (19, 1, 1, 1)}),
        (MEANS, {"type": F32, "ne": (128, 1, 1, 1), "nb": (4, 512, 512, 512)}),
    ],
)
def test_moves_that_do_not_fit_are_refused(
    which: int, changes: dict[str, object], connection: Connection, server: RpcServer
) -> None:
    move = Move(to="q8_0", n_rot=64)
    move.place(connection)
    move.tensors[which] = move.tensors[which].with_(**changes)
    with pytest.raises(ConnectionError):
        move.compute(connection)
    assert server.is_running


#
# refusals
#

# by name: what is changed of the node, and what the log says
ROWS = "do not fit together"
CUSTOM = {
    "a stranger's": ({"magic": 0}, "does not know this operation"),
    "of another version": ({"version": 2}, "does not know this operation"),
    "of no kind": ({"kind": 7}, "has no need of this operation"),
    "a join": ({"kind": JOIN}, "has no need of this operation"),
    "a move of no rows": ({"kind": MOVE}, ROWS),
    "a host's": ({"is_host": 1}, "for the process that made it"),
    "rotated in blocks of 24": ({"n_rot_k": 24}, ROWS),
    "rotated in blocks that do not divide a head": ({"n_rot_v": 128}, ROWS),
    "rotated in blocks below 0": ({"n_rot_v": -64}, ROWS),
    "with all of V unread": ({"v_skip": 1.0}, ROWS),
    "with no number of V unread": ({"v_skip": float("nan")}, ROWS),
}


def assert_refused(node: Node, connection: Connection, server: RpcServer, reason: str) -> None:
    before = len(server.text())
    with pytest.raises(ConnectionError):
        node.compute(connection)
    assert server.is_running, server.text()
    with Connection(server.endpoint) as other:  # and has time for the next client
        np.testing.assert_allclose(compute_a_good_one(other), Node().expected(), rtol=0, atol=0.005)
    assert reason in server.text()[before:]


def compute_a_good_one(connection: Connection) -> np.ndarray:
    node = Node()
    node.place(connection)
    return node.compute(connection)


@pytest.mark.parametrize("name", CUSTOM)
def test_what_is_not_ours_is_refused(name: str, connection: Connection, server: RpcServer) -> None:
    """Each has the address of a function at which nothing is: a call would end the server."""
    options, reason = CUSTOM[name]
    node = Node(options=options)
    node.place(connection)
    assert reason in connection.reason(node.node, node.by_id)
    assert_refused(node, connection, server, reason)


@pytest.mark.parametrize("name", ["MAP_CUSTOM1", "MAP_CUSTOM2", "MAP_CUSTOM3"])
def test_functions_of_another_process_are_refused(name: str, connection: Connection, server: RpcServer) -> None:
    node = Node()
    node.place(connection)
    node.tensors[-1] = node.node.with_(op=op(name))
    assert_refused(node, connection, server, "a function of another process")


def test_an_operation_that_there_is_not(connection: Connection, server: RpcServer) -> None:
    node = Node()
    node.place(connection)
    node.tensors[-1] = node.node.with_(op=1000)
    assert_refused(node, connection, server, "no such type or operation")


# which source: what is changed of it
TENSORS = {
    "q of F16": (Q, {"type": F16}),
    "q in another order": (Q, {"nb": (16, 4, 1024, 1024)}),
    "q of no heads": (Q, {"ne": (64, 0, 1, 1)}),
    "q of heads that are no multiple": (Q, {"ne": (64, 3, 1, 1)}),
    "q of other heads": (Q, {"ne": (32, 4, 1, 1)}),
    "K of no streams": (K_HOT, {"ne": (64, 2, 40, 0)}),
    "K of no heads": (K_HOT, {"ne": (64, 0, 40, 1)}),
    "K of no values": (K_HOT, {"ne": (0, 2, 40, 1)}),
    "K of fewer cells than V": (K_HOT, {"ne": (64, 2, 39, 1)}),
    "K of I32": (K_COLD, {"type": I32, "nb": (4, 256, 512, 51200), "ne": (64, 2, 100, 1)}),
    "K whose rows overlap": (K_COLD, {"nb": (2, 64, 256, 51200)}),
    "V of larger heads": (V_HOT, {"ne": (128, 2, 20, 1)}),
    "V of fewer heads": (V_COLD, {"ne": (64, 1, 200, 1)}),
    "a mask of fewer cells": (MASK, {"ne": (239, 1, 1, 1)}),
    "a mask of no tokens": (MASK, {"ne": (240, 0, 1, 1)}),
    "a mask of I32": (MASK, {"type": I32, "ne": (60, 1, 1, 1), "nb": (4, 240, 240, 240)}),
    "means of other heads": (K_MEAN, {"ne": (64, 2, 1, 1)}),
    "means of too few pages": (K_MEAN, {"ne": (128, 1, 1, 1)}),
    "sinks of fewer heads": (SINKS, {"ne": (2, 1, 1, 1)}),
    "a result of another shape": (-1, {"ne": (128, 2, 1, 1), "nb": (4, 512, 1024, 1024)}),
    "a result with gaps": (-1, {"nb": (4, 0, 1024, 1024), "ne": (256, 2, 1, 1)}),
}


@pytest.mark.parametrize("name", TENSORS)
def test_sizes_that_do_not_fit_are_refused(name: str, connection: Connection, server: RpcServer) -> None:
    which, changes = TENSORS[name]
    node = Node(mean=True, sinks=True)
    node.place(connection)
    node.tensors[which] = node.tensors[which].with_(**changes)
    assert_refused(node, connection, server, "the client's graph is refused")


BEYOND = "goes beyond its buffer"


@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_nothing_at_all_is_refused(dimension: int, connection: Connection, server: RpcServer) -> None:
    """No values, KV heads, cells or streams, in all tensors: what divides by them is not reached."""
    node = Node(cold="f16")
    node.place(connection)
    for which in (K_HOT, V_HOT, K_COLD, V_COLD):
        ne = list(node.tensors[which].ne)
        ne[dimension] = 0
        node.tensors[which] = node.tensors[which].with_(ne=tuple(ne))
    mask = {2: (0, 1, 1, 1), 3: (240, 1, 1, 0)}.get(dimension, node.tensors[MASK].ne)
    node.tensors[MASK] = node.tensors[MASK].with_(ne=mask)
    assert_refused(node, connection, server, "do not fit together")


# of a good tensor
LEAVE = {
    "one more": lambda t: {"ne": (*t.ne[:3], t.ne[3] + 1)},
    "a larger stride": lambda t: {"nb": (*t.nb[:3], t.nb[3] + 32), "ne": (*t.ne[:3], 2)},
    "a later start": lambda t: {"data": t.data + t.nb[0]},
    "an earlier start": lambda t: {"data": t.data - 64},
    "beyond 64 bits": lambda t: {"ne": (2**32 - 32, 2**32 - 1, 2**32 - 1, 2**32 - 1)},
}


@pytest.mark.parametrize("name", LEAVE)
@pytest.mark.parametrize("which", [Q, K_HOT, V_COLD, MASK, K_MEAN, -1])
def test_tensors_that_leave_their_buffers_are_refused(
    which: int, name: str, connection: Connection, server: RpcServer
) -> None:
    node = Node(mean=True, sinks=True, cold="q8_0")
    node.place(connection)
    node.tensors[which] = node.tensors[which].with_(**LEAVE[name](node.tensors[which]))
    assert_refused(node, connection, server, "goes beyond its buffer")


def test_a_tensor_without_memory_is_refused(connection: Connection, server: RpcServer) -> None:
    node = Node()
    node.place(connection)
    node.tensors[K_COLD] = node.tensors[K_COLD].with_(buffer=0, data=0)
    assert_refused(node, connection, server, "a tensor has no memory")


def test_more_scratch_memory_than_a_node_needs_is_refused(tmp_path: Path) -> None:
    """A hundred thousand KV heads of 32 values: 6 MB of rows, and 20 MB of scratch memory for each thread."""
    n = 100_000
    node = Node(n_embd=32, n_head=n, n_head_kv=n, n_cold=1, n_hot=1)
    with RpcServer(tmp_path / "log", library_dir(), n_threads=64) as server, Connection(server.endpoint) as connection:
        node.place(connection)
        assert_refused(node, connection, server, "there is not enough memory")


def test_a_tensor_that_is_not_aligned_is_refused(connection: Connection, server: RpcServer) -> None:
    node = Node()
    node.place(connection)
    q = node.tensors[Q]
    buffer, base = connection.allocate(2048)
    node.tensors[Q] = q.with_(buffer=buffer, data=base + 2)
    assert_refused(node, connection, server, "is not in this process's memory")


def test_a_graph_of_operations_alone(connection: Connection) -> None:
    """What is not ours to judge is computed as ever."""
    tensors = []
    for i, name in enumerate(("NONE", "NONE", "ADD")):
        buffer, base = connection.allocate(64)
        src = (1, 2, *[0] * 8) if name == "ADD" else (0,) * 10
        node = Node().tensors[Q].with_(id=i + 1, ne=(16, 1, 1, 1), nb=strides(F32, (16, 1, 1, 1)), src=src, op=op(name))
        tensors.append(node.with_(buffer=buffer, data=base, params=(0,) * 16))
    a, b = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    connection.set(tensors[0], a.tobytes())
    connection.set(tensors[1], b.tobytes())
    connection.compute([3], tensors)
    np.testing.assert_array_equal(np.frombuffer(connection.get(tensors[2], 64), np.float32), a + b)


def test_another_build_says_that_it_is_one(tmp_path: Path) -> None:
    with RpcServer(tmp_path / "log", find_upstream()) as other, Connection(other.endpoint) as connection:
        assert connection.mark == 0


@pytest.mark.parametrize("name", ["CPY", "SET_ROWS"])
def test_what_the_device_has_can_be_asked(name: str, connection: Connection) -> None:
    """Of copies of rows; a node that is not whole is one that it has not."""
    a, b, c = (Node().tensors[K_HOT].with_(id=i) for i in (1, 2, 3))
    node = a.with_(id=9, op=op(name), src=(1, 2, 3, *[0] * 7), params=(0,) * 16)
    assert connection.reason(node, {1: a, 2: b, 3: c}) == ""
    if name == "CPY":  # ggml's CPU backend has none to IQ2_XXS, 66 bytes for 256 values
        other = node.with_(type=16, ne=(256, 1, 1, 1), nb=(66, 66, 66, 66))
        assert connection.reason(other, {1: a, 2: b, 3: c}) == "its device does not have this operation"
    indices = b.with_(type=I64, nb=(8, 512, 1024, 40960))
    assert connection.reason(node, {1: a.with_(type=F32, nb=(4, 256, 512, 20480)), 2: indices, 3: c}) == ""
    for i in range(3 if name == "SET_ROWS" else 2):
        src = [1, 2, 3, *[0] * 7]
        src[i] = 0
        partial = node.with_(src=tuple(src))
        assert connection.reason(partial, {1: a, 2: b, 3: c}) == "its device does not have this operation"


def test_params_are_the_nodes(connection: Connection) -> None:
    """What these tests write is what the library writes: without a magic number no node is ours."""
    node = Node()
    assert connection.reason(node.node, node.by_id) == ""
    assert connection.reason(node.node.with_(params=params(magic=1)), node.by_id) != ""
