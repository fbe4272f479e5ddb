"""The trace: events, the ring they wait in, their errors, and their log."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable

import gguf
import numpy as np
import pytest
from helpers.rows import hadamard
from helpers.tiering import Tiering
from helpers.traces import HEAD_SIZE, N_HEAD_KV, N_LAYER, ROW_F16, ROW_Q4_0, SPEC, THRESHOLD_LINES, cache_of, migrations

from llamamix import (
    Batch,
    Context,
    ContextError,
    MixedKVCache,
    ParamsError,
    SBatch,
    Trace,
)
from llamamix.trace import Event, EventKind, Trigger


def tokens(n: int) -> list[int]:
    return [260 + i % 100 for i in range(n)]


def decode_singly(context: Context, n: int) -> None:
    for token in tokens(n):
        context.decode([token])


#
# events
#


@pytest.mark.parametrize(
    ("spec", "sizes", "triggers"),
    [
        (SPEC, [1] * 40, {"threshold"}),
        ("hot=16,cold=q8_0,group=3,sink=4", [30, 1, 1, 7, 50, 1], {"threshold", "room"}),
        ("hot=32,cold=f16,group=128,threshold=1,sink=2", [100, 5, 5, 5, 90], {"room"}),
        ("hot=64,cold=q4_0,threshold=0.5,sink=0", [20, 20, 20, 20], {"threshold"}),
    ],
)
def test_events_tell_what_happened(
    make_context: Callable[..., Context], spec: str, sizes: list[int], triggers: set[str]
) -> None:
    context = make_context(kv_mixed=spec)
    params = context.kv_mixed
    twin = Tiering(
        hot=params.hot, cold=params.cold_size, group=params.group, sink=params.sink, threshold=params.threshold
    )
    n_ubatch = context.n_ubatch
    pos = 0
    with Trace(context) as trace:
        for n in sizes:
            context.decode(tokens(n))
            twin.decode(range(pos, pos + n), [0] * n, n_ubatch)
            pos += n
        events = trace.read()
        stats = context.stats
    moves = migrations(events)
    assert len(moves) > 0

    # as many as the cache counts, and as its policy asks for
    assert (len(moves), sum(e.n_tokens for e in moves)) == (stats.n_migrations, stats.n_tokens_moved)
    assert (len(moves), sum(e.n_tokens for e in moves)) == (twin.n_migrations, twin.n_tokens_moved)
    assert stats.t_migrate_us <= sum(round(1e6 * e.duration) for e in moves) < 1e6 * trace.now()
    assert events[-1].hot_used + events[-1].cold_used <= pos == stats.hot_used + stats.cold_used

    # one after the other
    assert [e.id for e in events] == list(range(len(events)))
    assert events[0].kind is EventKind.INIT and events[0].t == 0
    times = [e.t for e in events]
    assert times == sorted(times)
    assert trace.n_dropped == 0 and trace.read() == []

    # a trigger before each migration, which takes from hot what it adds to cold, and the oldest tokens
    assert [e.kind for e in events[1:]] == [EventKind.TRIGGER, EventKind.MIGRATE] * len(moves)
    assert {e.trigger.value for e in moves} == triggers
    next_pos, cold = params.sink, 0
    for before, after in zip(events[1::2], events[2::2], strict=True):
        assert dataclasses.replace(before, id=after.id, t=after.t, kind=after.kind) == dataclasses.replace(
            after, hot_used=before.hot_used, cold_used=before.cold_used, duration=0.0, bytes_in=0, bytes_out=0
        )
        assert before.trigger is Trigger.ROOM or before.hot_used > params.threshold * params.hot
        assert (before.cold_used, after.cold_used) == (cold, cold + after.n_tokens)
        assert after.hot_used == before.hot_used - after.n_tokens
        assert (after.hot_size, after.cold_size) == (params.hot, params.cold_size)
        assert (after.stream, after.seq_ids) == (0, (0,))
        assert (after.pos_min, after.pos_max) == (next_pos, next_pos + after.n_tokens - 1)
        next_pos, cold = after.pos_max + 1, after.cold_used
        row = {"q4_0": ROW_Q4_0, "q8_0": ROW_F16 // 64 * 34, "f16": ROW_F16}[params.type_cold_k]
        assert after.bytes_in == after.n_tokens * N_LAYER * 2 * ROW_F16
        assert after.bytes_out == after.n_tokens * N_LAYER * 2 * row
        assert 0 < after.duration < 1
        assert (after.rmse_k, after.max_k, after.rmse_v, after.max_v, after.layers) == (None, None, None, None, ())
        assert (after.rms_k, after.rms_v) == (None, None)


def test_streams_are_told_apart(make_context: Callable[..., Context]) -> None:
    context = make_context(kv_mixed=SPEC, n_seq_max=3, n_ctx=3 * 256)
    with Trace(context) as trace:
        for seq_id, n in ((0, 9), (2, 11)):
            for token in tokens(n):
                context.decode([token], seq_id=seq_id)
        events = trace.read()
        assert trace.cache.n_stream == 3
    assert (events[0].stream, events[0].hot_size) == (None, 30)
    assert [(e.stream, e.seq_ids, e.hot_used, e.cold_used) for e in migrations(events)] == [
        (0, (0,), 7, 2),
        (2, (2,), 7, 2),
        (2, (2,), 7, 4),
    ]


def test_shared_tokens_are_of_both_sequences(make_context: Callable[..., Context]) -> None:
    context = make_context(kv_mixed=SPEC, n_seq_max=100, kv_unified=True)
    context.decode_batch(tokens(8), [[1, 64, 99]] * 8)
    with Trace(context) as trace:
        context.decode_batch(tokens(1), [[1]])
        (event,) = migrations(trace.read())
    assert event.seq_ids == (1, 64, 99)


def test_every_state_change_is_an_event(make_context: Callable[..., Context]) -> None:
    context = make_context(kv_mixed=SPEC, n_seq_max=80, kv_unified=True)
    decode_singly(context, 8)
    with Trace(context) as trace:
        state = context.state_save(0)
        context.memory.seq_cp(0, 70)
        context.memory.seq_rm(0, 2, 4)
        context.memory.seq_add(70, 5, 8, 3)
        context.memory.seq_div(70, 8, 11, 2)
        context.memory.seq_keep(70)
        context.memory.clear()
        context.state_load(state, 0)
        events = trace.read()
    seen = [(e.kind.value, e.seq_ids, e.hot_used) for e in events]
    assert seen == [
        ("init", (), 8),
        ("state_write", (0,), 8),
        ("seq_cp", (0, 70), 8),
        ("seq_rm", (0,), 8),  # 70 has them
        ("seq_add", (70,), 8),
        ("seq_div", (70,), 8),
        ("seq_keep", (70,), 8),
        ("clear", (), 0),
        ("seq_rm", (0,), 0),  # what the state replaces
        ("state_read", (0,), 8),
    ]
    assert all(e.trigger is None and e.cold_used == 0 for e in events)


def add_tokens(cache: MixedKVCache, n: int, pos: int = 0) -> bool:
    """Add tokens one by one, without rows."""
    for p in range(pos, pos + n):
        batch = Batch()
        batch.add(1, p, 0)
        if not cache.find_slot(SBatch(batch, n_seq_max=1).split_simple(1)):
            return False
        cache.commit()
    return True


def test_a_cache_without_a_context() -> None:
    with cache_of() as cache, Trace(cache) as trace:
        assert add_tokens(cache, 6)
        assert cache.move_tokens_to_cold_cache(2) == 2
        assert add_tokens(cache, 10, pos=6)
        assert cache.stats.cold_used == cache.stats.cold_size and cache.stats.hot_used == cache.stats.hot_size
        assert not add_tokens(cache, 1, pos=16)
        events = trace.read()
    manual = [e for e in events if e.trigger is Trigger.MANUAL]
    assert [(e.kind, e.pos_min, e.pos_max) for e in manual] == [(EventKind.TRIGGER, 0, 1), (EventKind.MIGRATE, 0, 1)]
    refused = events[-1]
    assert (refused.kind, refused.n_tokens, refused.hot_used, refused.cold_used) == (EventKind.REFUSE, 1, 8, 8)
    assert sum(e.kind is EventKind.REFUSE for e in events) == 1


#
# the ring
#


@pytest.mark.parametrize("n_max", [1, 2, 5, 300, 10_000])
def test_the_ring_keeps_the_newest(n_max: int) -> None:
    n = 1000
    with cache_of() as cache, Trace(cache, n_max=n_max) as trace:
        for i in range(n):
            cache.seq_rm(0, i, i + 1)
        events = trace.read()
        # the first record is taken as the trace begins
        assert [e.id for e in events] == [0, *range(max(1, n + 1 - n_max), n + 1)]
        assert trace.n_dropped == max(0, n - n_max)

        cache.clear()
        assert [(e.id, e.kind) for e in trace.read()] == [(n + 1, EventKind.CLEAR)]
        assert trace.n_dropped == max(0, n - n_max)


def test_a_trace_that_begins_anew() -> None:
    with cache_of() as cache:
        trace = Trace(cache, n_max=2)
        for _ in range(2):
            trace.start()
            for _ in range(5):
                cache.clear()
            trace.stop()
            trace.stop()
            cache.clear()  # not recorded
            assert [e.id for e in trace.read()] == [0, 4, 5]
            assert trace.n_dropped == 3


def test_drained_by_another_thread(make_context: Callable[..., Context]) -> None:
    context = make_context(kv_mixed="hot=8,group=2,sink=0", n_ctx=2048)
    events: list[Event] = []
    drained, done = threading.Event(), threading.Event()
    n_calls, during = 0, 0

    def drain() -> None:
        while not done.is_set():
            events.extend(trace.read())
            drained.set()
            time.sleep(0.001)

    def wait_for_drain() -> bool:
        """Again and again within the decode."""
        nonlocal n_calls, during
        n_calls += 1
        if n_calls % 500 == 0:
            drained.clear()
            assert drained.wait(60)
            during = len(events)
        return False

    with Trace(context, layers=True) as trace:
        thread = threading.Thread(target=drain)
        thread.start()
        context.set_abort_callback(wait_for_drain)
        context.decode(tokens(1500))  # n_batch is 2048: one call
        done.set()
        thread.join()
        events += trace.read()
        stats = context.stats
    assert during > 100
    assert trace.n_dropped == 0
    assert [e.id for e in events] == list(range(len(events)))
    moves = migrations(events)
    assert (len(moves), sum(e.n_tokens for e in moves)) == (stats.n_migrations, stats.n_tokens_moved)
    assert all([error.il for error in e.layers] == [0, 1] for e in moves)


def test_a_ring_that_overflows_while_it_is_read(make_context: Callable[..., Context]) -> None:
    """Every record is read once, in order, or counted as lost."""
    context = make_context(kv_mixed="hot=8,group=2,sink=0", n_ctx=2048)
    events: list[Event] = []
    full, drained, done = threading.Event(), threading.Event(), threading.Event()
    lost, n_calls = [0], 0

    def read() -> None:
        full.wait(60)
        while not done.is_set():
            events.extend(trace.read())
            lost.append(trace.n_dropped)
            drained.set()

    def wait_for_drain() -> bool:
        """The ring overflows before anybody reads it, and is read within the decode, whatever the threads' speeds."""
        nonlocal n_calls
        n_calls += 1
        if n_calls % 500 == 0:
            drained.clear()
            full.set()
            assert drained.wait(60)
        return False

    with Trace(context, n_max=3) as trace:
        thread = threading.Thread(target=read)
        thread.start()
        context.set_abort_callback(wait_for_drain)
        context.decode(tokens(1500))  # n_batch is 2048: one call
        done.set()
        thread.join()
        events += trace.read()
        lost.append(trace.n_dropped)
        n_migrations = context.stats.n_migrations
    assert n_calls >= 1000
    ids = [e.id for e in events]
    assert ids == sorted(set(ids)) and lost == sorted(lost)
    assert len(ids) + lost[-1] == ids[-1] + 1
    assert ids[-1] + 1 >= n_migrations > 700
    assert lost[-1] > 0 and len(ids) > 1 + 3  # of both kinds, beside what waited at the end


