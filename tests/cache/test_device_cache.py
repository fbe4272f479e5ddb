"""What caches do on a device with memory of its own: bytes, operations on sequences, shifts, states, the trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import raw
from helpers.allowances import ATOL, rms
from helpers.histories import decode, operate
from helpers.own_memory import N_EMBD_KV, N_LAYER, Device, mixed
from helpers.rows import GRIDS
from helpers.tiny_model import random_tokens

from llamamix import Context, Trace
from llamamix.trace import EventKind

Make = Callable[..., Context]


#
# what caches do
#


@pytest.mark.parametrize("cold", ["f16", "q8_0", "q4_0", "iq4_nl"])
def test_bytes_and_counts(cold: str, device: Device, make: Make) -> None:
    context, other = make(kv_mixed=mixed(cold)), make(device.on_cpu, kv_mixed=mixed(cold))
    for c in (context, other):
        decode(c)
    stats = context.stats
    row = {
        "f16": 2 * N_EMBD_KV,
        "q8_0": N_EMBD_KV // 32 * 34,
        "q4_0": N_EMBD_KV // 32 * 18,
        "iq4_nl": N_EMBD_KV // 32 * 18,
    }
    assert stats.bytes_hot == 48 * N_LAYER * 2 * 2 * N_EMBD_KV
    means = 0 if cold == "f16" else -(-stats.cold_size // 128) * N_LAYER * 2 * N_EMBD_KV
    assert stats.bytes_cold == stats.cold_size * N_LAYER * 2 * row[cold] + means
    assert stats.bytes_plain == 512 * N_LAYER * 2 * 2 * N_EMBD_KV
    for name in ("n_migrations", "n_tokens_moved", "hot_used", "cold_used", "cold_size"):
        assert getattr(stats, name) == getattr(other.stats, name)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("cold", ["f16", "bf16", "q8_0", "q4_0", "q5_1"])
def test_operations_on_sequences(cold: str, unified: bool, device: Device, make: Make) -> None:
    params = {"n_ctx": 512 if unified else 3 * 256, "n_seq_max": 3, "kv_unified": unified}
    context = make(kv_mixed=mixed(cold, mean=False), **params)
    other = make(device.on_cpu, kv_mixed=mixed(cold, "compose", mean=False), **params)
    np.testing.assert_array_equal(operate(context, unified), operate(other, unified))
    assert context.stats.n_migrations > 10
    for name in ("n_migrations", "hot_used", "cold_used"):
        assert getattr(context.stats, name) == getattr(other.stats, name)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("cold", ["q8_0", "q4_0"])
def test_means_on_the_device(cold: str, unified: bool, device: Device, make: Make) -> None:
    """Its sums have another order: a mean near a border of F16 becomes the number next to it.

    That is 2**-11 of values up to 4, against a step of Q4_0 of 4 / 8, of Q8_0 of 4 / 127: 0.4 % and 6 % of a step, which
    move as many codes of those rows, each by a step. What differs is less than a tenth of what quantisation does, and of
    Q8_0 a third.
    """
    params = {"n_ctx": 512 if unified else 3 * 256, "n_seq_max": 3, "kv_unified": unified}
    actual = operate(make(kv_mixed=mixed(cold), **params), unified)
    expected, exact, without = (
        operate(make(device.on_cpu, kv_mixed=mixed(c, "compose", mean=mean), **params), unified)
        for c, mean in ((cold, True), ("f16", True), (cold, False))
    )
    share = {"q4_0": 0.1, "q8_0": 0.3}[cold]
    effect = float(np.sqrt(np.mean((expected - exact) ** 2)))
    assert float(np.sqrt(np.mean((actual - expected) ** 2))) < share * effect
    assert float(np.sqrt(np.mean((actual - without) ** 2))) > 0.5 * effect  # without means it would be something else


def shift(context: Context) -> np.ndarray:
    """Logits of what follows when a part of a sequence is removed and the rest has moved up."""
    context.decode(random_tokens(200))
    context.memory.seq_rm(0, 4, 60)
    context.memory.seq_add(0, 60, -1, -56)
    context.decode(random_tokens(40, 1), logits="all")
    return context.logits


@pytest.mark.parametrize(("cold", "operation"), [("q4_0", "CPY f32 q4_0"), ("f16", "CPY f32 f16")])
def test_a_context_shift_that_the_device_can_not_compute(cold: str, operation: str, device: Device, make: Make) -> None:
    """ggml's scheduler computes elsewhere what a device does not have, and is not asked to do so in the cache itself."""
    device.refuse(operation)

    actual = shift(make(kv_mixed=mixed(cold)))
    np.testing.assert_array_equal(actual, shift(make(device.on_cpu, kv_mixed=mixed(cold, "compose"))))


