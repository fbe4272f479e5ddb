"""The means of K: what pages of cold take them from, where they go, and what becomes of them.

Caches driven by hand: rows are known, so every bit is. Elsewhere: attention (test_attention.py, test_quantised.py), caches
driven at random (test_cache_machine.py), devices (test_device_cache.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.by_hand import find, positions, snapshot
from helpers.rows import rotation, steps
from helpers.tiny_model import random_tokens, write_tiny_model

from llamamix import CacheError, Context, KVMixedParams, MixedKVCache, Model, ParamsError
from llamamix.params import PAGE

N_LAYER, N_HEAD, HEAD = 2, 2, 32
Make = Callable[..., MixedKVCache]


@pytest.fixture
def make() -> Iterator[Make]:
    caches = []

    def make(**options: Any) -> MixedKVCache:
        shape = {"n_layer": N_LAYER, "n_head_kv": N_HEAD, "head_size_k": HEAD, "n_seq_max": 3, "type_k": "f32"}
        options = {"hot": 64, "cold": "q4_0", "cold_size": 3 * PAGE, "sink": 0, "group": 16, "threshold": 1.0} | shape | options
        caches.append(MixedKVCache(**options))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


def row(seq: int, pos: int, layer: int) -> np.ndarray:
    """K of a token: a part that all have, which the mean takes out, and its own."""
    rng = np.random.default_rng([seq, pos, layer])
    return (4 * np.sin(np.arange(N_HEAD * HEAD) + layer) + rng.normal(size=N_HEAD * HEAD)).astype(np.float32)


def add(cache: MixedKVCache, n: int, seq: int = 0) -> None:
    stream = seq if cache.n_stream > 1 else 0
    for _ in range(n):
        pos = cache.seq_pos_max(seq) + 1
        (cell,) = find(cache, [(pos, seq)])
        cache.commit()
        for layer in range(N_LAYER):
            k = row(seq, pos, layer).reshape(1, N_HEAD, HEAD)
            cache.hot.set_k(layer, cell, k, stream)
            cache.hot.set_v(layer, cell, k[..., ::-1], stream)


def move(cache: MixedKVCache, n: int, stream: int = 0) -> None:
    assert cache.move_tokens_to_cold_cache(n, stream) == n


def mean_of(tokens: list[tuple[int, int]], layer: int) -> np.ndarray:
    """Of (sequence, position) in the order in which they moved, as the library sums them."""
    total = np.zeros(N_HEAD * HEAD, np.float32)
    for seq, pos in tokens:
        total = total + row(seq, pos, layer)
    return (total / np.float32(len(tokens))).astype(np.float16)


def cold_at(cache: MixedKVCache, seq: int = 0) -> dict[int, int]:
    """Cells of cold by position."""
    return {c.pos: c.index for c in cache.cold.cells(seq if cache.n_stream > 1 else 0) if seq in c.seq_ids}


def check_page(
    cache: MixedKVCache, page: int, opened: list[tuple[int, int]], tokens: list[tuple[int, int]], stream: int = 0
) -> None:
    """The page has the mean of the tokens that opened it, and these tokens are stored less that, every bit."""
    for layer in range(N_LAYER):
        mean = mean_of(opened, layer)
        np.testing.assert_array_equal(cache.cold.get_means(layer, stream)[0, page].ravel(), mean)
        stored = cache.cold.get_k(layer, stream).data[0]
        for seq, pos in tokens:
            cell = cold_at(cache, seq)[pos]
            assert cell // PAGE == page
            expected = steps("q4_0", row(seq, pos, layer) - mean.astype(np.float32))
            np.testing.assert_array_equal(stored[cell].reshape(-1, 18), expected)


def of(seq: int, positions: range) -> list[tuple[int, int]]:
    return [(seq, pos) for pos in positions]


def test_a_page_has_the_mean_of_those_that_came_first(make: Make) -> None:
    cache = make()
    add(cache, 48)
    move(cache, 10)
    check_page(cache, 0, of(0, range(10)), of(0, range(10)))
    move(cache, 16)  # these are stored less the mean that is there
    check_page(cache, 0, of(0, range(10)), of(0, range(26)))
    assert cache.cold.n_page == 3 and cache.hot.n_page == 0
    assert not cache.cold.get_means(0)[0, 1:].any()


def test_a_migration_that_goes_on_in_the_next_page(make: Make) -> None:
    cache = make()
    add(cache, 124 + 50)
    while len(positions(cache)[1]) < 124:
        move(cache, min(16, 124 - len(positions(cache)[1])))
    move(cache, 14)
    check_page(cache, 0, of(0, range(16)), of(0, range(128)))
    check_page(cache, 1, of(0, range(128, 138)), of(0, range(128, 138)))


@pytest.mark.parametrize("how", ["seq_rm", "clear", "seq_keep"])
def test_an_empty_page_forgets(how: str, make: Make) -> None:
    cache = make()
    add(cache, 40)
    move(cache, 8)
    if how == "seq_rm":
        cache.seq_rm(0, 0, 8)
    elif how == "clear":
        cache.clear()
    else:
        add(cache, 1, seq=1)
        cache.seq_keep(1)
    assert cold_at(cache) == {}
    seq = 1 if how == "seq_keep" else 0
    add(cache, 20, seq)
    first = 8 if how == "seq_rm" else 0
    move(cache, 12)
    check_page(cache, 0, of(seq, range(first, first + 12)), of(seq, range(first, first + 12)))


def test_a_page_with_holes_keeps_its_mean(make: Make) -> None:
    cache = make()
    add(cache, 60)
    move(cache, 16)
    cache.seq_rm(0, 0, 15)  # one is left
    move(cache, 16)
    check_page(cache, 0, of(0, range(16)), of(0, range(15, 32)))


def test_sequences_share_a_page(make: Make) -> None:
    cache = make()
    add(cache, 12)
    add(cache, 20, seq=1)
    move(cache, 8)  # those furthest behind the end of their sequence
    first = of(1, range(8))
    assert (cold_at(cache), list(cold_at(cache, 1))) == ({}, list(range(8)))
    move(cache, 12)
    both = of(0, range(len(cold_at(cache)))) + of(1, range(len(cold_at(cache, 1))))
    assert len(both) == 20 and len(cold_at(cache)) > 0
    check_page(cache, 0, first, both)


def test_streams_have_pages_of_their_own(make: Make) -> None:
    cache = make(unified=False, n_seq_max=2)
    for seq in (0, 1):
        add(cache, 20, seq)
        move(cache, 9 + seq, seq)
    for seq in (0, 1):
        check_page(cache, 0, of(seq, range(9 + seq)), of(seq, range(9 + seq)), stream=seq)
    cache.seq_rm(1)
    cache.seq_cp(0, 1)
    for layer in range(N_LAYER):
        a, b = cache.cold.get_means(layer)
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(*cache.cold.get_k(layer).data)


def test_rows_that_are_no_numbers_stay_by_themselves(make: Make) -> None:
    """A page's mean is that of numbers: else all of its rows would be lost with one."""
    cache = make()
    add(cache, 30)
    bad = np.full((1, N_HEAD, HEAD), np.nan, np.float32)
    bad[0, 0, :5] = [np.inf, -np.inf, 1e30, 2, 3]
    (cell,) = [c.index for c in cache.hot.cells() if c.pos == 3]
    cache.hot.set_k(0, cell, bad)
    move(cache, 8)
    means = cache.cold.get_means(0)[0, 0]
    assert np.isfinite(means).all()
    np.testing.assert_array_equal(means[0, 5:], 0)  # no mean at all where one is no number
    stored = cache.cold.get_k(0).dequantize()[0]
    for pos in set(range(8)) - {3}:
        value = stored[cold_at(cache)[pos]].ravel() + means.ravel()
        # Q4_0 is off by a step at most, an eighth of the largest value of a block
        assert np.abs(value - row(0, pos, 0)).max() <= 8 / 8