def test_a_migration_comes_with_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens between reading the events and reading the layers."""
    with cache_of(hot=32, cold_size=32, group=2) as cache, Trace(cache, layers=True) as trace:
        assert add_tokens(cache, 10)
        drain = trace._drain

        def drain_and_go_on() -> list[Event]:
            events = drain()
            cache.move_tokens_to_cold_cache(2)  # its layers are read before its event
            return events

        monkeypatch.setattr(trace, "_drain", drain_and_go_on)
        moved = [("trigger", 0), ("migrate", N_LAYER)]
        for expected in ([("init", 0)], moved, moved):
            assert [(e.kind.value, len(e.layers)) for e in trace.read()] == expected
        monkeypatch.undo()
        trace.stop()
        assert [(e.kind.value, len(e.layers)) for e in trace.read()] == moved
        assert trace.read() == []


def test_a_context_is_not_closed_while_its_trace_is_read(
    make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(kv_mixed=SPEC)
    decode_singly(context, 9)
    with Trace(context) as trace:
        closing = threading.Thread(target=context.close)
        drain = trace._drain

        def close_and_drain() -> list[Event]:
            closing.start()
            closing.join(0.2)
            assert closing.is_alive() and not context._handle.closed
            return drain()

        monkeypatch.setattr(trace, "_drain", close_and_drain)
        assert [e.kind for e in trace.read()] == [EventKind.INIT]
        closing.join()
        with pytest.raises(ContextError, match="closed"):
            trace.read()


#
# errors
#


def test_what_can_not_be_traced(make_context: Callable[..., Context]) -> None:
    plain = make_context(kv_mixed=False)
    with pytest.raises(ContextError, match="no mixed KV cache"):
        Trace(plain).start()

    context = make_context(kv_mixed=SPEC)
    with pytest.raises(ContextError, match="not begun"):
        Trace(context).read()
    for n_max in (0, -1, 2**32, 1.5, True, None):
        with pytest.raises(ParamsError, match="n_max"):
            Trace(context, n_max=n_max)

    with Trace(context) as trace:
        for cache in (context, MixedKVCache.from_context(context)):
            with pytest.raises(ContextError, match="traced already"):
                Trace(cache).start()
        context.close()
        with pytest.raises(ContextError, match="closed"):
            trace.read()
        with pytest.raises(ContextError, match="closed"):
            Trace(context).start()


def test_the_cache_of_a_context(make_context: Callable[..., Context]) -> None:
    context = make_context(kv_mixed=SPEC)
    with Trace(MixedKVCache.from_context(context)) as trace:
        decode_singly(context, 9)
        assert len(migrations(trace.read())) == 1
        context.close()
        with pytest.raises(ContextError, match="closed"):
            trace.read()


#
# quantisation error
#


def dequantized(rows: np.ndarray, kv_type: str) -> np.ndarray:
    """What is left of rows that are stored in a type, by gguf's own code."""
    number = gguf.GGMLQuantizationType[kv_type.upper()]
    return gguf.quants.dequantize(gguf.quants.quantize(rows.astype(np.float32), number), number)