@pytest.mark.emulated
def test_a_context_shift_of_rows_that_only_kernels_read(device: Device, make: Make) -> None:
    """CUDA has kernels for rows of IQ4_NL, and no operation that expands them: ggml's scheduler does that elsewhere."""
    device.emulate_cuda(True)
    device.refuse("CPY iq4_nl f32")

    f16 = {"type_k": "f16", "type_v": "f16"}
    context = make(kv_mixed=mixed("auto"), **f16)
    actual = shift(context)
    assert context.kv_mixed.cold == "iq4_nl" and device.n_nodes("attention") + device.n_nodes("join") > 0
    expected = shift(make(device.on_cpu, kv_mixed=mixed("iq4_nl", "compose"), **f16))
    effect = rms(expected - shift(make(device.on_cpu, kv_mixed=None, **f16)))
    assert 0 < rms(actual - expected) < 0.25 * effect  # as in test_kernels_for_gpus


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_a_context_shift_is_the_plain_caches(kv_type: str, make: Make) -> None:
    """Rows of both parts are turned on the device; upstream turns F16 rows in F16, where these are turned in F32."""

    def run(kv_mixed: Any, flash_attn: str = "off") -> np.ndarray:
        context = make(kv_mixed=kv_mixed, type_k=kv_type, type_v=kv_type, flash_attn=flash_attn)
        logits = shift(context)
        if kv_mixed:
            assert context.stats.n_migrations > 10
        return logits

    expected = run(False)
    atol = ATOL
    if kv_type == "f16":
        # K rows are stored once more, off by up to 2**-12 of their size in both; a score is a sum of 64 products with
        # queries of size 2 over sqrt(64): off by 2**-12 / sqrt(3) * 2 each, twice that after two layers, which changes
        # logits (size 3) in proportion; 5 times that for the largest of 16,000
        atol = 2**-12 / np.sqrt(3) * 2 * 2 * 3 * 5
    np.testing.assert_allclose(run(mixed(kv_type)), expected, rtol=0, atol=atol)


#
# states
#


@pytest.mark.parametrize("cold", ["f16", "q8_0", "q4_0", "q5_1"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "sequence"])
def test_a_state_goes_to_the_cpu_and_back(whole: bool, cold: str, device: Device, make: Make) -> None:
    params = {"n_seq_max": 2, "kv_unified": True}
    seq_id = None if whole else 1

    def fill(context: Context) -> None:
        context.decode(random_tokens(100), seq_id=0)
        context.decode(random_tokens(80, 1), seq_id=1)
        context.memory.seq_rm(1, 20, 40)

    on_device, on_cpu = (
        make(kv_mixed=mixed(cold), **params),
        make(device.on_cpu, kv_mixed=mixed(cold, "compose"), **params),
    )
    fill(on_device)
    fill(on_cpu)
    assert on_device.stats.cold_used > 100
    state = on_device.state_save(seq_id)
    assert state == on_cpu.state_save(seq_id)  # rows that were moved by the device's operations and by the kernel

    on_cpu.memory.clear()
    on_cpu.state_load(state, seq_id)
    assert on_cpu.state_save(seq_id) == state
    back = make(kv_mixed=mixed(cold), **params)
    back.decode(random_tokens(30, 2), seq_id=1)  # which it replaces
    back.state_load(on_cpu.state_save(seq_id), seq_id)
    assert back.state_save(seq_id) == state

    # and goes on as if nothing had happened
    if whole:
        for context in (on_device, on_cpu, back):
            context.decode(random_tokens(40, 3), seq_id=1, logits="all")
        np.testing.assert_array_equal(on_cpu.logits, on_device.logits)
        np.testing.assert_array_equal(back.logits, on_device.logits)