def test_a_copy_that_fails_changes_no_page_in_use(make: Make) -> None:
    from helpers import raw

    cache = make()
    add(cache, 40)
    move(cache, 8)
    raw.fail_moves(cache, 1)
    assert cache.move_tokens_to_cold_cache(8) == 0
    move(cache, 8)
    check_page(cache, 0, of(0, range(8)), of(0, range(16)))

    cache = make()
    add(cache, 40)
    raw.fail_moves(cache, 1)
    assert cache.move_tokens_to_cold_cache(8) == 0
    cache.seq_rm(0, 0, 4)  # others are the first now
    move(cache, 8)
    check_page(cache, 0, of(0, range(4, 12)), of(0, range(4, 12)))


@pytest.mark.parametrize("options", [{"mean": False}, {"cold_k": "f16"}, {"cold_k": "f32"}, {"cold_k": "bf16"}])
def test_without_means(options: dict[str, Any], make: Make) -> None:
    """Rows are as ggml has them, and no memory is taken."""
    cache = make(**options)
    assert cache.cold.n_page == 0
    cells = cache.stats.cold_size * N_LAYER
    assert cache.stats.bytes_cold == cells * (cache.cold.row_size_k + cache.cold.row_size_v)
    for call in (lambda: cache.cold.get_means(0), lambda: cache.hot.get_means(0)):
        with pytest.raises(ParamsError, match="no means"):
            call()
    if options == {"mean": False}:
        add(cache, 20)
        move(cache, 8)
        stored = cache.cold.get_k(1).data[0]
        for pos, cell in cold_at(cache).items():
            np.testing.assert_array_equal(stored[cell].reshape(-1, 18), steps("q4_0", row(0, pos, 1)))