def rmse(difference: np.ndarray) -> float:
    return math.sqrt(np.mean(np.square(difference, dtype=np.float64)))


@pytest.mark.parametrize(("cold", "mean"), [("f16", False), ("q4_0", False), ("q4_0", True)])
def test_the_error_is_that_of_the_rows(cold: str, mean: bool) -> None:
    rng = np.random.default_rng(1)
    # layers and sides of different scale
    scale = np.array([[1.0, 0.1], [5.0, 0.5]])[:, :, None, None, None]
    rows = (rng.standard_normal((2, N_LAYER, 4, N_HEAD_KV, HEAD_SIZE)) * scale).astype(np.float16)
    means = np.zeros((2, N_LAYER, 1, N_HEAD_KV, HEAD_SIZE), np.float32)
    if mean:  # of K, as the library sums it
        total = sum((rows[0, :, i].astype(np.float32) for i in range(3)), np.zeros_like(means[0, :, 0]))
        means[0, :, 0] = (total / np.float32(3)).astype(np.float16)
    moved = rows[:, :, :3].astype(np.float32)
    difference = np.abs(moved - (dequantized(moved - means, cold) + means))

    with cache_of(cold=cold, mean=mean, hot=16, cold_size=16, group=4) as cache, Trace(cache, layers=True) as trace:
        assert add_tokens(cache, 4)
        for il in range(N_LAYER):
            cache.hot.set_k(il, 0, rows[0, il])
            cache.hot.set_v(il, 0, rows[1, il])
        assert cache.move_tokens_to_cold_cache(3) == 3
        (event,) = migrations(trace.read())

    # float32 holds the results
    assert event.rmse_k == pytest.approx(rmse(difference[0]), rel=1e-6)
    assert event.rmse_v == pytest.approx(rmse(difference[1]), rel=1e-6)
    assert (event.max_k, event.max_v) == (difference[0].max(), difference[1].max())
    assert (event.rms_k, event.rms_v) == pytest.approx((rmse(rows[0, :, :3]), rmse(rows[1, :, :3])), rel=1e-6)
    assert len(event.layers) == N_LAYER
    for il, error in enumerate(event.layers):
        assert error.il == il
        assert error.rmse_k == pytest.approx(rmse(difference[0, il]), rel=1e-6)
        assert error.rmse_v == pytest.approx(rmse(difference[1, il]), rel=1e-6)
        assert (error.max_k, error.max_v) == (difference[0, il].max(), difference[1, il].max())
        assert error.rms_k == pytest.approx(rmse(rows[0, il, :3]), rel=1e-6)
        assert error.rms_v == pytest.approx(rmse(rows[1, il, :3]), rel=1e-6)
    if cold == "f16":
        assert event.rmse_k == event.rmse_v == 0.0
    else:
        assert min(event.rmse_k, event.rmse_v) > 0.0


