"""A mixed cache on a device with memory of its own (own_memory.cpp), which computes as the CPU does.

Attention is composed of ggml's operations there, and migrations are made of them. The CPU composes the same operations,
so every bit must be the same. Nothing is computed there before somebody waits for it. An address on the device that is
taken for one in the host's memory ends these tests, a custom operation that the device is given makes decode() fail, and
operations that the device does not have are refused when the context is made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import raw
from helpers.allowances import ATOL, F32, rms
from helpers.histories import decode
from helpers.own_memory import Device, assert_moved, mixed
from helpers.rows import GRIDS
from helpers.tiny_model import random_tokens

from llamamix import Context, ContextError, KVMixedParams, Model
from llamamix.formats import FORMATS

Make = Callable[..., Context]

# cold types whose rows are stored by the device's operations as by the CPU's kernels, which search a scale for the
# others
SAME_ROWS = [name for name in FORMATS if name not in GRIDS]


#
# attention
#


@pytest.mark.parametrize(
    ("kv_type", "flash_attn"), [("f32", "off"), ("f16", "off"), ("f16", "on"), ("bf16", "off"), ("bf16", "on")]
)
def test_cold_rows_like_hot_ones_are_a_plain_cache(kv_type: str, flash_attn: str, make: Make) -> None:
    """The same operations over the same rows in another order: as in test_identity.py."""
    params = {"type_k": kv_type, "type_v": kv_type, "flash_attn": flash_attn, "kv_mixed": False}
    expected = decode(make(**params))

    # what another order of the cells does to a plain cache on the same device
    context = make(**params | {"n_seq_max": 2, "kv_unified": True})
    tokens = random_tokens(240)
    rows = []
    for start in range(0, 240, 40):
        part = np.repeat(tokens[start : start + 40], 2)
        context.decode_batch(part, [0, 1] * 40, logits=[1, 0] * 40)
        rows.append(context.logits)
        context.memory.seq_rm(1)
    noise = np.concatenate(rows) - expected

    context = make(**params | {"kv_mixed": mixed(kv_type)})
    difference = decode(context) - expected
    assert_moved(context)
    # both are 96,000 differences of the same kind
    assert rms(difference) <= 2.5 * rms(noise)
    assert np.abs(difference).max() <= 6 * np.abs(noise).max()
    # a row that is lost or stale is far above them
    assert rms(noise) < 0.02 * rms(expected)


@pytest.mark.parametrize("flash_attn", ["off", "on"])
@pytest.mark.parametrize("cold", SAME_ROWS)
def test_any_cold_type_is_composed_as_on_the_cpu(cold: str, flash_attn: str, device: Device, make: Make) -> None:
    context = make(kv_mixed=mixed(cold), flash_attn=flash_attn)
    actual = decode(context)
    assert_moved(context)
    expected = decode(make(device.on_cpu, kv_mixed=mixed(cold, "compose"), flash_attn=flash_attn))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("flash_attn", ["off", "on"])
@pytest.mark.parametrize("cold", GRIDS)
def test_rows_with_ggmls_scale_are_composed_as_on_the_cpu(
    cold: str, flash_attn: str, device: Device, make: Make
) -> None:
    context = make(kv_mixed=mixed(cold), flash_attn=flash_attn)
    decode(context)
    context.decode(random_tokens(4))  # the last migration for now
    other = make(device.on_cpu, kv_mixed=mixed(cold, "compose"), flash_attn=flash_attn)
    other.state_load(context.state_save())
    n_migrations = context.stats.n_migrations
    for c in (context, other):
        c.decode(random_tokens(4, 1), logits="all")
    np.testing.assert_array_equal(context.logits, other.logits)
    assert context.stats.n_migrations == n_migrations and other.stats.n_migrations == 0  # moved rows would differ


def test_the_kernel_is_refused(make: Make) -> None:
    reason = "attn=fused is not possible for layer 0: the cache is not in the CPU's memory"
    with pytest.raises(ContextError, match=reason):
        make(kv_mixed=mixed("q4_0", "fused"))


#
# kernels for GPUs, which the device emulates: from the graph to the numbers, without a GPU
#

GPU_COLD = ["q4_0", "iq4_nl", "q8_0", "q5_0"]  # what it has kernels for that store rows

# (which takes a sanitizer very long: it looks at the whole stack whenever a thread of the GPU takes turns with another)


@pytest.mark.emulated
@pytest.mark.parametrize("flash_attn", ["off", "on"])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("cold", GPU_COLD)
def test_kernels_for_gpus(cold: str, mean: bool, flash_attn: str, device: Device, make: Make) -> None:
    """Prompts, single tokens and migrations are what the CPU makes of them.

    The difference is given as a share of what the rounding of cold rows does to the logits. Rows, queries and weights
    are rounded to F16, by 2^-12 of their size on the average; rows of q4_0 are off by 2^-4 of it, of q8_0 by 2^-8: a
    hundredth and a tenth. Where scales are searched, two of them may do equally well, and sums in another order decide
    for the other one. That is seen in up to 0.6 % of the blocks, whose errors are then independent of each other:
    sqrt(2 * 0.006) = 0.11.
    """
    device.emulate_cuda(True)
    context = make(kv_mixed=mixed(cold, mean=mean, attn="fused"), type_k="f16", type_v="f16", flash_attn=flash_attn)
    actual = decode(context)
    assert_moved(context)
    assert all(device.n_nodes(kind) > 0 for kind in ("attention", "join", "move"))
    assert (device.n_nodes("means") > 0) == mean

    on_cpu = {"type_k": "f16", "type_v": "f16", "flash_attn": flash_attn}
    expected = decode(make(device.on_cpu, kv_mixed=mixed(cold, mean=mean, attn="compose"), **on_cpu))
    plain = decode(make(device.on_cpu, kv_mixed=None, **on_cpu))
    effect = rms(expected - plain)
    assert effect > 0
    assert rms(actual - expected) < {"q4_0": 0.05, "q8_0": 0.25}.get(cold, 0.25) * effect


@pytest.mark.emulated
@pytest.mark.parametrize("unified", [True, False])
def test_kernels_for_gpus_and_several_sequences(unified: bool, device: Device, make: Make) -> None:
    device.emulate_cuda(True)
    tokens = random_tokens(300)

    def run(model: Model, attn: str) -> np.ndarray:
        context = make(model, kv_mixed=mixed("q4_0", attn=attn), type_k="f16", type_v="f16", n_seq_max=3, kv_unified=unified)
        context.decode(tokens[:150], seq_id=0)
        context.decode(tokens[150:250], seq_id=1)
        context.memory.seq_cp(0, 2)
        rows = []
        for i in range(250, 290, 2):
            context.decode_batch([tokens[i], tokens[i + 1], tokens[i]], [0, 1, 2], logits="all")
            rows.append(context.logits)
        return np.concatenate(rows)

    actual, expected = run(device.whole, "fused"), run(device.on_cpu, "compose")
    assert device.n_nodes("attention") > 0
    assert rms(actual - expected) < 0.01 * rms(expected)


@pytest.mark.parametrize(
    ("n_ctx", "n_ubatch", "hot"), [(8192, 512, 768), (8192, 256, 512), (16384, 1024, 1280), (4096, 512, 512), (512, 512, 512)]
)
def test_hot_has_room_for_a_ubatch(n_ctx: int, n_ubatch: int, hot: int, device: Device, make: Make) -> None:
    """Where it is an eighth of the context at most: a GPU has no use for the few tokens that would be left of it."""
    sizes = {"n_ctx": n_ctx, "n_ubatch": n_ubatch, "n_batch": 2048, "type_k": "f16", "type_v": "f16"}
    assert make(kv_mixed=True, **sizes).kv_mixed.n_hot == hot
    assert make(kv_mixed="hot=512", **sizes).kv_mixed.n_hot == 512
    assert make(device.on_cpu, kv_mixed=True, **sizes).kv_mixed.n_hot == 512


@pytest.mark.emulated
@pytest.mark.parametrize("emulates", [True, False], ids=["kernels", "operations"])
def test_rows_stay_on_the_device_when_they_become_cold(emulates: bool, device: Device, make: Make) -> None:
    """Nothing but logits goes to the host."""
    device.emulate_cuda(emulates)
    context = make(kv_mixed=mixed("q4_0"), type_k="f16", type_v="f16", flash_attn="on")
    context.decode(random_tokens(200))
    context.logits  # noqa: B018
    before = context.stats.n_migrations
    device.n_read()
    for token in random_tokens(40, 1):
        context.decode([token])
        context.logits  # noqa: B018
    assert context.stats.n_migrations > before + 2
    assert device.n_read() == 40 * context.model.n_vocab * 4


@pytest.mark.emulated
@pytest.mark.parametrize("n_tokens", [1, 30])
def test_migrations_are_not_waited_for(n_tokens: int, device: Device, make: Make) -> None:
    """Rows move behind the tokens before and ahead of the next ones."""

    device.emulate_cuda(True)

    def count(kv_mixed: Any) -> int:
        context = make(kv_mixed=kv_mixed, n_ctx=2048, type_k="f16", type_v="f16", flash_attn="on")
        context.decode(random_tokens(200))
        context.logits  # noqa: B018
        device.n_waits()
        for i in range(40):
            assert raw.decode_sequences(context, [random_tokens(n_tokens, i)], 200 + i * n_tokens) == 0
        n_waits = device.n_waits()
        if kv_mixed:
            assert context.stats.n_tokens_moved > 200 + 40 * n_tokens - 48
        return n_waits

    # ggml's scheduler takes inputs when the graph before is done, and makes room for a larger one when it is, too; a wait
    # for each of the migrations would be 40 more at the least
    assert count(False) == 39
    assert 39 <= count(mixed("q4_0")) < 45


@pytest.mark.emulated
def test_others_make_way_for_a_state(device: Device, make: Make) -> None:
    """Their rows move before those of the state take their cells."""
    device.emulate_cuda(True)
    params = {"type_k": "f16", "type_v": "f16", "flash_attn": "on", "n_seq_max": 2, "kv_unified": True}

    def run(model: Model, attn: str) -> np.ndarray:
        source, context = (make(model, kv_mixed=mixed("q4_0", attn), **params) for _ in range(2))
        source.decode(random_tokens(38), seq_id=1)
        context.decode(random_tokens(38, 1), seq_id=0)
        assert context.stats.cold_used == 0
        context.state_load(source.state_save(1), 1)
        assert context.stats.cold_used > 20
        logits = []
        for seq_id in (0, 1):
            context.decode(random_tokens(9, 2), seq_id=seq_id, logits="all")
            logits.append(context.logits)
        return np.concatenate(logits)

    actual, expected = run(device.whole, "fused"), run(device.on_cpu, "compose")
    assert rms(actual - expected) < 0.01 * rms(expected)


@pytest.mark.emulated
def test_what_gpus_have_no_kernels_for_is_composed(
    device: Device, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """The log tells why."""
    device.emulate_cuda(True)
    with pytest.raises(ContextError, match="no kernel for hot rows of that type"):
        make(kv_mixed=mixed("q4_0", attn="fused"), type_k="f32", type_v="f32")
    with caplog.at_level(logging.INFO, logger="llamamix"):
        context = make(kv_mixed=mixed("q4_0"), type_k="f32", type_v="f32")
    assert "attention of 2 layers is composed of ggml's operations" in caplog.text
    assert "OwnMemory0: there is no kernel for hot rows of that type" in caplog.text
    decode(context)
    assert_moved(context)
    assert device.n_nodes("attention") == device.n_nodes("join") == 0


@pytest.mark.parametrize("claims", [False, True])
def test_layers_on_both(claims: bool, device: Device, make: Make) -> None:
    """The kernel for the layer on the CPU, composition for the one on the device."""
    device.claim_custom(claims)
    expected = decode(make(device.on_cpu, kv_mixed=False, **F32))
    context = make(device.upper, kv_mixed=mixed("f32"), **F32)
    actual = decode(context)
    assert_moved(context)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ATOL)
    with pytest.raises(ContextError, match="attn=fused is not possible for layer 1: the cache is not in"):
        make(device.upper, kv_mixed=mixed("f32", "fused"))


@pytest.mark.parametrize("flash_attn", ["off", "on"])
@pytest.mark.parametrize("claims", [False, True])
@pytest.mark.parametrize("attn", ["auto", "fused", "compose"])
def test_a_cache_that_stays_in_the_cpus_memory(
    attn: str, claims: bool, flash_attn: str, device: Device, make: Make
) -> None:
    """offload_kqv=False: layers on the device, cache and attention on the CPU, by the kernel where that is wanted."""
    device.claim_custom(claims)
    device.refuse("CPY q4_0 f32", "SET_ROWS f32 q4_0")  # which is not asked
    context = make(kv_mixed=mixed("q4_0", attn), flash_attn=flash_attn, offload_kqv=False)
    actual = decode(context)
    assert_moved(context)
    expected = decode(make(device.on_cpu, kv_mixed=mixed("q4_0", attn), flash_attn=flash_attn))
    np.testing.assert_array_equal(actual, expected)


#
# operations that the device does not have
#


@pytest.mark.parametrize("attn", ["auto", "compose"])
@pytest.mark.parametrize("cold", [("iq4_nl", "iq4_nl"), ("q4_0", "iq4_nl"), ("iq4_nl", "f16")])
def test_a_cold_type_that_is_not_expanded_there(cold: tuple[str, str], attn: str, device: Device, make: Make) -> None:
    """As CUDA has it: rows can be made iq4_nl and not be read again."""
    device.refuse("CPY iq4_nl f32")
    reason = "attn=compose is not possible for layer 0: OwnMemory0 has no CPY of iq4_nl rows to f32"
    possible = "take one of these cold types: f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1"
    cold_k, cold_v = cold
    with pytest.raises(ContextError, match=f"{reason}, {possible}"):
        make(kv_mixed=KVMixedParams(hot=48, cold_k=cold_k, cold_v=cold_v, attn=attn))


@pytest.mark.parametrize("refused", [[], ["CPY iq4_nl f32"], ["SET_ROWS f32 iq4_nl"]], ids=["", "CPY", "SET_ROWS"])
def test_the_default_is_what_the_device_has(refused: list[str], device: Device, make: Make) -> None:
    device.refuse(*refused)
    for params, expected in (
        (KVMixedParams(hot=48), ("auto", "auto")),
        (KVMixedParams(hot=48, cold_k="q8_0"), ("q8_0", "auto")),
        ("quality,hot=48", ("q5_0", "auto")),
    ):
        context = make(kv_mixed=params)
        wanted = tuple(("q4_0" if refused else "iq4_nl") if t == "auto" else t for t in expected)
        assert (context.stats.type_cold_k, context.stats.type_cold_v) == wanted
        assert (context.kv_mixed.type_cold_k, context.kv_mixed.type_cold_v) == wanted
        decode(context)
        assert_moved(context)


@pytest.mark.parametrize(
    ("refused", "cold", "possible"),
    [
        (["CPY iq4_nl f32", "CPY q5_0 f32", "CPY q5_1 f32", "CPY bf16 f16"], "q5_0", "f32, f16, q8_0, q4_0, q4_1"),
        (["CPY q5_0 f32", "SET_ROWS f32 q4_1"], "q5_0", "f32, f16, bf16, q8_0, q4_0, iq4_nl, q5_1"),
        (["CPY f32 f16"], "q4_0", "f16, bf16"),  # what was expanded is in F32
        (["CPY f16 f32"], "q8_0", "f32, f16, bf16"),  # hot rows are rotated in F32, for quantised types alone
        (["CPY bf16 f16", "MUL_MAT f32 f32"], "bf16", "f32, f16"),  # and rotated
    ],
)
def test_types_that_would_work_are_named(
    refused: list[str], cold: str, possible: str, device: Device, make: Make
) -> None:
    device.refuse(*refused)
    with pytest.raises(ContextError, match=rf"take one of these cold types: {possible}\.$"):
        make(kv_mixed=mixed(cold))
    for cold in possible.split(", "):
        context = make(kv_mixed=mixed(cold))
        decode(context)
        assert_moved(context)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16"])
def test_rows_that_can_not_be_joined(kv_type: str, device: Device, make: Make) -> None:
    """They are in the hot type, so no cold type is of help."""
    device.refuse(f"CONCAT {kv_type} {kv_type}")
    reason = f"OwnMemory0 has no CONCAT of {kv_type} rows to {kv_type}"
    params = {"kv_mixed": mixed("q4_0"), "type_k": kv_type, "type_v": kv_type}
    with pytest.raises(ContextError, match=rf"{reason}, keep the cache in the CPU's memory \(offload_kqv=false\)"):
        make(**params)
    decode(make(offload_kqv=False, **params))


@pytest.mark.parametrize(
    ("operation", "cold_k", "cold_v", "pair"),
    [
        ("SET_ROWS f32 iq4_nl", "iq4_nl", "iq4_nl", "f16 rows to iq4_nl"),
        ("SET_ROWS f32 iq4_nl", "q4_0", "iq4_nl", "f16 rows to iq4_nl"),
        ("SET_ROWS f32 q8_0", "q8_0", "f16", "f16 rows to q8_0"),
        ("GET_ROWS f16 f32", "q8_0", "q8_0", "f16 rows to q8_0"),
        ("MUL_MAT f32 f32", "f16", "q4_0", "f16 rows to q4_0"),
    ],
)
def test_a_migration_that_the_device_can_not_make(
    operation: str, cold_k: str, cold_v: str, pair: str, device: Device, make: Make
) -> None:
    device.refuse(operation)
    name, source, target = operation.split()
    reason = f"OwnMemory0 can not move {pair}, it has no {name} of {source} rows to {target}"
    with pytest.raises(ContextError, match=reason):
        make(kv_mixed=KVMixedParams(hot=48, cold_k=cold_k, cold_v=cold_v))
