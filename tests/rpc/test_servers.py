"""Models whose layers are on ggml-rpc servers, which are processes of their own.

A server of ours moves rows and computes attention with the kernels that this process has, so every bit is that of a
local mixed cache. A server of another build does both by ggml's operations, as this process can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import raw
from helpers.allowances import ATOL, F32
from helpers.histories import decode, operate
from helpers.rpc import Connection, Relay, RpcServer, find_upstream, free_port
from helpers.tiny_model import random_tokens, write_tiny_model

from llamamix import Context, ContextError, KVMixedParams, Model, ModelError, rpc
from llamamix.formats import FORMATS

N_LAYER, N_EMBD_KV = 4, 128  # of the model, values in a row of K or V


def mixed(cold: str, attn: str = "auto", **params: Any) -> KVMixedParams:
    return KVMixedParams(**{"hot": 48, "group": 12, "sink": 4, "cold": cold, "attn": attn} | params)


class Cluster:
    """Three servers, and models on some of them; a server has time for one process, which is this one."""

    def __init__(self, path: Path, folder: Path) -> None:
        self._stack = ExitStack()
        self.path = path
        self.local = Model(path)
        self.servers = [self._stack.enter_context(RpcServer(folder / f"log{i}")) for i in range(3)]
        # a client takes it for a server of another build
        behind = self._stack.enter_context(RpcServer(folder / "log3"))
        self.stranger = self._stack.enter_context(Relay(behind.endpoint, hide=True))
        self._models: dict[tuple[tuple[str, ...], int], Model] = {}

    def on(self, servers: Sequence[str], n_gpu_layers: int = -1) -> Model:
        key = tuple(servers), n_gpu_layers
        if key not in self._models:
            self._models[key] = Model(self.path, rpc=servers, n_gpu_layers=n_gpu_layers)
        return self._models[key]

    def over(self, n: int) -> Model:
        """A model that is split across the first n servers."""
        return self.on([server.endpoint for server in self.servers[:n]])

    def close(self) -> None:
        for model in (self.local, *self._models.values()):
            model.close()
        self._stack.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("rpc")
    cluster = Cluster(write_tiny_model(folder / "tiny.gguf", n_layer=N_LAYER), folder)
    yield cluster
    assert all(server.is_running for server in cluster.servers)
    cluster.close()


Make = Callable[..., Context]


@pytest.fixture
def make(make_context: Make) -> Make:
    def make(model: Model, **params: Any) -> Context:
        return make_context(model, **{"n_ctx": 512, "n_ubatch": 64} | params)

    return make


#
# attention
#


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("cold", ["f16", "q8_0", "q4_0"])
def test_a_split_model_gives_the_logits_of_a_local_one(cold: str, n: int, cluster: Cluster, make: Make) -> None:
    expected = decode(make(cluster.local, kv_mixed=mixed(cold)))
    context = make(cluster.over(n), kv_mixed=mixed(cold))
    np.testing.assert_array_equal(decode(context), expected)
    assert context.stats.n_migrations > 10 and context.stats.cold_used > 240 - 48


@pytest.mark.parametrize("cold", FORMATS)
def test_any_cold_type_is_as_here(cold: str, cluster: Cluster, make: Make) -> None:
    expected = decode(make(cluster.local, kv_mixed=mixed(cold, "fused")))
    np.testing.assert_array_equal(decode(make(cluster.over(2), kv_mixed=mixed(cold, "fused"))), expected)


def test_the_default_is_as_here(cluster: Cluster, make: Make) -> None:
    contexts = [make(model, kv_mixed="hot=48,group=12") for model in (cluster.local, cluster.over(2))]
    np.testing.assert_array_equal(*(decode(context) for context in contexts))
    assert contexts[0].kv_mixed == contexts[1].kv_mixed
    assert contexts[1].stats.type_cold_k == "iq4_nl"


def test_rows_of_v_are_left_unread_there_as_well(cluster: Cluster, make: Make) -> None:
    def words(model: Model, v_skip: float) -> np.ndarray:
        context = make(model, kv_mixed=mixed("q4_0", v_skip=v_skip))
        context.decode(random_tokens(400))
        context.decode([5])
        return context.logits.copy()

    expected = words(cluster.local, 0.9)
    np.testing.assert_array_equal(words(cluster.over(2), 0.9), expected)
    assert not np.array_equal(words(cluster.local, 0.0), expected)


@pytest.mark.parametrize("flash_attn", ["off", "on"])
def test_cold_rows_like_hot_ones_are_a_plain_cache(flash_attn: str, cluster: Cluster, make: Make) -> None:
    params = F32 | {"flash_attn": flash_attn}
    expected = decode(make(cluster.local, kv_mixed=False, **F32))
    actual = decode(make(cluster.over(2), kv_mixed=mixed("f32"), **params))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("flash_attn", ["off", "on"])
@pytest.mark.parametrize("arch", ["minicpm3", "lfm2", "gemma4"])
def test_other_architectures(arch: str, flash_attn: str, cluster: Cluster, make_context: Make, tmp_path: Path) -> None:
    """K and V heads of different sizes, recurrent layers, and sliding windows beside shared layers."""
    sizes = {
        "minicpm3": {"head_size": 96, "n_head_kv": 4},
        "lfm2": {"n_layer": 4, "n_embd": 256},
        "gemma4": {"n_layer": 6},
    }
    path = write_tiny_model(tmp_path / "tiny.gguf", arch=arch, **sizes[arch])
    servers = [server.endpoint for server in cluster.servers[:2]]
    params = {"n_ctx": 512, "n_ubatch": 64, "kv_mixed": mixed("q8_0"), "flash_attn": flash_attn}
    with Model(path) as here, Model(path, rpc=servers) as there:
        contexts = [make_context(model, **params) for model in (here, there)]
        rows = [decode(context) for context in contexts]
        assert contexts[1].stats.n_migrations > 10
        for context in contexts:
            context.close()
    np.testing.assert_array_equal(*rows)


def test_layers_here_and_there(cluster: Cluster, make: Make) -> None:
    """The two upper layers on a server, the others in this process."""
    model = cluster.on([cluster.servers[0].endpoint], n_gpu_layers=3)
    context = make(model, kv_mixed=mixed("q4_0", "fused"))
    np.testing.assert_array_equal(decode(context), decode(make(cluster.local, kv_mixed=mixed("q4_0", "fused"))))


@pytest.mark.parametrize("attn", ["auto", "fused", "compose"])
def test_a_cache_that_stays_here(attn: str, cluster: Cluster, make: Make) -> None:
    """offload_kqv=False: the kernel is a function of this process, and no server may be given it."""
    context = make(cluster.over(2), kv_mixed=mixed("q4_0", attn), offload_kqv=False)
    np.testing.assert_array_equal(decode(context), decode(make(cluster.local, kv_mixed=mixed("q4_0", attn))))


#
# servers of another build
#


def test_a_stranger_gets_composition(cluster: Cluster, make: Make) -> None:
    model = cluster.on([cluster.stranger.endpoint])
    expected = decode(make(cluster.local, kv_mixed=mixed("q4_0", "compose", mean=False)))
    np.testing.assert_array_equal(decode(make(model, kv_mixed=mixed("q4_0", mean=False))), expected)
    assert not np.array_equal(expected, decode(make(cluster.local, kv_mixed=mixed("q4_0", "fused", mean=False))))


def test_the_default_on_a_stranger(cluster: Cluster, make: Make) -> None:
    """What its device has is not known, and some do not have IQ4_NL: nor is that taken for it."""
    model = cluster.on([cluster.stranger.endpoint])
    context = make(model, kv_mixed="hot=48,group=12,mean=off")
    assert context.stats.type_cold_k == context.stats.type_cold_v == "q4_0"
    expected = decode(make(cluster.local, kv_mixed="hot=48,group=12,mean=off,cold=q4_0,attn=compose"))
    np.testing.assert_array_equal(decode(context), expected)
    with pytest.raises(ContextError, match="it has no SET_ROWS of f32 rows to iq4_nl: take another cold type"):
        make(model, kv_mixed=mixed("iq4_nl"))


def test_a_stranger_beside_one_of_ours(cluster: Cluster, make: Make) -> None:
    """Each layer as its server can: the kernel for the lower ones, composition for the others."""
    model = cluster.on([cluster.servers[0].endpoint, cluster.stranger.endpoint])
    expected = decode(make(cluster.local, kv_mixed=False, **F32))
    np.testing.assert_allclose(decode(make(model, kv_mixed=mixed("f32"), **F32)), expected, rtol=0, atol=ATOL)
    place = "the cache is not in the CPU's memory, and RPC[0-9]+"
    reason = f"attn=fused is not possible for layer [23]: {place}: its server is not one of this build"
    with pytest.raises(ContextError, match=reason):
        make(model, kv_mixed=mixed("f32", "fused"))


@pytest.mark.parametrize("attn", ["auto", "compose"])
def test_upstreams_server(attn: str, cluster: Cluster, make: Make, tmp_path: Path) -> None:
    with RpcServer(tmp_path / "log", find_upstream()) as server, Model(cluster.path, rpc=server.endpoint) as model:
        expected = decode(make(cluster.local, kv_mixed=mixed("q4_0", "compose", mean=False)))
        context = make(model, kv_mixed=mixed("q4_0", attn, mean=False))
        np.testing.assert_array_equal(decode(context), expected)
        with pytest.raises(ContextError, match="its server is not one of this build, or of another version"):
            make(model, kv_mixed=mixed("q4_0", "fused", mean=False))
        context.close()


#
# what caches do
#


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("cold", ["f16", "q8_0", "iq4_nl"])
def test_operations_on_sequences(cold: str, unified: bool, cluster: Cluster, make: Make) -> None:
    params = {"n_ctx": 512 if unified else 3 * 256, "n_seq_max": 3, "kv_unified": unified, "kv_mixed": mixed(cold)}
    context, other = make(cluster.over(2), **params), make(cluster.local, **params)
    np.testing.assert_array_equal(operate(context, unified), operate(other, unified))
    for name in ("n_migrations", "n_tokens_moved", "hot_used", "cold_used"):
        assert getattr(context.stats, name) == getattr(other.stats, name)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "sequence"])
@pytest.mark.parametrize("cold", ["f16", "q4_0"])
def test_a_state_goes_from_servers_to_here_and_back(cold: str, whole: bool, cluster: Cluster, make: Make) -> None:
    params = {"n_seq_max": 2, "kv_unified": True, "kv_mixed": mixed(cold)}
    seq_id = None if whole else 1
    there, here = make(cluster.over(3), **params), make(cluster.local, **params)
    for context in (there, here):
        context.decode(random_tokens(100), seq_id=0)
        context.decode(random_tokens(80, 1), seq_id=1)
        context.memory.seq_rm(1, 20, 40)
    assert there.stats.cold_used > 100
    state = there.state_save(seq_id)
    assert state == here.state_save(seq_id)
    back = make(cluster.over(2), **params)
    for context in (here, back):
        context.memory.clear()
        context.state_load(state, seq_id)
        assert context.state_save(seq_id) == state
        context.decode(random_tokens(40, 3), seq_id=1, logits="all")
    np.testing.assert_array_equal(here.logits, back.logits)


@pytest.mark.parametrize(("cold", "row"), [("f16", 2 * N_EMBD_KV), ("q8_0", N_EMBD_KV // 32 * 34)])
def test_bytes_are_where_the_layers_are(cold: str, row: int, cluster: Cluster, make: Make) -> None:
    model = cluster.over(2)
    context = make(model, kv_mixed=mixed(cold, mean=True))
    stats = context.stats
    assert stats.bytes_hot == 48 * N_LAYER * 2 * 2 * N_EMBD_KV
    means = 0 if cold == "f16" else -(-stats.cold_size // 128) * 2 * N_EMBD_KV  # of a layer
    assert stats.bytes_cold == N_LAYER * (stats.cold_size * 2 * row + means)
    with context._handle as ctx:
        found = raw.context_by_buffer(ctx)
    if found is None:
        pytest.skip("this libllama's std::map is another one")
    found = {name: n for name, n in found.items() if name.startswith("RPC")}  # outputs are in this process
    names = [f"RPC0[{server.endpoint}]" for server in cluster.servers[:2]]
    assert sorted(found) == sorted(names)
    assert sum(found.values()) == stats.bytes_hot + stats.bytes_cold
    # two layers and the output on each, or two and a half: whole layers in any case
    layer = (stats.bytes_hot + stats.bytes_cold) // N_LAYER
    assert [found[name] % layer for name in names] == [0, 0]
    assert all(found[name] >= layer for name in names)


#
# servers that are gone
#


def test_a_server_that_dies(cluster: Cluster, make: Make, tmp_path: Path) -> None:
    expected = decode(make(cluster.local, kv_mixed=mixed("q4_0")))
    local = make(cluster.local, kv_mixed=mixed("q4_0"))
    port = free_port()
    with RpcServer(tmp_path / "log", port=port) as server:
        model = Model(cluster.path, rpc=[cluster.servers[0].endpoint, server.endpoint])
        context = make(model, kv_mixed=mixed("q4_0"))
        context.decode(random_tokens(240)[:200], logits="all")
        np.testing.assert_array_equal(context.logits, expected[:200])
    reason = f"The RPC server at 127.0.0.1:{port} is gone, and with it the layers that it had: start it again"

    def draw() -> None:
        context.decode(random_tokens(1))
        _ = context.logits

    for act in (draw, draw, context.state_save, lambda: make(model, kv_mixed=mixed("q4_0"))):
        with pytest.raises(ContextError, match=reason):
            act()
    # what has nothing to do with it goes on
    np.testing.assert_array_equal(decode(local), expected)
    with pytest.raises(ModelError, match=f"There is no RPC server at 127.0.0.1:{port}: Connection refused"):
        Model(cluster.path, rpc=server.endpoint)

    # started again: for the model that has lost its layers that is too late, for another one it is not
    with RpcServer(tmp_path / "log", port=port) as server:
        with pytest.raises(ContextError, match=reason):
            make(model, kv_mixed=mixed("q4_0"))
        another = Model(cluster.path, rpc=[cluster.servers[0].endpoint, server.endpoint])
        np.testing.assert_array_equal(decode(make(another, kv_mixed=mixed("q4_0"))), expected)
        context.close()
        model.close()
        np.testing.assert_array_equal(decode(make(another, kv_mixed=mixed("q4_0"))), expected)
        another.close()


def test_a_server_that_another_client_has(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "_TIMEOUT", 0.5)
    with RpcServer(tmp_path / "log") as server:
        with (
            Connection(server.endpoint),
            pytest.raises(ModelError, match=f"{server.endpoint} does not answer: it may have another client"),
        ):
            Model(cluster.path, rpc=server.endpoint)
        monkeypatch.undo()
        Model(cluster.path, rpc=server.endpoint).close()


#
# a real model
#


def test_smollm2_on_two_servers(smollm2_path: Path, make_context: Make, cluster: Cluster, tmp_path: Path) -> None:
    """Weights are not repacked for either, so that their products are the same."""
    tokens = random_tokens(300)
    rows = []
    with (
        RpcServer(tmp_path / "a", n_threads=2) as a,
        RpcServer(tmp_path / "b", n_threads=2) as b,
        Model(smollm2_path, use_extra_bufts=False) as here,
        Model(smollm2_path, rpc=f"{a.endpoint},{b.endpoint}", use_extra_bufts=False) as there,
    ):
        for model in (here, there):
            context = make_context(model, n_ctx=512, n_threads=2, kv_mixed="hot=48,group=12")
            context.decode(tokens)
            for token in tokens[:10]:
                context.decode([token])
            rows.append(context.logits)
            assert context.stats.cold_used > 250
            context.close()
    np.testing.assert_array_equal(rows[0], rows[1])