def test_the_error_of_a_context(make_context: Callable[..., Context]) -> None:
    found = {}
    for cold in ("f16", "q8_0", "q4_0"):
        context = make_context(kv_mixed=f"hot=32,cold={cold},sink=0,group=8,threshold=1")
        cache = MixedKVCache.from_context(context)
        context.decode(tokens(32))
        hot = [[get(il).dequantize()[0] for il in range(N_LAYER)] for get in (cache.hot.get_k, cache.hot.get_v)]
        with Trace(context, measure_error=True) as trace:
            context.decode(tokens(1))
            (event,) = migrations(trace.read())
        moved = range(event.pos_min, event.pos_max + 1)
        assert moved == range(8)
        stored = [[get(il).dequantize()[0] for il in range(N_LAYER)] for get in (cache.cold.get_k, cache.cold.get_v)]
        if cold != "f16":
            stored[0] = [rows + cache.cold.get_means(il)[0, 0].astype(np.float32) for il, rows in enumerate(stored[0])]
        measurements = ((event.rmse_k, event.max_k, event.rms_k), (event.rmse_v, event.max_v, event.rms_v))
        for side, (measured, largest, scale) in enumerate(measurements):
            assert scale == pytest.approx(rmse(np.array([h[:8] for h in hot[side]])), rel=1e-6)
            # cells are taken in the order of the positions
            turn = np.eye(64) if cold == "f16" else hadamard(64)  # rows are rotated before they are quantised
            difference = np.abs(np.array([s[:8] @ turn - h[:8] for s, h in zip(stored[side], hot[side], strict=True)]))
            # values below 5 are turned in 6 steps of two roundings each
            for actual, wanted in ((measured, rmse(difference)), (largest, difference.max())):
                assert actual == pytest.approx(wanted, rel=1e-6, abs=0 if cold == "f16" else 12 * 5 * 2**-24)
        assert event.layers == ()
        found[cold] = event.rmse_k, event.rmse_v
    assert found["f16"] == (0.0, 0.0)
    for q8_0, q4_0 in zip(found["q8_0"], found["q4_0"], strict=True):
        assert 0 < 10 * q8_0 < q4_0 < 20 * q8_0  # a step is 1/8 of the largest value of a block, or 1/127


