"""Saved states: what comes back is what was saved, bit by bit, and nothing else ever does.

Whatever bytes are offered, they are read as the state that they are, or refused with a sentence and the cache is as it
was, rows and all.

LLAMAMIX_TEST_PROFILE=long tries fifty times as many; with -s the numbers are shown.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import raw
from helpers.by_hand import SHAPE, add, positions, snapshot
from helpers.tiny_model import random_tokens, write_tiny_model

from llamamix import CacheError, Context, ContextError, ContextFullError, KVMixedParams, MixedKVCache, Model
from llamamix import _ffi as bindings

MakeContext = Callable[..., Context]

MORE = 50 if os.environ.get("LLAMAMIX_TEST_PROFILE") == "long" else 1

N_SEQ = 3


#
# the format, read by other means
#


def checksum(parts: list[bytes]) -> int:
    """Of parts that follow each other."""
    h, whole = 0x78696D6B, b"".join(parts)
    for i in range(0, len(whole), 8):
        h = ((h ^ int.from_bytes(whole[i : i + 8], "little")) * 0x9E3779B97F4A7C15) % 2**64
        h ^= h >> 32
    return h


@dataclass
class Parts:
    """A state of a bare cache, as the fields that come before its rows."""

    fields: list[tuple[str, bytes]] = field(default_factory=list)
    rows: bytes = b""

    @classmethod
    def read(cls, state: bytes) -> Parts:
        parts, at = cls(), 0

        def take(name: str, size: int) -> int:
            nonlocal at
            parts.fields.append((name, state[at : at + size]))
            at += size
            return int.from_bytes(parts.fields[-1][1][:4], "little", signed=True)

        for name in ("magic", "version"):
            take(name, 4)
        n_stream = take("n_stream", 4)
        whole = take("whole", 4)
        take("on_device", 4)
        for tier in range(2):
            for _ in range(2 * take("n_layer", 4)):
                take("type", 4)
                take("row_size", 8)
            if tier == 1:
                take("n_rot_k", 8)
                take("n_rot_v", 8)
                page = take("page", 4)
            for _stream in range(n_stream):
                n, cells = take("n", 4), []
                take("head", 4)
                for _cell in range(n):
                    take("cell", 4)
                    take("pos", 4)
                    take("shift", 4)
                    take("ext", 12)
                    cells.append(int.from_bytes(parts.fields[-4][1], "little"))
                    if whole:
                        for _ in range(take("n_seqs", 4)):
                            take("seq", 4)
                if tier == 1 and page:
                    for _ in range(SHAPE["n_layer"] * len({cell // page for cell in cells})):
                        take("mean", 2 * SHAPE["n_head_kv"] * SHAPE["head_size_k"])
        parts.rows = state[at + 8 :]
        assert parts.write() == state  # the checksum is what it should be
        return parts

    def write(self) -> bytes:
        head, *rest = ([data for name, data in self.fields[i]] for i in (slice(0, 5), slice(5, None)))
        joined = [b"".join(head), *rest[0]]
        return b"".join(joined) + checksum(joined).to_bytes(8, "little") + self.rows


def damage(rng: np.random.Generator, state: bytes, other: bytes) -> bytes:
    """A state with bits flipped, bytes changed, cut, taken out, put in or doubled, or the end of another one."""
    n = len(state)
    i, j = sorted(int(x) for x in rng.integers(0, n, 2))
    kind = rng.integers(8)
    if kind == 0:
        flipped = bytearray(state)
        for at in rng.integers(0, n, rng.integers(1, 4)):
            flipped[at] ^= 1 << int(rng.integers(8))
        return bytes(flipped)
    if kind == 1:  # where numbers of cells and sequences are
        i = int(rng.integers(0, min(n, 400)))
        return state[:i] + rng.bytes(1) + state[i + 1 :]
    if kind == 2:
        i = int(rng.integers(0, n // 4)) * 4
        return state[:i] + struct.pack("<i", int(rng.choice([0, 1, -1, 7, 255, 2**31 - 1, -(2**31)]))) + state[i + 4 :]
    if kind == 3:
        return state[:i]
    if kind == 4:
        return state[:i] + state[j:]
    if kind == 5:
        return state[:i] + rng.bytes(int(rng.integers(1, 64))) + state[i:]
    if kind == 6:
        return state[:j] + state[i:]
    return state[:i] + other[i:]


#
# caches that are driven by hand
#


@pytest.fixture
def make() -> Iterator[Callable[..., MixedKVCache]]:
    caches = []

    def make(**options: object) -> MixedKVCache:
        caches.append(MixedKVCache(**({"hot": 8, "cold": "q4_0", "cold_size": 16, "sink": 1, "n_seq_max": N_SEQ} | SHAPE | options)))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


def filled(cache: MixedKVCache) -> MixedKVCache:
    """Tokens of all three sequences in both tiers, some shared, with free cells between them and a pending shift."""
    add(cache, 9, seq=0)
    add(cache, 5, seq=2)
    cache.seq_rm(0, 3, 5)
    if cache.n_stream == 1:
        cache.seq_cp(0, 1, 5, 9)
    else:
        cache.seq_cp(0, 1)
    cache.seq_add(2, 2, -1, 3)
    return cache


def check_sane(cache: MixedKVCache) -> None:
    """What holds in any cache, whatever it has been through."""
    ends: dict[int, list[int]] = {}
    for tier in (cache.hot, cache.cold):
        n = 0
        for stream in range(cache.n_stream):
            cells = tier.cells(stream)
            n += len(cells)
            assert len({c.index for c in cells}) == len(cells) <= tier.size
            for c in cells:
                assert 0 <= c.index < tier.size and c.pos >= 0 and c.seq_ids
                assert set(c.seq_ids) <= (set(range(N_SEQ)) if cache.n_stream == 1 else {stream})
                for seq in c.seq_ids:
                    ends.setdefault(seq, []).append(c.pos)
        assert n == tier.used
    for seq in range(N_SEQ):
        assert cache.seq_pos_min(seq) == min(ends.get(seq, [-1]))
        assert cache.seq_pos_max(seq) == max(ends.get(seq, [-1]))
    assert (cache.stats.hot_used, cache.stats.cold_used) == (cache.hot.used, cache.cold.used)


@pytest.mark.parametrize("seq_id", [None, 0, 2])
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_the_format(unified: bool, seq_id: int | None, make: Callable[..., MixedKVCache]) -> None:
    """It is what the other reader here takes it for."""
    cache = filled(make(unified=unified))
    parts = Parts.read(cache.state_save(seq_id))
    found = [struct.unpack("<i", data)[0] for name, data in parts.fields if name == "pos"]
    streams = range(1 if unified else N_SEQ) if seq_id is None else [0 if unified else seq_id]
    expected = [
        c.pos
        for tier in (cache.hot, cache.cold)
        for stream in streams
        for c in tier.cells(stream)
        if seq_id is None or seq_id in c.seq_ids
    ]
    assert found == expected and len(found) > 4


@pytest.mark.parametrize("seq_id", [None, 0, 2])
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_damaged_states_of_a_cache(unified: bool, seq_id: int | None, make: Callable[..., MixedKVCache]) -> None:
    source = filled(make(unified=unified))
    state = source.state_save(seq_id)
    add(source, 1, seq=1)
    other = source.state_save(seq_id)

    cache = make(unified=unified)
    add(cache, 2, seq=0)
    add(cache, 4, seq=1)
    add(cache, 9, seq=2)
    before, whole = snapshot(cache), cache.state_save()
    rng = np.random.default_rng(0)
    results: Counter[str] = Counter()
    for _ in range(1000 * MORE):
        bad = damage(rng, state, other)
        try:
            cache.state_load(bad, seq_id)
        except CacheError as error:
            assert len(str(error)) > 40
            results["damaged" if "checksum" in str(error) else "too short" if "early" in str(error) else "other"] += 1
            assert snapshot(cache) == before
            continue
        else:
            # it is the state after all, with something behind it
            assert bad[: len(state)] == state or bad[: len(other)] == other
            results["accepted"] += 1
        check_sane(cache)
        cache.state_load(whole)
        assert snapshot(cache) == before
    print(f"\nunified={unified} seq_id={seq_id}:", dict(results))
    assert min(results[kind] for kind in ("damaged", "too short", "other")) > 40


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_a_state_that_ends_anywhere_changes_nothing(unified: bool, make: Callable[..., MixedKVCache]) -> None:
    """Each length, into a cache where others have to move before there is room; a shift is pending in some of it."""
    options = {"unified": unified, "n_layer": 1, "n_head_kv": 1}
    source = make(**options)
    add(source, 13, seq=0)
    cache = make(**options)
    add(cache, 5, seq=0)
    add(cache, 7, seq=1)
    cache.seq_add(0, 1, -1, 2)
    cache.seq_add(1, 2, -1, 3)
    before = snapshot(cache)
    for seq_id in (None, 0):
        state = source.state_save(seq_id)
        for n in range(len(state)):
            with pytest.raises(CacheError):
                cache.state_load(state[:n], seq_id)
            assert snapshot(cache) == before
    cache.state_load(state, 0)
    assert sorted(sum(positions(cache, 0), [])) == list(range(13))


@pytest.mark.parametrize("seq_id", [None, 0])
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_any_fields_with_a_right_checksum(unified: bool, seq_id: int | None, make: Callable[..., MixedKVCache]) -> None:
    """Whoever writes the checksum, too, gets a cache that may not make sense, but is one."""
    state = filled(make(unified=unified)).state_save(seq_id)
    cache = make(unified=unified)
    rng = np.random.default_rng(1)
    results: Counter[str] = Counter()
    n_fields = len(Parts.read(state).fields)
    for trial in range(800 * MORE):
        parts = Parts.read(state)
        for _ in range(int(rng.integers(1, 4))):
            i = trial % n_fields if rng.random() < 0.5 else int(rng.integers(n_fields))
            name, data = parts.fields[i]
            values = [0, 1, 2, 3, 8, 17, 255, 256, -1, -2, 2**31 - 1, -(2**31), -(2**31) + 1, 2**30]
            new = struct.pack("<i", int(rng.choice(values)))
            kind = rng.integers(3)
            if kind == 0:
                parts.fields[i] = (name, new + data[4:])
            elif kind == 1:
                parts.fields[i] = (name, bytes([data[0] ^ (1 << int(rng.integers(8)))]) + data[1:])
            else:
                j = int(rng.integers(n_fields))
                parts.fields[i], parts.fields[j] = (name, (parts.fields[j][1] + data)[: len(data)]), parts.fields[j]
        cache.clear()
        add(cache, 2, seq=0)
        add(cache, 3, seq=1)
        before = snapshot(cache)
        try:
            cache.state_load(parts.write(), seq_id)
        except CacheError:
            results["refused"] += 1
            assert snapshot(cache) == before
        else:
            results["accepted"] += 1
            check_sane(cache)
            again = make(unified=unified)
            again.state_load(cache.state_save())  # what was taken can be saved
            assert again.state_save() == cache.state_save()
            for seq in range(N_SEQ):
                if cache.seq_pos_max(seq) < 1000 and len(positions(cache, seq)[0]) < 5:
                    add(cache, 2, seq)  # and goes on
            cache.seq_add(0, 0, -1, -1)
            check_sane(cache)
            again.close()
    print(f"\nunified={unified} seq_id={seq_id}:", dict(results))
    assert min(results.values()) > 100


def test_the_last_position_is_refused(make: Callable[..., MixedKVCache]) -> None:
    """There is none after it, for a token that comes next."""
    cache = make(unified=True)
    add(cache, 3)
    before = snapshot(cache)
    for pos, shift, good in ((2**31 - 2, 0, True), (2**31 - 1, 0, False), (2**31 - 1, 1, False)):
        parts = Parts.read(cache.state_save())
        names = [name for name, _ in parts.fields]
        last = max(i for i, name in enumerate(names) if name == "pos")
        parts.fields[last] = ("pos", struct.pack("<i", pos))
        parts.fields[last + 1] = ("shift", struct.pack("<i", shift))
        if good:
            other = make(unified=True)
            other.state_load(parts.write())
            assert other.seq_pos_max() == pos
        else:
            with pytest.raises(CacheError, match="a position of the state is out of range"):
                cache.state_load(parts.write())
            assert snapshot(cache) == before


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_every_bit_counts(unified: bool, make: Callable[..., MixedKVCache]) -> None:
    """A bit at each place of the state, rows included; a full cache of one layer."""
    options = {"unified": unified, "n_layer": 1, "n_head_kv": 1, "hot": 4, "cold_size": 4, "sink": 0}
    cache = make(**options)
    add(cache, 6)
    state = cache.state_save()
    cache = make(**options)
    add(cache, 5, seq=1)
    before = snapshot(cache)
    for i in range(len(state)):
        bad = bytearray(state)
        bad[i] ^= 1 << (i % 8)
        with pytest.raises(CacheError):
            cache.state_load(bytes(bad))
        assert snapshot(cache) == before
    cache.state_load(state)
    assert cache.state_save() == state


@pytest.mark.parametrize("seq_id", [None, 2])
def test_rows_of_a_refused_state_are_not_left_behind(seq_id: int | None, make: Callable[..., MixedKVCache]) -> None:
    """Attention reads free cells too, with no weight; but nothing times a row that is no number is no number."""
    cache = make(n_pad=8)
    add(cache, 12)
    bad = bytearray(cache.state_save(None if seq_id is None else 0))
    bad[-1] ^= 1  # the last checksum
    other = make(n_pad=8)
    add(other, 24, seq=1)
    other.seq_rm(1, 0, 15)
    other.seq_rm(1, 16, 23)  # one is left in each tier
    with pytest.raises(CacheError, match="damaged"):
        other.state_load(bytes(bad), seq_id)
    n_seen = 0
    for tier in (other.hot, other.cold):
        values = [get(layer).dequantize() for layer in range(2) for get in (tier.get_k, tier.get_v)]
        if tier is other.cold:
            for layer in range(2):  # all is in one page
                values[2 * layer] += other.cold.get_means(layer)[0, 0].astype(np.float32)
        for rows in values:
            # rows of sequence 1, and none of sequence 0, whose values are its positions (free cells of cold: the mean)
            assert np.isin(rows, [0, *np.arange(16, 40, 0.5)]).all()
            n_seen += rows.size // 64
    assert n_seen == 4 * 24


def test_a_sequence_that_does_not_fit_changes_nothing(make: Callable[..., MixedKVCache]) -> None:
    source = make()
    add(source, 20)
    state = source.state_save(0)
    cache = make()
    add(cache, 6, seq=1)
    add(cache, 3, seq=0)
    before = snapshot(cache)
    with pytest.raises(CacheError, match="no room for the 6 hot and 14 cold tokens of the state: hot=5/8, cold=4/16"):
        cache.state_load(state, 0)
    assert snapshot(cache) == before
    cache.seq_rm(1, 0, -1)
    cache.state_load(state, 0)
    assert positions(cache, 0) == positions(source, 0)


def test_hot_tokens_that_have_no_room_go_to_cold(make: Callable[..., MixedKVCache]) -> None:
    """The oldest but no sink, quantised as a migration does; what can not be read leaves the other sequence alone."""
    options = {"n_layer": 2, "n_head_kv": 1, "hot": 8, "cold_size": 16, "sink": 2, "threshold": 1.0, "mean": False}
    source = make(**options)
    add(source, 8)
    state = source.state_save(0)
    cache = make(**options)
    add(cache, 3, seq=1)
    cache.state_load(state, 0)
    assert positions(cache, 0) == ([0, 1, 4, 5, 6, 7], [2, 3]) and positions(cache, 1) == ([0, 1], [2])
    assert source.move_tokens_to_cold_cache(2) == 2  # the same ones

    def rows(cache: MixedKVCache, cold: bool, seq: int = 0) -> dict[int, list[bytes]]:
        tier = cache.cold if cold else cache.hot
        kept = [get(layer).data[0] for layer in range(2) for get in (tier.get_k, tier.get_v)]
        return {c.pos: [x[c.index].tobytes() for x in kept] for c in tier.cells() if seq in c.seq_ids}

    assert rows(cache, True) == rows(source, True) and rows(cache, False) == rows(source, False)

    # of 8 tokens of a state 2 are sinks, and so are 4 of the others: there is room, and when it has been used up there is none
    cache = make(**options | {"cold_size": 4})
    add(cache, 3, seq=1)
    add(cache, 2, seq=2)
    before = snapshot(cache)
    with pytest.raises(CacheError, match="no room for the 8 hot and 0 cold tokens of the state: hot=5/8, cold=0/4"):
        cache.state_load(state, 0)
    assert snapshot(cache) == before
    cache = make(**options)
    add(cache, 3, seq=1)
    add(cache, 3, seq=2)
    others = [rows(cache, cold=False, seq=seq)[0] for seq in (1, 2)]
    bad = bytearray(state)
    bad[-20] ^= 1  # in the rows
    with pytest.raises(CacheError, match="damaged"):
        cache.state_load(bytes(bad), 0)
    assert positions(cache, 0) == ([], [])
    assert [rows(cache, cold=False, seq=seq)[0] for seq in (1, 2)] == others
    cache.state_load(state, 0)
    assert positions(cache, 0) == ([0, 1, 6, 7], [2, 3, 4, 5])


#
# contexts
#

SHAPES = {"hot": 48, "group": 12, "sink": 4}


def contexts_params(unified: bool, cold: str = "q4_0") -> dict[str, Any]:
    return {
        "n_ctx": 512 if unified else 512 * 2,
        "n_seq_max": 2,
        "kv_unified": unified,
        "n_ubatch": 32,
        "kv_mixed": KVMixedParams(**SHAPES, cold=cold),
    }


def used(context: Context) -> Context:
    """Two sequences, with migrations, tokens that are gone, and rows whose shift is pending."""
    context.decode(random_tokens(190), seq_id=0)
    context.decode(random_tokens(70, 1), seq_id=1)
    context.memory.seq_rm(0, 150, -1)
    context.decode(random_tokens(9, 2), seq_id=0)
    context.memory.seq_rm(0, 20, 60)
    context.memory.seq_add(0, 60, -1, -40)
    return context


def goes_on(context: Context, n: int = 30) -> list[np.ndarray]:
    """Logits of both sequences: single tokens, and a batch that makes tokens move."""
    logits = []
    for i in range(n):
        context.decode_batch(random_tokens(2, i), [0, 1])
        logits.append(context.logits)
    context.decode(random_tokens(60, 7), seq_id=1, logits="all")
    return [*logits, context.logits]


@pytest.mark.parametrize("cold", ["q4_0", "f16"])
@pytest.mark.parametrize("flash_attn", ["on", "off"])
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("way", ["memory", "file", "bindings"])
def test_a_restored_context_goes_on_bit_by_bit(
    way: str, unified: bool, flash_attn: str, cold: str, make_context: MakeContext, tmp_path: Path
) -> None:
    params = contexts_params(unified, cold) | {"flash_attn": flash_attn}
    first, second = used(make_context(**params)), make_context(**params)
    second.decode(random_tokens(100, 5), seq_id=1)  # makes way
    n_migrations = first.stats.n_migrations
    if way == "memory":
        state = raw.state_get(first)
        assert raw.state_set(second, state) == (len(state), "")
    elif way == "file":
        tokens = random_tokens(12).astype(np.int32)
        path = str(tmp_path / "state").encode()
        got, n = raw.ffi.new("int32_t[20]"), raw.ffi.new("size_t *")
        with raw.pointer(first) as ctx:
            assert raw.lib.llama_state_save_file(ctx, path, raw.ffi.from_buffer("int32_t[]", tokens), len(tokens))
        with raw.pointer(second) as ctx:
            assert raw.lib.llama_state_load_file(ctx, path, got, 20, n)
        assert list(got)[: n[0]] == tokens.tolist()
    else:
        second.state_load(first.state_save())
    assert raw.state_get(second) == raw.state_get(first)
    for a, b in zip(goes_on(first), goes_on(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.stats.n_migrations > n_migrations


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("way", ["memory", "partial", "device", "file"])
def test_a_restored_sequence_goes_on_bit_by_bit(
    way: str, unified: bool, make_context: MakeContext, tmp_path: Path
) -> None:
    """In place of itself, after it went on: as if that had never been. Others do not notice."""
    context, twin = (used(make_context(**contexts_params(unified))) for _ in range(2))
    flags = {"partial": raw.PARTIAL_ONLY, "device": raw.ON_DEVICE}.get(way, 0)
    path = str(tmp_path / "state").encode()
    if way == "file":
        with raw.pointer(context) as ctx:
            size = raw.lib.llama_state_seq_save_file(ctx, path, 0, raw.ffi.NULL, 0)
            assert size == os.path.getsize(path)
    else:
        state = raw.state_get(context, 0, flags)
        assert way != "device" or len(state) < 5000  # without the rows
    # what follows moves nothing: cells that the sequence had are free when it comes back
    for token in random_tokens(5, 3):
        context.decode([token], seq_id=0)
    assert context.stats.n_migrations == twin.stats.n_migrations
    if way == "file":
        n = raw.ffi.new("size_t *")
        with raw.pointer(context) as ctx:
            assert raw.lib.llama_state_seq_load_file(ctx, path, 0, raw.ffi.new("int32_t[1]"), 1, n) == size
    else:
        assert raw.state_set(context, state, 0, flags)[0] == len(state)
    # (where the search for cells goes on is not the same when other sequences are there)
    for a, b in zip(*(logits_of(c, 0) for c in (context, twin)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_the_state_of_a_sequence_is_its_own(unified: bool, make_context: MakeContext) -> None:
    """What becomes of other sequences does not change it."""
    context = used(make_context(**contexts_params(unified)))
    for seq_id in range(1, context.n_seq_max):
        before = context.state_save(seq_id)
        context.memory.seq_rm(seq_id - 1)
        assert context.state_save(seq_id) == before
        context.decode(random_tokens(5, 3), seq_id=seq_id - 1)
        assert context.state_save(seq_id) == before


def logits_of(context: Context, seq: int) -> list[np.ndarray]:
    context.decode([7], seq_id=seq)
    return [context.logits]


def test_a_copy_on_the_device_is_no_state_for_others(make_context: MakeContext) -> None:
    context = used(make_context(**contexts_params(True)))
    state = raw.state_get(context, 0, raw.ON_DEVICE)
    n, reason = raw.state_set(context, state, 0)
    assert n == 0 and "the rows of the state were left on the device" in reason
    assert context.memory.seq_pos_max(0) == 118


def test_rows_on_the_device_are_those_of_the_last_state(make_context: MakeContext) -> None:
    """There is one copy for each sequence: a state whose rows made way for others is refused, and nothing changed."""
    context = used(make_context(**contexts_params(True)))
    first, other = raw.state_get(context, 0, raw.ON_DEVICE), raw.state_get(context, 1, raw.ON_DEVICE)
    context.memory.seq_rm(0, 100, 110)
    with raw.pointer(context) as ctx:  # a size is no state
        raw.lib.llama_state_seq_get_size_ext(ctx, 0, raw.ON_DEVICE)
    assert raw.state_set(context, first, 0, raw.ON_DEVICE)[0] == len(first)
    context.memory.seq_rm(0, 100, 110)
    second = raw.state_get(context, 0, raw.ON_DEVICE)
    before = raw.state_get(context)
    n, reason = raw.state_set(context, first, 0, raw.ON_DEVICE)
    assert n == 0 and "another state was left there since" in reason
    assert raw.state_get(context) == before
    for state, seq in ((second, 0), (other, 1)):
        assert raw.state_set(context, state, seq, raw.ON_DEVICE)[0] == len(state)
        assert raw.state_get(context) == before


@pytest.mark.parametrize("seq_id", [None, 0])
def test_a_size_is_told_without_a_look_at_the_rows(seq_id: int | None, make_context: MakeContext) -> None:
    """Programs ask for it often. By both interfaces, and it is the size that the state has."""
    context = used(make_context(**contexts_params(True)))
    summed = raw.lib.llama_kv_mixed_state_bytes_summed
    before = summed()
    with raw.pointer(context) as ctx:
        if seq_id is None:
            size = raw.lib.llama_state_get_size(ctx)
        else:
            size = raw.lib.llama_state_seq_get_size_ext(ctx, seq_id, 0)
            raw.lib.llama_state_seq_get_size_ext(ctx, seq_id, raw.ON_DEVICE)
    with MixedKVCache.from_context(context) as cache, cache._handle as pointer:
        number = -1 if seq_id is None else seq_id
        size_cache = bindings.lib.llama_kv_mixed_cache_state_get(pointer, number, bindings.ffi.NULL, 0)
    assert summed() == before
    assert len(raw.state_get(context, seq_id)) == size
    one_state = summed() - before
    assert size > one_state > 0.99 * size  # all but upstream's header and the checksums
    with MixedKVCache.from_context(context) as cache:
        assert len(cache.state_save(seq_id)) == size_cache
    assert summed() - before == 2 * one_state  # each state is made once


@pytest.mark.parametrize("seq_id", [None, 0])
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_damaged_states_of_a_context(unified: bool, seq_id: int | None, make_context: MakeContext) -> None:
    context = used(make_context(**contexts_params(unified)))
    state = raw.state_get(context, seq_id)
    good = raw.state_get(context)
    context.decode([9], seq_id=0)
    other = raw.state_get(context, seq_id)
    raw.state_set(context, good)
    expected = goes_on(context, 3)
    raw.state_set(context, good)

    rng = np.random.default_rng(3)
    results: Counter[str] = Counter()
    # libllama takes memory for the length of the architecture's name, whatever it is: four bytes that are left alone.
    # A sequence's state begins with a number and the sequence that it was, which is not looked at.
    n_kept = 4 if seq_id is None else 0
    for _ in range(250 * MORE):
        bad = state[:n_kept] + damage(rng, state[n_kept:], other[n_kept:])
        n, reason = raw.state_set(context, bad, seq_id)
        if n == 0:
            assert len(reason) > 10
            results["refused"] += 1
            assert raw.state_get(context) == good
        else:
            results["accepted"] += 1
            assert bad[: len(state)] == state or bad[:n][8:] in (state[8:], other[8:]) or bad[: len(other)] == other
            raw.state_set(context, good)
    print(f"\nunified={unified} seq_id={seq_id}:", dict(results))
    assert results["refused"] > 200
    raw.state_set(context, good)
    for a, b in zip(goes_on(context, 3), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seq_id", [None, 0])
def test_damaged_files(seq_id: int | None, make_context: MakeContext, tmp_path: Path) -> None:
    context = used(make_context(**contexts_params(True)))
    path = tmp_path / "state"
    name = str(path).encode()
    tokens = raw.ffi.new("int32_t[4]", [1, 2, 3, 4])
    n = raw.ffi.new("size_t *")

    def load() -> int:
        with raw.pointer(context) as ctx:
            if seq_id is None:
                return raw.lib.llama_state_load_file(ctx, name, tokens, 4, n)
            return raw.lib.llama_state_seq_load_file(ctx, name, 0, tokens, 4, n)

    with raw.pointer(context) as ctx:
        if seq_id is None:
            assert raw.lib.llama_state_save_file(ctx, name, tokens, 4)
        else:
            assert raw.lib.llama_state_seq_save_file(ctx, name, 0, tokens, 4)
    good = path.read_bytes()
    before = raw.state_get(context)
    rng = np.random.default_rng(4)
    n_kept = 32 if seq_id is None else 28  # libllama's own headers and the tokens
    n_refused = 0
    for _ in range(150 * MORE):
        bad = good[:n_kept] + damage(rng, good[n_kept:], good[n_kept:])
        path.write_bytes(bad)
        accepted = bool(load())
        n_refused += not accepted
        assert not accepted or bad[: len(good)] == good
        assert raw.state_get(context) == before
    assert n_refused > 100
    path.write_bytes(good)
    assert load() and context.memory.seq_pos_max(0) == 118


def test_states_of_other_contexts(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with the reason, and the cache is as it was."""
    params = contexts_params(True)
    context = used(make_context(**params))
    before = raw.state_get(context)

    def refused(other: Context, reason: str) -> None:
        other.decode(random_tokens(200), seq_id=0)
        with pytest.raises(ContextError, match=f"can not be loaded: .*{reason}"):
            context.state_load(other.state_save())
        with pytest.raises(ContextError, match=f"can not be loaded: .*{reason}"):
            context.state_load(other.state_save(0), 0)
        assert raw.state_get(context) == before

    shape = params["kv_mixed"]
    refused(
        make_context(n_ctx=512, kv_mixed=KVMixedParams(**SHAPES, cold="q8_0")),
        "cold K rows of type q8_0 and 136 bytes in layer 0",
    )
    refused(make_context(n_ctx=512, kv_mixed=KVMixedParams(**SHAPES | {"hot": 200})), "hot=48 has no room for them")
    refused(make_context(n_ctx=512, kv_mixed=shape, type_v="f32"), "hot V rows of type f32 and 512 bytes")
    refused(make_context(n_ctx=512, kv_mixed=False), "not the state of a mixed KV cache: it was saved without")
    for changes, reason in (
        ({"n_layer": 3}, "3 layers, this cache has 2"),
        ({"n_head_kv": 4}, "hot K rows of type f16 and 512 bytes in layer 0, this cache has f16 and 256"),
        ({"head_size": 32}, "hot K rows of type f16 and 128 bytes"),
    ):
        with Model(write_tiny_model(tmp_path / "other.gguf", **changes)) as model:
            refused(make_context(model, n_ctx=512, kv_mixed=shape), reason)

    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    refused(
        make_context(n_ctx=512, kv_mixed=shape),
        r"cold rows rotated in blocks of 0 \(K\) and 0 \(V\) values, this cache has 64 and 64 .* LLAMA_ATTN_ROT_DISABLE",
    )

    # and the other way round: upstream's plain cache has a word for it as well
    plain = make_context(n_ctx=512)
    for seq_id in (None, 0):
        with pytest.raises(ContextError, match="can not be loaded: (n_stream mismatch|failed to restore kv cache)"):
            plain.state_load(context.state_save(seq_id), seq_id)
    plain.decode([5])


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_a_context_that_fits_in_hot(unified: bool, make_context: Callable[..., Context]) -> None:
    """It has no cold and takes what a plain cache does; its states go to larger ones and, with nothing cold, back."""
    params = {"n_seq_max": 2, "kv_unified": unified, "kv_mixed": "1"}
    small = make_context(n_ctx=512 if unified else 1024, **params)
    stats = small.stats
    assert stats.cold_size == stats.bytes_cold == 0
    assert (stats.type_cold_k, stats.type_cold_v) == ("iq4_nl", "iq4_nl")
    assert stats.bytes_total == stats.bytes_plain
    cache = MixedKVCache.from_context(small)
    assert (cache.cold.size, cache.cold.used, cache.cold.cells()) == (0, 0, [])
    assert cache.cold.get_k(1).ne == (64, 2, 0, small.stats.n_stream)

    small.decode(random_tokens(500), seq_id=1)
    for token in random_tokens(12, 1):
        small.decode([token], seq_id=1)
    assert (small.stats.hot_used, small.stats.n_migrations) == (512, 0)
    with pytest.raises(ContextFullError):
        small.decode([5], seq_id=0 if unified else 1)

    large = make_context(n_ctx=2048 if unified else 4096, **params)
    for seq in (1, None):
        state = small.state_save(seq)
        large.state_load(state, seq)
        assert large.stats.hot_used == 512 and large.memory.seq_pos_max(1) == 511
        for s in (large.state_save(seq), state):
            small.memory.clear()
            small.state_load(s, seq)
            assert small.state_save(seq) == state
    large.decode([5], seq_id=1)
    small.memory.clear()
    large.decode(random_tokens(50), seq_id=1)
    with pytest.raises(ContextError, match="cold tokens, cold_size=0 has no room for them"):
        small.state_load(large.state_save(1), 1)