def test_a_sequence_comes_back_under_another_name(make: Make) -> None:
    context = make(kv_mixed=mixed("q4_0"), n_seq_max=2, kv_unified=False, n_ctx=512)
    context.decode(random_tokens(120), seq_id=0)
    state = context.state_save(0)
    context.state_load(state, 1)
    context.decode(random_tokens(30, 1), seq_id=0, logits="all")
    expected = context.logits
    context.decode(random_tokens(30, 1), seq_id=1, logits="all")
    np.testing.assert_array_equal(context.logits, expected)


@pytest.mark.parametrize("cold", ["f16", "q4_0"])
def test_rows_that_stay_on_the_device(cold: str, make: Make) -> None:
    context = make(kv_mixed=mixed(cold), n_seq_max=2, kv_unified=True)
    context.decode(random_tokens(150))
    before = context.state_save(0)
    kept = raw.state_get(context, 0, raw.ON_DEVICE)
    assert len(kept) < len(before) / 4  # rows are not in it
    context.memory.clear()
    context.decode(random_tokens(150, 1), seq_id=1)  # other rows take the cells
    context.memory.seq_rm(1)
    assert raw.state_set(context, kept, 0, raw.ON_DEVICE) == (len(kept), "")
    assert context.state_save(0) == before


#
# the trace
#


def errors(context: Context) -> list[tuple[Any, ...]]:
    """Of every migration."""
    with Trace(context, layers=True) as trace:
        decode(context)
        moves = [e for e in trace.read() if e.kind == EventKind.MIGRATE]
    return [(e.rmse_k, e.max_k, e.rmse_v, e.max_v, e.layers, e.bytes_in, e.bytes_out) for e in moves]


@pytest.mark.parametrize("cold", GRIDS)
def test_scales_are_searched_on_the_cpu(cold: str, device: Device, make: Make) -> None:
    """The device stores rows by ggml's operation, whose error is larger by 6 % and more for a normal distribution."""
    (k, _, v, *_), (k_cpu, _, v_cpu, *_) = (
        np.mean([e[:4] for e in errors(context)], axis=0)
        for context in (make(kv_mixed=mixed(cold)), make(device.on_cpu, kv_mixed=mixed(cold)))
    )
    assert k_cpu < 0.97 * k and v_cpu < 0.97 * v


@pytest.mark.parametrize("cold", ["f16", "q8_0", "q4_0", "q5_1"])
def test_errors_are_measured(cold: str, device: Device, make: Make) -> None:
    actual = errors(make(kv_mixed=mixed(cold)))
    assert len(actual) > 10
    assert actual == errors(make(device.on_cpu, kv_mixed=mixed(cold, "compose")))
    if cold == "f16":
        assert all(move[:4] == (0, 0, 0, 0) for move in actual)
    else:
        assert all(min(move[:4]) > 0 for move in actual)


@pytest.mark.emulated
def test_errors_are_those_of_rows_that_have_moved(device: Device, make: Make) -> None:
    """Migrations are waited for where they are measured: rows are those of the CPU but for a few scales."""
    device.emulate_cuda(True)
    f16 = {"type_k": "f16", "type_v": "f16"}
    actual, expected = (
        np.array([e[:4] for e in errors(make(model, kv_mixed=mixed("q4_0", attn), **f16))])
        for model, attn in ((device.whole, "fused"), (device.on_cpu, "compose"))
    )
    assert len(actual) > 10
    # the layers behind the first have rows that attention, rounded to F16, has changed by 2^-11 of them: 1 % of a step
    np.testing.assert_allclose(actual[:, [0, 2]], expected[:, [0, 2]], rtol=0.03)