def test_means_are_read_and_written(make: Make) -> None:
    cache = make()
    values = np.random.default_rng(0).normal(size=(2, N_HEAD, HEAD)).astype(np.float16)
    cache.cold.set_means(1, 1, values)
    np.testing.assert_array_equal(cache.cold.get_means(1)[0, 1:], values)
    assert not cache.cold.get_means(1)[0, 0].any() and not cache.cold.get_means(0).any()
    before = snapshot(cache)
    for error, call in {
        "page must be": lambda: cache.cold.set_means(0, 2, values),
        "means must be of shape": lambda: cache.cold.set_means(0, 0, values[..., 1:]),
        "there is no such layer": lambda: cache.cold.set_means(2, 0, values),
        "stream must be": lambda: cache.cold.get_means(0, 1),
    }.items():
        with pytest.raises(ParamsError, match=error):
            call()
    assert snapshot(cache) == before


#
# states
#


def with_two_pages(make: Make, **options: Any) -> MixedKVCache:
    """Sequence 0 in pages 0 and 1, from the midst of each on, and some of sequence 1 before it in page 0."""
    cache = make(**options)
    add(cache, 16, seq=1)
    move(cache, 16)
    add(cache, 60)
    for _ in range(9):
        move(cache, 16)
        add(cache, 16)
    cache.seq_rm(0, 96, 112)  # a hole across pages
    return cache