#
# log
#


def test_the_documented_lines(make_context: Callable[..., Context], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llamamix")
    context = make_context(kv_mixed=SPEC)
    with Trace(context, log=True):
        decode_singly(context, 9)
        context.memory.seq_rm(0)  # an event without a line
    decode_singly(context, 9)  # not traced
    records = [r for r in caplog.records if "MIXED_CACHE" in r.getMessage() or "kv_cache_mixed" in r.getMessage()]
    assert [r.getMessage() for r in records] == [
        "llama_kv_cache_mixed: creating hot KV cache (FP16), size = 10 cells",
        "llama_kv_cache_mixed: creating cold KV cache (quantized), size = 246 cells",
        "[MIXED_CACHE_DEBUG] initialized: hot=0/10 (0.0%), cold=0/246 (0.0%)",
        *THRESHOLD_LINES,
    ]
    assert all(r.levelno == logging.INFO for r in records)


def test_lines_of_a_documented_cache(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llamamix")
    options = {"hot": 10, "cold_size": 40, "group": 4, "n_pad": 2, "n_seq_max": 3}
    with cache_of(**options) as cache, Trace(cache, log=True):
        assert add_tokens(cache, 15)
    lines = [r.getMessage() for r in caplog.records]
    lines = lines[lines.index("[MIXED_CACHE_DEBUG] initialized: hot=0/10 (0.0%), cold=0/40 (0.0%)") + 1 :]
    assert lines == THRESHOLD_LINES * 4  # with the tokens 9, 11, 13 and 15


def test_no_lines_without_log(make_context: Callable[..., Context], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llamamix")
    context = make_context(kv_mixed=SPEC)
    with Trace(context):
        decode_singly(context, 9)
    assert not any("[MIXED_CACHE" in r.getMessage() for r in caplog.records)
