"""Decoding: logits, arguments, full caches, several sequences, operations on sequences."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.allowances import F32, F32_LOGITS
from helpers.tiny_model import random_tokens, write_tiny_model

from llamamix import Context, ContextError, ContextFullError, DecodeAborted, Model, ParamsError, decoder

MakeContext = Callable[..., Context]

N_VOCAB = 400


#
# decode
#


def test_a_batch_gives_what_its_tokens_give_one_by_one(make_context: MakeContext) -> None:
    tokens = random_tokens(100)
    whole = make_context(**F32)
    whole.decode(tokens, logits="all")
    single = make_context(**F32)
    rows = []
    for token in tokens:
        single.decode([token])
        rows.append(single.logits)
        assert rows[-1].shape == (1, N_VOCAB)
    np.testing.assert_allclose(np.concatenate(rows), whole.logits, atol=F32_LOGITS)
    assert whole.logits.std() > 2  # else the bound would mean nothing


def test_input_longer_than_n_batch_is_split(make_context: MakeContext) -> None:
    tokens = random_tokens(200)
    whole = make_context(**F32)
    whole.decode(tokens, logits="all")
    split = make_context(**F32, n_batch=32, n_ubatch=16)
    split.decode(tokens, logits="all")
    assert split.n_batch == 32
    assert split.logits.shape == (200, N_VOCAB)
    np.testing.assert_allclose(split.logits, whole.logits, atol=F32_LOGITS)

    split.memory.clear()
    mask = np.zeros(200, bool)
    mask[[0, 31, 32, 199]] = True
    split.decode(tokens, logits=mask)
    np.testing.assert_allclose(split.logits, whole.logits[mask], atol=F32_LOGITS)


def test_which_logits_are_kept(make_context: MakeContext) -> None:
    context = make_context()
    with pytest.raises(ContextError, match="nothing was decoded"):
        _ = context.logits
    context.decode([5, 6, 7])
    assert (context.logits.shape, context.logits.dtype) == ((1, N_VOCAB), np.float32)
    context.decode([5, 6, 7], logits="all")
    assert context.logits.shape == (3, N_VOCAB)
    context.decode([5, 6, 7], logits=[1, 0, 1])
    assert context.logits.shape == (2, N_VOCAB)
    context.decode([5, 6, 7], logits=[False] * 3)
    assert context.logits.shape == (0, N_VOCAB)


def test_logits_are_copied_once(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []

    def copy_rows(pointer: Any, n_rows: int, n_columns: int) -> np.ndarray:
        copied.append(n_rows)
        return copy(pointer, n_rows, n_columns)

    copy = decoder._copy_rows
    monkeypatch.setattr(decoder, "_copy_rows", copy_rows)
    context = make_context(n_batch=32, embeddings=True)
    context.decode(random_tokens(40), logits="all")
    assert copied == [32, 32]  # logits and embeddings of the first batch, which the second one overwrites
    first = context.logits
    assert all(context.logits is first and context.logits[-1].shape == (N_VOCAB,) for _ in range(3))
    assert context.embeddings is context.embeddings
    assert copied == [32, 32, 8, 8]

    before = first.copy()
    context.decode([6])
    np.testing.assert_array_equal(first, before)
    assert context.logits is not first
    for array in (first, context.logits, context.embeddings):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


def test_logits_of_a_decode_that_failed(make_context: MakeContext) -> None:
    context = make_context()
    context.decode([5])
    assert len(context.logits) == 1
    context.set_abort_callback(lambda: True)
    with pytest.raises(DecodeAborted):
        context.decode([6])
    with pytest.raises(ContextError, match="no logits"):
        _ = context.logits


@pytest.mark.parametrize(
    "tokens",
    [
        [5, 6, 7],
        (5, 6, 7),
        range(5, 8),
        iter([5, 6, 7]),
        np.array([5, 6, 7], np.int64),
        np.array([5, 6, 7], np.uint8),
        np.array([5, 0, 6, 0, 7, 0], np.int32)[::2],
    ],
    ids=["list", "tuple", "range", "iterator", "int64", "uint8", "strided"],
)
def test_tokens_in_any_integer_form(make_context: MakeContext, tokens: object) -> None:
    expected = make_context()
    expected.decode([5, 6, 7])
    context = make_context()
    context.decode(tokens)
    np.testing.assert_array_equal(context.logits, expected.logits)


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        np.array([], np.int32),
        [1.0],
        np.array([1, 2], np.float32),
        np.array([True]),
        ["a"],
        "text",
        b"\1",
        [[1, 2]],
        [[1], [2, 3]],
        [-1],
        [N_VOCAB],
        [2**31],
        [2**63],
        [2**70],
        None,
        5,
    ],
    ids=repr,
)
def test_what_are_no_tokens(make_context: MakeContext, tokens: object) -> None:
    context = make_context()
    with pytest.raises(ParamsError):
        context.decode(tokens)
    assert context.memory.seq_pos_max() == -1


@pytest.mark.parametrize(
    "arguments",
    [
        {"pos": -1},
        {"pos": 1.0},
        {"pos": 2**31 - 1},
        {"seq_id": 1},
        {"seq_id": -1},
        {"seq_id": "0"},
        {"seq_id": None},
        {"logits": "first"},
        {"logits": [1]},
        {"logits": [1.0, 0.0]},
        {"logits": None},
    ],
    ids=str,
)
def test_arguments_that_decode_refuses(make_context: MakeContext, arguments: dict) -> None:
    context = make_context()
    with pytest.raises(ParamsError, match=next(iter(arguments))):
        context.decode([5, 6], **arguments)
    assert context.memory.seq_pos_max() == -1


def test_positions(make_context: MakeContext) -> None:
    context = make_context()
    context.decode([5, 6], pos=100)
    assert (context.memory.seq_pos_min(), context.memory.seq_pos_max()) == (100, 101)
    context.decode([7])
    assert context.memory.seq_pos_max() == 102
    with pytest.raises(ContextError, match="inconsistent sequence positions") as caught:
        context.decode([8], pos=200)
    assert caught.value.code == -1
    assert str(caught.value).endswith("Y = X + 1.") and "\n" not in str(caught.value)
    assert context.memory.seq_pos_max() == 102


#
# a full cache
#


def test_what_does_not_fit_is_refused_before_anything_changes(make_context: MakeContext) -> None:
    context = make_context(n_batch=32)
    context.decode(random_tokens(200))
    logits = context.logits
    with pytest.raises(ContextFullError, match="257 tokens, and the context holds 256") as caught:
        context.decode(random_tokens(57))
    assert caught.value.code == 1
    assert context.memory.seq_pos_max() == 199
    np.testing.assert_array_equal(context.logits, logits)
    assert context.perf.n_p_eval == 200

    context.decode(random_tokens(56))  # just fits
    assert context.memory.seq_pos_max() == 255
    with pytest.raises(ContextFullError):
        context.decode([5])


def test_a_cache_that_turns_out_full_is_as_before(make_context: MakeContext) -> None:
    # the sequences share the cells, so that only trying tells; the first 3 batches do fit
    context = make_context(n_seq_max=2, kv_unified=True, n_batch=16)
    context.decode(random_tokens(200), seq_id=0)
    with pytest.raises(ContextFullError, match="full") as caught:
        context.decode(random_tokens(100), seq_id=1)
    assert caught.value.code == 1
    assert context.memory.seq_pos_max(0) == 199
    assert context.memory.seq_pos_max(1) == -1
    with pytest.raises(ContextError, match="nothing was decoded"):
        _ = context.logits
    context.decode(random_tokens(56), seq_id=1)
    assert context.memory.seq_pos_max(1) == 55


def test_holes_make_room_again(make_context: MakeContext) -> None:
    context = make_context()
    context.decode(random_tokens(250))
    context.memory.seq_rm(0, 10, 110)
    context.decode(random_tokens(100))
    assert context.memory.seq_pos_max() == 349
    context.memory.seq_rm(0, 0, 300)
    context.decode(random_tokens(200))
    assert (context.memory.seq_pos_min(), context.memory.seq_pos_max()) == (300, 549)


def test_holes_of_tokens_that_sequences_share(make_context: MakeContext) -> None:
    context = make_context(n_seq_max=2, kv_unified=True)
    context.decode(random_tokens(20))
    context.memory.seq_cp(0, 1)
    context.memory.seq_add(0, 10, -1, 300)  # moves them in both
    context.decode([5], seq_id=1)
    assert [context.memory.seq_pos_max(s) for s in range(2)] == [319, 320]


#
# several sequences
#


@pytest.mark.parametrize("kv_unified", [True, False])
def test_sequences_do_not_see_each_other(make_context: MakeContext, kv_unified: bool) -> None:
    first, second = random_tokens(40, 1), random_tokens(30, 2)
    alone = []
    for tokens in (first, second):
        context = make_context(**F32)
        context.decode(tokens)
        alone.append(context.logits[0])

    both = make_context(**F32, n_ctx=512, n_seq_max=2, kv_unified=kv_unified)
    # token by token in turns as long as both have some
    order = [(t, s) for pair in itertools.zip_longest(first, second) for s, t in enumerate(pair) if t is not None]
    both.decode_batch([t for t, _ in order], [s for _, s in order])
    assert (both.memory.seq_pos_max(0), both.memory.seq_pos_max(1)) == (39, 29)
    # rows are in the order of the tokens: the second sequence ends first
    np.testing.assert_allclose(both.logits, [alone[1], alone[0]], atol=F32_LOGITS)


def test_tokens_that_sequences_share(make_context: MakeContext) -> None:
    prompt, ends = random_tokens(20), ([5, 6], [7])
    context = make_context(**F32, n_seq_max=3, kv_unified=True)
    tokens = [*prompt, *ends[0], *ends[1]]
    context.decode_batch(tokens, [(0, 2)] * 20 + [0, 0, 2])
    assert [context.memory.seq_pos_max(s) for s in range(3)] == [21, -1, 20]
    for row, end in zip(context.logits, ends, strict=True):
        alone = make_context(**F32)
        alone.decode([*prompt, *end])
        np.testing.assert_allclose(row, alone.logits[0], atol=F32_LOGITS)


def test_batches_go_on_where_their_sequences_end(make_context: MakeContext) -> None:
    context = make_context(n_seq_max=2, kv_unified=True)
    context.decode(random_tokens(5), seq_id=1)
    context.decode_batch([5, 6, 7], [0, 1, 1], logits="all")
    assert (context.memory.seq_pos_max(0), context.memory.seq_pos_max(1)) == (0, 6)
    assert context.logits.shape == (3, N_VOCAB)
    context.decode_batch([5, 6], [0, 1], pos=[1, 7])
    assert (context.memory.seq_pos_max(0), context.memory.seq_pos_max(1)) == (1, 7)


@pytest.mark.parametrize(
    ("seq_ids", "pos"),
    [
        ([0, 0], None),
        ([0, 0, 2], None),
        ([0, 0, -1], None),
        ([0, 0, ()], None),
        ([0, 0, (1, 1)], None),
        ([0, 0, "1"], None),
        ([0, 0, 1.0], None),
        ("abc", None),
        (0, None),
        ([0, 0, 0], [0, 1]),
        ([0, 0, 0], [0, 2, 3]),
        ([0, 0, 0], [0, 1, 1]),
        ([0, 0, 0], [2, 1, 0]),
        ([0, 0, 0], [-1, 0, 1]),
        ([0, 0, 0], [0.0, 1.0, 2.0]),
        ([0, 0, 0], [2**31 - 3, 2**31 - 2, 2**31 - 1]),
    ],
    ids=str,
)
def test_arguments_that_decode_batch_refuses(make_context: MakeContext, seq_ids: object, pos: object) -> None:
    context = make_context(n_seq_max=2, kv_unified=True)
    with pytest.raises(ParamsError):
        context.decode_batch([5, 6, 7], seq_ids, pos)
    assert (context.memory.seq_pos_max(0), context.memory.seq_pos_max(1)) == (-1, -1)


#
# memory
#


def test_removed_tokens_are_forgotten(make_context: MakeContext) -> None:
    context = make_context(**F32)
    context.decode([5, 6, 7])
    context.decode(random_tokens(50))
    context.memory.seq_rm(0, 3)
    assert context.memory.seq_pos_max() == 2
    context.decode([8])
    fresh = make_context(**F32)
    fresh.decode([5, 6, 7, 8])
    np.testing.assert_allclose(context.logits, fresh.logits, atol=F32_LOGITS)

    context.memory.seq_rm(-1)
    assert context.memory.seq_pos_max() == -1


@pytest.mark.parametrize("kv_unified", [True, False])
def test_a_copied_sequence_goes_on_like_the_original(make_context: MakeContext, kv_unified: bool) -> None:
    context = make_context(**F32, n_ctx=512, n_seq_max=2, kv_unified=kv_unified)
    context.decode(random_tokens(40))
    context.memory.seq_cp(0, 1)
    context.decode([9], seq_id=0)
    original = context.logits
    context.memory.seq_rm(0)
    context.decode([9], seq_id=1)
    np.testing.assert_allclose(context.logits, original, atol=F32_LOGITS)
    assert (context.memory.seq_pos_max(0), context.memory.seq_pos_max(1)) == (-1, 40)


def test_parts_of_sequences(make_context: MakeContext) -> None:
    memory = (context := make_context(n_seq_max=3, kv_unified=True)).memory
    context.decode(random_tokens(50))
    memory.seq_cp(0, 1, 0, 20)
    assert (memory.seq_pos_min(1), memory.seq_pos_max(1)) == (0, 19)
    memory.seq_cp(0, 1, 30, 40)
    assert memory.seq_pos_max(1) == 39
    with pytest.raises(ParamsError, match="has positions in that range"):
        memory.seq_cp(0, 1, 35, 45)
    memory.seq_cp(0, 0)  # nothing to do
    memory.seq_keep(1)
    assert [memory.seq_pos_max(s) for s in range(3)] == [-1, 39, -1]


@pytest.mark.parametrize("kv_unified", [True, False])
def test_keeping_one_sequence(make_context: MakeContext, kv_unified: bool) -> None:
    context = make_context(n_ctx=768, n_seq_max=3, kv_unified=kv_unified)
    for seq_id in range(3):
        context.decode(random_tokens(10 + seq_id), seq_id=seq_id)
    context.memory.seq_keep(1)
    assert [context.memory.seq_pos_max(s) for s in range(3)] == [-1, 10, -1]


def test_positions_can_be_moved(make_context: MakeContext) -> None:
    context = make_context()
    memory = context.memory
    assert memory.can_shift
    context.decode(random_tokens(50))
    memory.seq_rm(0, 10, 20)
    memory.seq_add(0, 20, -1, -10)
    assert (memory.seq_pos_min(), memory.seq_pos_max()) == (0, 39)
    context.decode([5])
    memory.seq_div(0, 0, -1, 2)
    assert (memory.seq_pos_min(), memory.seq_pos_max()) == (0, 20)
    memory.seq_add(0, 0, -1, -5)
    assert (memory.seq_pos_min(), memory.seq_pos_max()) == (0, 15)
    context.decode([5])
    assert np.isfinite(context.logits).all()


def test_a_shifted_context_equals_one_without_the_tokens(tmp_path: Path, make_context: MakeContext) -> None:
    # in one layer, K of a token depends on that token alone: moved by RoPE it is what it would have been
    with Model(write_tiny_model(tmp_path / "one.gguf", n_layer=1)) as model:
        tokens = random_tokens(60)
        shifted = make_context(model, **F32)
        shifted.decode(tokens)
        shifted.memory.seq_rm(0, 10, 30)
        shifted.memory.seq_add(0, 30, -1, -20)
        shifted.decode([5])
        without = make_context(model, **F32)
        without.decode([*tokens[:10], *tokens[30:], 5])
        np.testing.assert_allclose(shifted.logits, without.logits, atol=F32_LOGITS)


def test_operations_that_memory_refuses(make_context: MakeContext) -> None:
    context = make_context(n_ctx=512, n_seq_max=2)  # two streams
    memory = context.memory
    context.decode(random_tokens(50))
    for use in (
        lambda: memory.seq_rm(2),
        lambda: memory.seq_rm(-2),
        lambda: memory.seq_rm(0, -2),
        lambda: memory.seq_rm(0, 0, 2**31),
        lambda: memory.seq_rm(0, 1.5),
        lambda: memory.seq_rm("0"),
        lambda: memory.seq_cp(0, 2),
        lambda: memory.seq_cp(-1, 0),
        lambda: memory.seq_cp(0, 1, 10, 20),
        lambda: memory.seq_cp(0, 1, 10),
        lambda: memory.seq_keep(-1),
        lambda: memory.seq_keep(42),
        lambda: memory.seq_add(2, 0, -1, 1),
        lambda: memory.seq_add(0, 0, -1, 2**31),
        lambda: memory.seq_add(0, 0, -1, 2**31 - 10),
        lambda: memory.seq_add(0, 0, -1, 1.0),
        lambda: memory.seq_div(0, 0, -1, 0),
        lambda: memory.seq_div(0, 0, -1, -2),
        lambda: memory.seq_div(-1, 0, -1, 2),
        lambda: memory.seq_pos_min(2),
        lambda: memory.seq_pos_max(-1),
        lambda: memory.seq_pos_max(True),
    ):
        with pytest.raises(ParamsError):
            use()
    assert (memory.seq_pos_min(0), memory.seq_pos_max(0), memory.seq_pos_max(1)) == (0, 49, -1)

    context.decode([5], seq_id=1)
    with pytest.raises(ParamsError, match="must be empty"):
        memory.seq_cp(0, 1)