def rows_of(cache: MixedKVCache, seq: int = 0) -> dict[int, list[bytes]]:
    """The bytes of all rows of cold, and of the means of their pages, by position."""
    stream = seq if cache.n_stream > 1 else 0
    tensors = [get(layer, stream).data[0] for layer in range(N_LAYER) for get in (cache.cold.get_k, cache.cold.get_v)]
    means = [cache.cold.get_means(layer, stream)[0] for layer in range(N_LAYER)]
    return {
        pos: [t[cell].tobytes() for t in tensors] + [m[cell // PAGE].tobytes() for m in means]
        for pos, cell in cold_at(cache, seq).items()
    }


def values_of(cache: MixedKVCache, layer: int, seq: int = 0) -> dict[int, np.ndarray]:
    stream = seq if cache.n_stream > 1 else 0
    k, means = cache.cold.get_k(layer, stream).dequantize()[0], cache.cold.get_means(layer, stream)[0]
    return {pos: (k[cell] + means[cell // PAGE]).ravel() for pos, cell in cold_at(cache, seq).items()}


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("seq_id", [None, 0])
def test_a_state_has_them(seq_id: int | None, unified: bool, make: Make) -> None:
    cache = with_two_pages(make) if unified else None
    if cache is None:
        cache = make(unified=False)
        add(cache, 60)
        for _ in range(9):
            move(cache, 16)
            add(cache, 16)
    state = cache.state_save(seq_id)
    other = make(unified=unified)
    other.state_load(state, seq_id)
    assert rows_of(other) == rows_of(cache) and len(rows_of(cache)) > 100
    if seq_id is None:
        assert other.state_save() == state
    other.state_load(state, seq_id)  # over itself
    assert rows_of(other) == rows_of(cache)


def test_a_sequence_goes_to_pages_that_are_free(make: Make) -> None:
    """Page 0 has tokens of another sequence, with another mean: the page moves as a whole, bit for bit."""
    cache = with_two_pages(make)
    state = cache.state_save(0)
    other = make()
    add(other, 40, seq=2)
    move(other, 5)
    other.state_load(state, 0)
    assert {c // PAGE for c in cold_at(other).values()} == {1, 2}
    assert {c // PAGE for c in cold_at(other, 2).values()} == {0}
    assert rows_of(other) == rows_of(cache)


def test_a_sequence_comes_back_to_pages_that_others_have_too(make: Make) -> None:
    cache = with_two_pages(make)
    before, cells, others = rows_of(cache), cold_at(cache), rows_of(cache, 1)
    state = cache.state_save(0)
    cache.seq_rm(0)
    cache.state_load(state, 0)
    assert rows_of(cache) == before and cold_at(cache) == cells and rows_of(cache, 1) == others
    # as another sequence: its pages are taken, one is free
    cache.seq_rm(1)
    cache.state_load(state, 2)
    first = [pos for pos, cell in cells.items() if cell // PAGE == 0]
    assert {cold_at(cache, 2)[pos] for pos in first} == {cells[pos] + 2 * PAGE for pos in first}
    now = rows_of(cache, 2)
    assert all(now[pos] == before[pos] for pos in first) and now.keys() == before.keys()
    assert before.items() <= rows_of(cache).items()


def test_a_sequence_that_finds_no_free_page_is_rounded_again(make: Make) -> None:
    """It goes to cold as hot tokens do. Nothing is lost but what rounding takes, and the others stay bit for bit."""
    cache = with_two_pages(make)
    state = cache.state_save(0)
    other = make()
    add(other, 40, seq=1)
    for _ in range(17):  # tokens in all pages
        move(other, 16)
        add(other, 16, seq=1)
    for p0 in (3, 130):
        other.seq_rm(1, p0, p0 + 120)
    assert len(cold_at(cache)) <= other.cold.size - other.cold.used
    before = rows_of(other, 1)
    assert {cell // PAGE for cell in cold_at(other, 1).values()} == {0, 1, 2}
    other.state_load(state, 0)
    assert before.items() <= rows_of(other, 1).items()
    for layer in range(N_LAYER):
        was, now = values_of(cache, layer), values_of(other, layer)
        assert now.keys() == was.keys()
        for pos, value in was.items():
            # what is left without the mean is less than 5 in size, so that a step is less than 5 / 8
            assert np.abs(now[pos] - value).max() < 5 / 8 + 2**-8
    # V is rounded again too, from rows that Q4_0 has exactly: what was the largest stays so
    v = [c.cold.get_v(0).dequantize()[0] for c in (cache, other)]
    for pos, cell in cold_at(cache).items():
        np.testing.assert_allclose(v[1][cold_at(other)[pos]], v[0][cell], rtol=0, atol=2**-8)


@pytest.mark.parametrize(("saved", "loaded"), [(True, False), (False, True)])
def test_a_state_of_a_cache_without_them_is_refused(saved: bool, loaded: bool, make: Make) -> None:
    source, cache = make(mean=saved), make(mean=loaded)
    add(source, 30)
    move(source, 10)
    add(cache, 9)
    before = snapshot(cache)
    with pytest.raises(CacheError, match=f"its mean={'on' if loaded else 'off'} must be that of the cache"):
        cache.state_load(source.state_save())
    assert snapshot(cache) == before


def test_a_damaged_state_leaves_them(make: Make) -> None:
    cache = with_two_pages(make)
    state = bytearray(cache.state_save(0))
    state[-20] ^= 1  # in the rows: all else is in place by then
    cache.seq_rm(0, 0, 20)
    before = snapshot(cache), rows_of(cache), [cache.cold.get_means(layer).tobytes() for layer in range(N_LAYER)]
    with pytest.raises(CacheError, match="damaged"):
        cache.state_load(bytes(state), 0)
    assert (snapshot(cache), rows_of(cache)) == before[:2]
    for layer in range(N_LAYER):
        used = sorted({cell // PAGE for cell in cold_at(cache).values()})
        now = cache.cold.get_means(layer)
        then = np.frombuffer(before[2][layer], np.float16).reshape(now.shape)
        np.testing.assert_array_equal(now[0, used], then[0, used])


#
# positions shift
#


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", n_layer=1)) as model:
        yield model


def turn(x: np.ndarray, delta: np.ndarray | int, freq_base: float = 10000.0) -> np.ndarray:
    """Rows [n, n_head, head] as at positions further on, in float64; pairs (0, 1), (2, 3), ..."""
    n = x.shape[-1]
    theta = np.asarray(delta, np.float64).reshape(-1, 1, 1) * freq_base ** (-2 * np.arange(n // 2) / n)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = [even * np.cos(theta) - odd * np.sin(theta), even * np.sin(theta) + odd * np.cos(theta)]
    return np.stack(turned, axis=-1).reshape(x.shape)


@pytest.mark.parametrize("cold", ["q4_0", "q8_0"])
def test_the_mean_turns_with_its_rows(cold: str, model: Model) -> None:
    """Where all tokens of a page move as far. Where some stay, or move less far, it stays as it is, and so do their rows."""
    params = KVMixedParams(hot=64, group=16, sink=0, cold=cold)
    with Context(model, n_ctx=1024, n_threads=1, type_k="f32", type_v="f32", flash_attn="off", kv_mixed=params) as context:
        context.decode(random_tokens(450))
        cache = MixedKVCache.from_context(context)
        n_head, head = cache.cold.n_head_kv, cache.cold.head_size_k
        rot = rotation(head & -head, head)

        def values() -> tuple[dict[int, int], np.ndarray, np.ndarray, np.ndarray]:
            """Cells by position, rows as they are stored, means, and both together."""
            rows = cache.cold.get_k(0).dequantize()[0].astype(np.float64)
            means = cache.cold.get_means(0)[0].astype(np.float64)
            return cold_at(cache), rows, means, rows + np.repeat(means, PAGE, axis=0)[: len(rows)]

        cells, rows, means, both = values()
        assert len(cells) > 2.5 * PAGE and [cells[p] // PAGE for p in (100, 200, 300)] == [0, 1, 2]
        raw = cache.cold.get_k(0).data[0]
        context.memory.seq_rm(0, 150, 160)
        context.memory.seq_add(0, 160, -1, -10)
        context.decode([5])
        cells_now, rows_now, means_now, both_now = values()

        # page 0: nothing moves; page 1: a part; page 2: all
        np.testing.assert_array_equal(means_now[:2], means[:2])
        expected = turn(means[2:3] @ rot, -10) @ rot
        # F16 has 11 bits: half of the last one of values up to 8
        assert np.abs(means_now[2] - expected[0]).max() < 2**-9 + 1e-5 and np.abs(means_now[2] - means[2]).max() > 0.05

        for pos in range(150):
            np.testing.assert_array_equal(cache.cold.get_k(0).data[0][cells_now[pos]], raw[cells[pos]])
        error = {1: [], 2: []}
        for pos in range(160, 380):
            cell = cells[pos]
            assert cells_now[pos - 10] == cell
            wanted = turn(both[cell : cell + 1] @ rot, -10)[0] @ rot
            largest = np.abs(wanted - means_now[cell // PAGE]).max()
            # rounded again: by a step at most, and what F16 takes from the mean
            assert np.abs(both_now[cell] - wanted).max() < largest / {"q4_0": 8, "q8_0": 127}[cold] * 1.02 + 2**-9
            error[cell // PAGE].append(np.abs(both_now[cell] - wanted).mean())
        # that a mean turns is for this: what is left without it stays small
        kept = means[2] - (turn(both[cells[300] : cells[300] + 1] @ rot, -10)[0] @ rot)
        assert np.abs(kept).mean() > 0
        assert np.mean(error[2]) > 0 and np.mean(error[1]) > 0
        assert n_head > 0


def test_a_shift_and_back(model: Model) -> None:
    """Pages that turn and turn back are where they were, but for rounding."""
    params = KVMixedParams(hot=64, group=16, sink=0, cold="q8_0")
    with Context(model, n_ctx=1024, n_threads=1, type_k="f32", type_v="f32", flash_attn="off", kv_mixed=params) as context:
        context.decode(random_tokens(400))
        cache = MixedKVCache.from_context(context)
        before = cache.cold.get_means(0).astype(np.float64)
        for delta in (500, -500):
            context.memory.seq_add(0, 0, -1, delta)
            context.decode(random_tokens(1))
            context.memory.seq_rm(0, context.memory.seq_pos_max(0), -1)
        after = cache.cold.get_means(0).astype(np.float64)
        # rounded twice to 11 bits of values up to 8, in a basis where 64 of them are mixed
        assert np.abs(after - before)[0, :2].max() < 2 * 2**-9 + 1e-4
        assert np.abs(before[0, :2]).max() > 0.1
