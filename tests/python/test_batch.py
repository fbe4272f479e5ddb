"""Batches and their splits, against what llama_batch_allocr is known to do, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamamix import Batch, LlamamixError, MixedKVCache, ParamsError, SBatch, UBatch


def batch_of(*tokens: tuple[int, int | Iterable[int]]) -> Batch:
    """Positions and sequences; token ids count from 100."""
    batch = Batch()
    for i, (pos, seq_ids) in enumerate(tokens):
        batch.add(100 + i, pos, seq_ids)
    return batch


def splits(sbatch: SBatch, how: str, n_ubatch: int) -> list[UBatch]:
    res = []
    while (ubatch := getattr(sbatch, f"split_{how}")(n_ubatch)).n_tokens > 0:
        res.append(ubatch)
    return res


def tokens_of(ubatches: list[UBatch]) -> list[list[int]]:
    return [u.token.tolist() for u in ubatches]


#
# batches
#


def test_batch_counts_its_tokens() -> None:
    batch = batch_of((0, 0), (1, 0), (0, [2, 1]))
    assert len(batch) == batch.n_tokens == 3
    assert batch.n_seqs == 3
    batch.clear()
    assert len(batch) == batch.n_seqs == 0


@pytest.mark.parametrize(
    ("token", "pos", "seq_ids", "named"),
    [
        (-1, 0, 0, "token"),
        (1.5, 0, 0, "token"),
        (2**31, 0, 0, "token"),
        (0, -1, 0, "pos"),
        (0, "0", 0, "pos"),
        (0, 2**31 - 1, 0, "pos"),
        (0, 0, -1, "seq_ids"),
        (0, 0, 256, "seq_ids"),
        (0, 0, True, "seq_ids"),
        (0, 0, [], "seq_ids"),
        (0, 0, [1, 1], "seq_ids"),
        (0, 0, [0, None], "seq_ids"),
    ],
)
def test_batch_refuses(token: int, pos: int, seq_ids: object, named: str) -> None:
    batch = batch_of((0, 0))
    with pytest.raises(ParamsError, match=named):
        batch.add(token, pos, seq_ids)
    assert len(batch) == 1 and batch.n_seqs == 1


#
# splits
#


def test_split_simple_takes_tokens_in_their_order() -> None:
    with SBatch(batch_of(*[(i, 0) for i in range(5)], (0, 1))) as sbatch:
        ubatches = splits(sbatch, "simple", 4)
    assert tokens_of(ubatches) == [[100, 101, 102, 103], [104, 105]]
    assert [(u.n_tokens, u.n_seqs, u.n_seq_tokens) for u in ubatches] == [(4, 4, 1), (2, 2, 1)]
    assert ubatches[1].pos.tolist() == [4, 0]
    assert ubatches[1].seq_id == ((0,), (1,))


def test_split_equal_takes_as_many_of_each_sequence() -> None:
    tokens = [(i, 0) for i in range(5)] + [(i, 1) for i in range(3)]
    with SBatch(batch_of(*tokens)) as sbatch:
        ubatches = splits(sbatch, "equal", 4)
    assert tokens_of(ubatches) == [[100, 101, 105, 106], [102, 107], [103, 104]]
    assert [(u.n_seqs, u.n_seq_tokens) for u in ubatches] == [(2, 2), (2, 1), (1, 2)]


def test_split_seq_takes_one_sequence_at_a_time() -> None:
    with SBatch(batch_of((0, 0), (0, 1), (1, 0), (1, 1))) as sbatch:
        ubatches = splits(sbatch, "seq", 8)
    assert tokens_of(ubatches) == [[100, 102], [101, 103]]
    assert [(u.n_seqs, u.n_seq_tokens) for u in ubatches] == [(1, 2), (1, 2)]


def test_shared_tokens_keep_all_their_sequences() -> None:
    with SBatch(batch_of((0, [5, 0, 3]), (1, [0, 3, 5]))) as sbatch:
        (ubatch,) = splits(sbatch, "simple", 8)
    assert ubatch.seq_id == ((0, 3, 5), (0, 3, 5))


def test_reset_begins_anew() -> None:
    with SBatch(batch_of(*[(i, 0) for i in range(5)])) as sbatch:
        first = tokens_of(splits(sbatch, "simple", 3))
        assert sbatch.split_simple(3).n_tokens == 0
        sbatch.reset()
        assert tokens_of(splits(sbatch, "simple", 3)) == first


def test_outputs_are_marked() -> None:
    batch = Batch()
    for i in range(3):
        batch.add(i, i, 0, logits=i == 2)
    with SBatch(batch) as sbatch:
        assert sbatch.split_simple(8).output.tolist() == [0, 0, 1]


def test_ubatch_outlives_its_sbatch() -> None:
    with SBatch(batch_of((0, 0), (1, 0))) as sbatch:
        ubatch = sbatch.split_simple(8)
        sbatch.split_simple(8)
    del sbatch
    assert (ubatch.token.dtype, ubatch.pos.dtype, ubatch.output.dtype) == (np.int32, np.int32, np.int8)
    assert ubatch.token.tolist() == [100, 101] and ubatch.pos.tolist() == [0, 1] and len(ubatch) == 2


def test_later_changes_to_a_batch_have_no_effect() -> None:
    batch = batch_of((0, 0), (1, 0))
    with SBatch(batch) as sbatch:
        batch.clear()
        assert sbatch.split_simple(8).n_tokens == 2


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=6),
    st.integers(1, 9),
    st.sampled_from(["simple", "equal", "seq"]),
)
def test_every_token_is_in_one_ubatch(parts: list[tuple[int, int]], n_ubatch: int, how: str) -> None:
    end = dict.fromkeys(range(4), 0)
    tokens = []
    for seq, n in parts:
        tokens += [(end[seq] + i, seq) for i in range(n)]
        end[seq] += n
    with SBatch(batch_of(*tokens), n_seq_max=4) as sbatch:
        ubatches = splits(sbatch, how, n_ubatch)
    found = [(int(t) - 100, (int(p), *s)) for u in ubatches for t, p, s in zip(u.token, u.pos, u.seq_id, strict=True)]
    assert sorted(found) == list(enumerate(tokens))
    for u in ubatches:
        assert u.n_tokens == u.n_seqs * u.n_seq_tokens
        assert u.n_tokens <= max(n_ubatch, u.n_seqs if how == "equal" else 0)
        if how != "simple":  # sequence after sequence
            by_seq = np.array(u.seq_id).reshape(u.n_seqs, u.n_seq_tokens)
            assert (by_seq == by_seq[:, :1]).all()
            assert (np.diff(by_seq[:, 0]) > 0).all()


#
# refusals
#


@pytest.fixture
def cache() -> Iterable[MixedKVCache]:
    """With positions 0 to 2 of sequence 0."""
    with MixedKVCache(hot=8, cold_size=8, sink=0, n_seq_max=4) as cache:
        with SBatch(batch_of((0, 0), (1, 0), (2, 0)), memory=cache) as sbatch:
            assert cache.find_slot(sbatch.split_simple(8))
        cache.commit()
        yield cache


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        ([(4, 0)], "sequence 0 .*inconsistent sequence positions.*X = 2 .*Y = 4"),
        ([(2, 0)], "sequence 0 .*inconsistent sequence positions.*X = 2 .*Y = 2"),
        ([(0, 1), (2, 1)], "sequence 1 positions are not continuous"),
        ([(1, 1), (0, 1)], "sequence 1 positions are decreasing"),
        ([(3, [0, 1])], "sequence . is coupled to .* diver"),
    ],
)
def test_batches_that_are_not_consistent_are_refused(
    cache: MixedKVCache, tokens: list[tuple[int, int]], named: str
) -> None:
    before = cache.state_save()
    with pytest.raises(ParamsError, match=named) as raised:
        SBatch(batch_of(*tokens), memory=cache)
    assert str(raised.value).startswith("The batch can not be used: ") and "\n" not in str(raised.value)
    assert cache.state_save() == before


def test_batches_that_follow_are_taken(cache: MixedKVCache) -> None:
    with SBatch(batch_of((3, 0), (7, 1), (8, 1)), memory=cache) as sbatch:
        assert sbatch.split_simple(8).n_tokens == 3
    with SBatch(batch_of((17, 0))) as sbatch:  # without the cache nothing is known of its positions
        assert sbatch.split_simple(8).pos.tolist() == [17]


def test_arguments_are_refused(cache: MixedKVCache) -> None:
    batch = batch_of((0, 2))
    for named, call in {
        "no tokens": lambda: SBatch(Batch()),
        "n_seq_max": lambda: SBatch(batch, 0),
        "n_seq_max must be from 1 to 256": lambda: SBatch(batch, 257),
        "n_seq_max must be from 1 to 4": lambda: SBatch(batch, 5, memory=cache),
        "n_vocab": lambda: SBatch(batch, n_vocab=0),
        r"invalid token\[0\] = 100": lambda: SBatch(batch, n_vocab=100),
        r"invalid seq_id\[0\]\[0\] = 2 >= 2": lambda: SBatch(batch, 2),
        "n_ubatch": lambda: SBatch(batch).split_simple(0),
        "sequential split is not supported": lambda: SBatch(batch_of((0, [0, 1]))).split_equal(4),
    }.items():
        with pytest.raises(ParamsError, match=named):
            call()


def test_ubatches_of_another_split_are_refused(cache: MixedKVCache) -> None:
    sbatch = SBatch(batch_of((3, 0)), memory=cache)
    ubatch = sbatch.split_simple(8)
    with pytest.raises(ParamsError, match="no tokens"):
        cache.find_slot(sbatch.split_simple(8))
    sbatch.reset()
    with pytest.raises(ParamsError, match=r"before a reset\(\)"):
        cache.find_slot(ubatch)
    ubatch = sbatch.split_simple(8)
    sbatch.close()
    sbatch.close()
    with pytest.raises(LlamamixError, match="sbatch is closed"):
        cache.find_slot(ubatch)
    with pytest.raises(LlamamixError, match="sbatch is closed"):
        sbatch.split_simple(8)
    with pytest.raises(LlamamixError, match="commit without find_slot"):
        cache.commit()
