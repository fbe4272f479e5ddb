"""Contexts: decoding, outputs, sequences, text, state, and that no argument ends the process."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.gguf_copy import rewrite_gguf
from helpers.processes import environment, library_dir
from helpers.tiny_model import write_tiny_model

from llamamix import (
    Context,
    ContextError,
    ContextFullError,
    DecodeAborted,
    KVMixedParams,
    Model,
    ParamsError,
    SamplingParams,
    decoder,
)
from llamamix._ffi import ffi, lib
from llamamix.sampling import Sampler
from llamamix.text import TextStream

MakeContext = Callable[..., Context]

N_VOCAB = 400
GREEDY = SamplingParams(temperature=0)

# Everything in F32: two runs that differ in how tokens are batched differ in the order of sums alone. A sum of at most
# 400 products is off by at most 400 * 2**-24 of its magnitudes; with gains below 10 over the 2 layers, logits whose
# standard deviation is 3 are off by less than 400 * 2**-24 * 10 * 3 = 7e-4.
F32 = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
F32_ATOL = 7e-4


def random_tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, N_VOCAB, n)


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
    np.testing.assert_allclose(np.concatenate(rows), whole.logits, atol=F32_ATOL)
    assert whole.logits.std() > 2  # else the bound would mean nothing


def test_input_longer_than_n_batch_is_split(make_context: MakeContext) -> None:
    tokens = random_tokens(200)
    whole = make_context(**F32)
    whole.decode(tokens, logits="all")
    split = make_context(**F32, n_batch=32, n_ubatch=16)
    split.decode(tokens, logits="all")
    assert split.n_batch == 32
    assert split.logits.shape == (200, N_VOCAB)
    np.testing.assert_allclose(split.logits, whole.logits, atol=F32_ATOL)

    split.memory.clear()
    mask = np.zeros(200, bool)
    mask[[0, 31, 32, 199]] = True
    split.decode(tokens, logits=mask)
    np.testing.assert_allclose(split.logits, whole.logits[mask], atol=F32_ATOL)


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
    np.testing.assert_allclose(both.logits, [alone[1], alone[0]], atol=F32_ATOL)


def test_tokens_that_sequences_share(make_context: MakeContext) -> None:
    prompt, ends = random_tokens(20), ([5, 6], [7])
    context = make_context(**F32, n_seq_max=3, kv_unified=True)
    tokens = [*prompt, *ends[0], *ends[1]]
    context.decode_batch(tokens, [(0, 2)] * 20 + [0, 0, 2])
    assert [context.memory.seq_pos_max(s) for s in range(3)] == [21, -1, 20]
    for row, end in zip(context.logits, ends, strict=True):
        alone = make_context(**F32)
        alone.decode([*prompt, *end])
        np.testing.assert_allclose(row, alone.logits[0], atol=F32_ATOL)


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
    np.testing.assert_allclose(context.logits, fresh.logits, atol=F32_ATOL)

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
    np.testing.assert_allclose(context.logits, original, atol=F32_ATOL)
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
        np.testing.assert_allclose(shifted.logits, without.logits, atol=F32_ATOL)


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


#
# text
#


@pytest.mark.parametrize(
    ("pieces", "stop", "text"),
    [
        (["a", "b"], [], "ab"),
        (["\u00fc".encode()[:1], "\u00fc".encode()[1:]], [], "\u00fc"),
        ([b"\xf0\x9f", b"\x98", b"\x80!"], [], "\U0001f600!"),
        ([b"\xf0\x9f", b"a"], [], "\ufffda"),
        ([b"a", b"\xc3"], [], "a\ufffd"),
        (["abSTOPcd"], ["STOP"], "ab"),
        (["abS", "TO", "Pcd"], ["STOP"], "ab"),
        (["abS", "TO"], ["STOP"], "abSTO"),
        (["SSTO", "P"], ["STOP"], "S"),
        (["aab", "aac"], ["aabaac"], ""),
        (["aa", "ab"], ["aab"], "a"),
        (["x.", "\n", "y"], ["\n\n", ".\n"], "x"),
        (["one two"], ["two", "one two"], ""),
    ],
)
def test_text_stream(pieces: list, stop: list, text: str) -> None:
    stream = TextStream(stop)
    out = [stream.feed(p if isinstance(p, bytes) else p.encode()) for p in pieces]
    assert "".join([*out, stream.finish()]) == text
    assert stream.stopped == any(s in b"".join(p if isinstance(p, bytes) else p.encode() for p in pieces).decode(
        errors="replace") for s in stop)  # fmt: skip
    assert stream.finish() == ""


def test_text_is_not_held_back_for_nothing() -> None:
    stream = TextStream(["END"])
    assert [stream.feed(p) for p in (b"an", b" E", b"N", b"d.", b"EN", b"D")] == ["an", " ", "", "ENd.", "", ""]
    assert stream.stopped


def greedy_tokens(context: Context, prompt: list, n: int) -> list[int]:
    tokens = []
    context.decode(prompt)
    for _ in range(n):
        tokens.append(int(context.logits[0].argmax()))
        context.decode([tokens[-1]])
    return tokens


def test_temperature_0_takes_the_most_likely_token(tiny_model: Model, make_context: MakeContext) -> None:
    prompt = tiny_model.tokenize("in the")
    expected = greedy_tokens(make_context(), prompt, 30)
    assert tiny_model.eos not in expected and len(set(expected)) > 5

    context = make_context()
    text = "".join(context.generate("in the", 30, GREEDY))
    pieces = b"".join(tiny_model.token_to_piece(t) for t in expected)
    assert text == pieces.decode(errors="replace")
    assert context.memory.seq_pos_max() + 1 == len(prompt) + 30


def test_the_sequence_holds_what_was_generated_at_every_piece(tiny_model: Model, make_context: MakeContext) -> None:
    prompt = tiny_model.tokenize("in the")
    context = make_context()
    n_held = [context.memory.seq_pos_max() + 1 - len(prompt) for _ in context.generate(prompt, 20, GREEDY)]
    assert n_held == sorted(set(n_held)) and n_held[0] >= 1 and n_held[-1] == 20

    # stopping in between and going on with nothing lost
    context = make_context()
    expected = greedy_tokens(make_context(), prompt, 12)
    pieces = context.generate(prompt, 20, GREEDY)
    while context.memory.seq_pos_max() + 1 < len(prompt) + 5:
        next(pieces)
    pieces.close()
    n = context.memory.seq_pos_max() + 1 - len(prompt)
    context.decode([expected[n]])
    assert int(context.logits[0].argmax()) == expected[n + 1]


def test_a_second_prompt_is_added(tiny_model: Model, make_context: MakeContext) -> None:
    context = make_context()
    list(context.generate("in", 3, GREEDY))
    before = context.memory.seq_pos_max() + 1
    list(context.generate("the", 3, GREEDY))
    # no second token that begins a text
    assert context.memory.seq_pos_max() + 1 == before + len(tiny_model.tokenize("the", add_special=False)) + 3


def test_seeds(make_context: MakeContext) -> None:
    def text(seed: int | None) -> str:
        return "".join(make_context().generate("in the", 30, SamplingParams(temperature=1.5, top_k=0, seed=seed)))

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(None) != text(None)  # the same by chance once in 400**30


def test_stop_strings_end_the_text(tiny_model: Model, make_context: MakeContext) -> None:
    full = "".join(make_context().generate("in the", 40, GREEDY))
    stop = full[10:13]
    context = make_context()
    text = "".join(context.generate("in the", 40, GREEDY, stop=["no such text", stop]))
    assert text == full[: full.index(stop)]
    assert context.memory.seq_pos_max() + 1 < len(tiny_model.tokenize("in the")) + 40
    assert "".join(make_context().generate("in the", 40, GREEDY, stop=stop)) == text


def test_end_of_generation(tiny_model: Model, make_context: MakeContext) -> None:
    context = make_context()
    always_eos = SamplingParams(temperature=0, logit_bias={tiny_model.eos: 1e9})
    assert list(context.generate("in the", 30, always_eos)) == []
    assert context.memory.seq_pos_max() + 1 == len(tiny_model.tokenize("in the"))


def test_generation_ends_with_the_context(make_context: MakeContext) -> None:
    context = make_context()
    text = ""
    with pytest.raises(ContextFullError):
        for piece in context.generate(random_tokens(240), 100, GREEDY):
            text += piece
    assert context.memory.seq_pos_max() == 255
    # 16 tokens fit behind the prompt, and the logits of the last give one more
    expected = "".join(make_context(n_ctx=512).generate(random_tokens(240), 17, GREEDY))
    assert text == expected

    with pytest.raises(ContextFullError):
        list(make_context().generate(random_tokens(257), 1))


def test_generations_in_turns(make_context: MakeContext) -> None:
    prompts = [random_tokens(20, 1), random_tokens(30, 2)]
    alone = ["".join(make_context().generate(p, 20, GREEDY)) for p in prompts]
    context = make_context(n_ctx=512, n_seq_max=2)
    turns = [context.generate(p, 20, GREEDY, seq_id=i) for i, p in enumerate(prompts)]
    texts = ["", ""]
    for pieces in itertools.zip_longest(*turns, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == alone


def draw(model: Model, n: int, logits: np.ndarray, **params: object) -> list[int]:
    sampler = Sampler(model, SamplingParams(**params))
    tokens = [sampler.sample(logits) for _ in range(n)]
    sampler.close()
    return tokens


def test_what_is_drawn(tiny_model: Model) -> None:
    logits = np.full(N_VOCAB, -20, np.float32)
    logits[[7, 8, 9, 10]] = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))  # the rest adds up to 1e-6
    wide = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}

    many = draw(tiny_model, 2000, logits, **wide)
    shares = np.bincount(many, minlength=N_VOCAB)[[7, 8, 9, 10]] / 2000
    # four standard deviations of a share near 0.5 in 2000 draws are 0.045
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.045)

    assert set(draw(tiny_model, 200, logits, **wide | {"top_k": 2})) == {7, 8}
    assert set(draw(tiny_model, 200, logits, **wide | {"top_p": 0.9})) == {7, 8, 9}
    assert set(draw(tiny_model, 200, logits, **wide | {"min_p": 0.2})) == {7, 8, 9}
    assert set(draw(tiny_model, 200, logits, **wide | {"temperature": 0.01})) == {7}
    assert set(draw(tiny_model, 200, logits, **wide | {"temperature": 0.0})) == {7}
    assert set(draw(tiny_model, 200, logits, **wide | {"logit_bias": {7: float("-inf")}})) == {8, 9, 10}
    # entropy 1.14: 8 with surprise 1.2 is the most typical, then 7 with 0.69
    assert set(draw(tiny_model, 200, logits, **wide | {"typical_p": 0.2})) == {8}


def test_penalties(tiny_model: Model) -> None:
    logits = np.linspace(5, 1, N_VOCAB, dtype=np.float32)  # the lower the token the more likely
    greedy = {"temperature": 0.0}
    assert draw(tiny_model, 4, logits, **greedy) == [0, 0, 0, 0]
    assert draw(tiny_model, 4, logits, **greedy, presence_penalty=10.0) == [0, 1, 2, 3]
    assert draw(tiny_model, 4, logits, **greedy, repeat_penalty=10.0) == [0, 1, 2, 3]
    assert draw(tiny_model, 5, logits, **greedy, presence_penalty=10.0, repeat_last_n=2) == [0, 1, 2, 0, 1]
    # tokens are 0.01 apart: twice the penalty lets 0 and 1 fall behind the next
    assert draw(tiny_model, 4, logits, **greedy, frequency_penalty=0.015) == [0, 1, 0, 2]


def test_grammar(make_context: MakeContext) -> None:
    for seed in range(3):
        params = SamplingParams(
            temperature=2.0, top_k=0, top_p=1, min_p=0, seed=seed, grammar='root ::= ("the" | "in") "!"'
        )
        text = "".join(make_context().generate("in the", 30, params))
        assert text in ("the!", "in!")


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= (",
        "root :== x",
        'other ::= "a"',
        "root ::= root",
        "root ::= undefined",
        "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000,
    ],
    ids=lambda grammar: grammar[:20],
)
def test_grammars_that_can_not_be_used(make_context: MakeContext, grammar: str, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(ParamsError, match="grammar"):
        make_context().generate("in", sampling=SamplingParams(grammar=grammar))


@pytest.mark.skipif("LLAMAMIX_TEST_SANITIZER" in os.environ, reason="libllama's assertions end the process")
def test_nothing_left_to_draw(tiny_model: Model, make_context: MakeContext) -> None:
    ban_all = dict.fromkeys(range(N_VOCAB), float("-inf"))
    for temperature in (0, 1):
        params = SamplingParams(temperature=temperature, logit_bias=ban_all)
        with pytest.raises(ContextError, match="No token is left"):
            list(make_context().generate("in", 5, params))
    # libllama would abort the process: no token is allowed, and one is drawn all the same
    with pytest.raises(ContextError, match="grammar allows none"):
        list(make_context().generate("in", 5, SamplingParams(grammar=r"root ::= [\x00]")))
    with pytest.raises(ParamsError, match="not in the vocabulary"):
        make_context().generate("in", sampling=SamplingParams(logit_bias={N_VOCAB: 1.0}))


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": []},
        {"prompt": [1.5]},
        {"prompt": None},
        {"prompt": "half a pair: \ud800"},
        {"max_tokens": 0},
        {"max_tokens": "1"},
        {"stop": [""]},
        {"stop": [None]},
        {"seq_id": 1},
        {"seq_id": -1},
    ],
    ids=ascii,
)
def test_arguments_that_generate_refuses_at_once(make_context: MakeContext, arguments: dict) -> None:
    context = make_context()
    with pytest.raises(ParamsError):
        context.generate(**{"prompt": "in"} | arguments)
    assert context.memory.seq_pos_max() == -1


def test_chat(tiny_model: Model, make_context: MakeContext) -> None:
    messages = [{"role": "user", "content": "in the"}]
    prompt = tiny_model.apply_chat_template(messages)
    expected = "".join(make_context().generate(tiny_model.tokenize(prompt, parse_special=True), 10, GREEDY))
    context = make_context()
    for _ in range(2):  # the second time the first conversation is gone
        assert "".join(context.chat(messages, 10, GREEDY)) == expected
    assert context.memory.seq_pos_max() + 1 == len(tiny_model.tokenize(prompt)) + 10


#
# embeddings
#


def test_embeddings(make_context: MakeContext) -> None:
    tokens = random_tokens(20)
    context = make_context(**F32, embeddings=True)
    context.decode(tokens)  # libllama keeps all of them
    each = context.embeddings
    assert (each.shape, each.dtype, context.logits.shape) == ((20, 128), np.float32, (20, N_VOCAB))

    mean = make_context(**F32, embeddings=True, pooling="mean")
    mean.decode(tokens)
    np.testing.assert_allclose(mean.embeddings_seq(0), each.mean(0), atol=F32_ATOL)
    last = make_context(**F32, embeddings=True, pooling="last")
    last.decode(tokens)
    np.testing.assert_allclose(last.embeddings_seq(), each[-1], atol=F32_ATOL)

    with pytest.raises(ContextError, match="embeddings_seq"):
        _ = mean.embeddings
    with pytest.raises(ContextError, match="no pooled embedding"):
        context.embeddings_seq(0)
    plain = make_context()
    plain.decode(tokens)
    with pytest.raises(ContextError, match="does not keep"):
        _ = plain.embeddings


@pytest.mark.parametrize("pooling", ["none", "mean", "cls", "last", "rank"])
@pytest.mark.parametrize("n_ubatch", [None, 64])
def test_embeddings_are_those_of_a_plain_cache_or_refused(
    make_context: MakeContext, pooling: str, n_ubatch: int | None
) -> None:
    """Whatever cache is asked for, and however many tokens there are; what one refuses for its ubatches so do others."""
    refused = given = 0
    for kv_mixed, is_lossy in ((True, False), ("hot=64,group=16", True), ("hot=64,group=16,cold=f32", False)):
        for n in (50, 300, 600):
            results = []
            for kind in (False, kv_mixed):
                context = make_context(
                    **F32, n_ctx=1024, n_ubatch=n_ubatch, embeddings=True, pooling=pooling, kv_mixed=kind
                )
                try:
                    context.decode(random_tokens(n))
                    results.append(context.embeddings if pooling == "none" else context.embeddings_seq())
                except ParamsError as error:
                    assert "must be one ubatch" in str(error)
                    results.append(None)
                except ContextError as error:
                    assert "not those of a plain cache" in str(error) and is_lossy and kind is not False
                    refused += 1
                    assert context.logits.shape[1] == N_VOCAB  # they are what they are
                    results.append(results[0])
            plain, mixed = results
            assert (plain is None) == (mixed is None)
            if plain is not None:
                given += 1
                np.testing.assert_allclose(mixed, plain, atol=F32_ATOL)
    # pooled in one ubatch nothing is cold, or it is refused for being longer; else 300 and 600 tokens do not stay hot
    assert (refused, given) == {"none": (2, 9), "last": (2, 9), "rank": (2, 9)}.get(pooling, (0, 3 if n_ubatch else 9))


def test_embeddings_have_a_plain_cache_by_default(make_context: MakeContext) -> None:
    assert make_context(n_ctx=1024, kv_mixed=True, embeddings=True).kv_mixed is None
    assert make_context(n_ctx=1024, kv_mixed=True).kv_mixed.hot == 512
    assert make_context(n_ctx=1024, kv_mixed=KVMixedParams(hot=64), embeddings=True).kv_mixed.hot == 64


def each_token(make_context: MakeContext, tokens: np.ndarray, **params: Any) -> np.ndarray:
    """The embeddings of all tokens of a sequence, which nothing pools."""
    context = make_context(**F32, n_ctx=1024, embeddings=True, pooling="none", **params)
    context.decode(tokens)
    return context.embeddings


def pooled(each: np.ndarray, pooling: str) -> np.ndarray:
    return {"mean": each.mean(0), "cls": each[0], "last": each[-1], "rank": each[-1, :1]}[pooling]


@pytest.mark.parametrize("kv_mixed", [False, "hot=1024"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "rank"])
def test_all_tokens_are_pooled(make_context: MakeContext, pooling: str, kv_mixed: object) -> None:
    tokens = random_tokens(600)
    context = make_context(**F32, n_ctx=1024, embeddings=True, pooling=pooling, kv_mixed=kv_mixed)
    context.decode(tokens)
    expected = pooled(each_token(make_context, tokens), pooling)
    np.testing.assert_allclose(context.embeddings_seq(), expected, atol=F32_ATOL)
    # a causal model's score is the last token's (the toy has no head, so it is the first value)
    assert context.n_ubatch == (1024 if pooling in ("mean", "cls") else 512)


@pytest.mark.parametrize("kv_mixed", [False, "hot=64,cold=f32"])
def test_a_batch_that_can_not_be_pooled_is_refused(make_context: MakeContext, kv_mixed: object) -> None:
    params = F32 | {"embeddings": True, "n_batch": 64, "n_ubatch": 16, "kv_mixed": kv_mixed}
    tokens = random_tokens(65)
    for pooling in ("mean", "cls"):
        context = make_context(**params, pooling=pooling)
        with pytest.raises(ParamsError, match=r"17 tokens .* n_ubatch is 16: .* n_batch and n_ubatch of 17 or more"):
            context.decode(tokens[:17])
        with pytest.raises(ParamsError, match="one batch .* n_batch is 64: .* of 65 or more"):
            context.decode(tokens)
        assert context.memory.seq_pos_max() == -1
        context.decode(tokens[:16])
        expected = pooled(each_token(make_context, tokens[:16]), pooling)
        np.testing.assert_allclose(context.embeddings_seq(), expected, atol=F32_ATOL)
    for pooling in ("last", "rank"):  # the last token is in the last ubatch
        context = make_context(**params, pooling=pooling)
        with pytest.raises(ParamsError, match="one batch .* n_batch is 64"):
            context.decode(tokens)
        context.decode(tokens[:64])
        expected = pooled(each_token(make_context, tokens[:64]), pooling)
        np.testing.assert_allclose(context.embeddings_seq(), expected, atol=F32_ATOL)


@pytest.mark.parametrize("kv_mixed", [False, "hot=256"])
@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_sequences_are_pooled_apart(
    make_context: MakeContext, pooling: str, kv_unified: bool, kv_mixed: object
) -> None:
    """Streams take as many tokens of each sequence at once, so that longer ones would be cut; "last" does not mind."""
    params = F32 | {"n_ctx": 768, "n_seq_max": 3, "kv_unified": kv_unified, "kv_mixed": kv_mixed}
    context = make_context(**params, embeddings=True, pooling=pooling)
    for lengths in ((40, 25, 70), (30, 30, 30), (7,)):
        context.memory.clear()
        parts = [random_tokens(n, n) + s for s, n in enumerate(lengths)]
        seq_ids = np.repeat(np.arange(len(lengths)), lengths)
        if not kv_unified and len(set(lengths)) > 1 and pooling != "last":
            with pytest.raises(
                ParamsError, match="of 25 to 70 tokens .* with kv_unified=True, or decode one at a time"
            ):
                context.decode_batch(np.concatenate(parts), seq_ids)
            assert context.memory.seq_pos_max(1) == -1
            continue
        context.decode_batch(np.concatenate(parts), seq_ids)
        for seq_id, tokens in enumerate(parts):
            expected = pooled(each_token(make_context, tokens), pooling)
            np.testing.assert_allclose(context.embeddings_seq(seq_id), expected, atol=F32_ATOL)


@pytest.mark.parametrize("n_ctx", [0, 256, 700])
def test_means_of_any_number_of_sequences(make_context: MakeContext, n_ctx: int) -> None:
    """libllama aborts the process where the sequences do not divide the tokens of a ubatch."""
    context = make_context(n_ctx=n_ctx, n_seq_max=3, kv_unified=True, n_ubatch=128, embeddings=True, pooling="mean")
    assert context.n_ubatch == 126
    context.decode_batch(random_tokens(126), np.arange(126) % 3)
    assert np.isfinite(context.embeddings_seq(2)).all()
    with pytest.raises(ParamsError, match="127 tokens must be one ubatch"):
        context.decode_batch(random_tokens(127), np.arange(127) % 3)
    for params in ({"n_ubatch": 7}, {"n_batch": 7}):
        with pytest.raises(ContextError, match=r"n_ubatch, n_batch and n_ctx of n_seq_max \(8\) or more, not 7"):
            make_context(n_seq_max=8, embeddings=True, pooling="mean", **params)


def test_tokens_that_see_each_other_are_one_ubatch(
    tiny_model_path: Path, tmp_path: Path, make_context: MakeContext
) -> None:
    path = rewrite_gguf(tiny_model_path, tmp_path / "both-ways.gguf", extra={"attention.causal": False})
    with Model(path) as model:
        tokens = random_tokens(600)
        # each token at once, and all at once: the first sees the last
        context = make_context(model, **F32, n_ctx=1024, embeddings=True)
        context.decode(tokens)
        assert context.n_ubatch == context.n_batch == 2048
        changed = np.append(tokens[:-1], tokens[-1] ^ 1)
        other = make_context(model, **F32, n_ctx=1024, embeddings=True)
        other.decode(changed)
        assert np.abs(context.embeddings[0] - other.embeddings[0]).max() > 2 * F32_ATOL

        small = make_context(model, n_ubatch=16)
        with pytest.raises(
            ParamsError, match="17 tokens must be one ubatch as they see each other, and n_ubatch is 16"
        ):
            small.decode(tokens[:17])
        streams = make_context(model, n_ctx=512, n_seq_max=2)
        with pytest.raises(ParamsError, match="of 2 to 3 tokens can not be one ubatch as they see each other"):
            streams.decode_batch(tokens[:5], [0, 0, 1, 1, 1])
        assert (small.memory.seq_pos_max(), streams.memory.seq_pos_max()) == (-1, -1)


#
# state
#


@pytest.mark.parametrize("kv_mixed", [False, "hot=64,group=16"])
def test_a_saved_state_goes_on(make_context: MakeContext, kv_mixed: object) -> None:
    context = make_context(kv_mixed=kv_mixed)
    context.decode(random_tokens(150))
    state = context.state_save()
    context.decode([5])
    expected = context.logits
    again = make_context(kv_mixed=kv_mixed)
    again.decode(random_tokens(70, 1))
    for target in (context, again):
        target.state_load(state)
        assert target.memory.seq_pos_max() == 149
        with pytest.raises(ContextError, match="nothing was decoded"):
            _ = target.logits
        target.decode([5])
        if kv_mixed:  # the cells are in another order, and flash attention adds up in F16
            np.testing.assert_allclose(target.logits, expected, atol=0.05)
        else:
            np.testing.assert_array_equal(target.logits, expected)


@pytest.mark.parametrize("kv_mixed", [False, "hot=64,group=16"])
def test_a_saved_sequence_can_become_another(make_context: MakeContext, kv_mixed: object) -> None:
    context = make_context(n_ctx=512, n_seq_max=2, kv_mixed=kv_mixed)
    context.decode(random_tokens(150), seq_id=0)
    context.decode(random_tokens(20, 1), seq_id=1)
    state = context.state_save(seq_id=0)
    context.decode([5], seq_id=0)
    expected = context.logits
    context.state_load(state, seq_id=1)
    assert context.memory.seq_pos_max(1) == 149
    context.decode([5], seq_id=1)
    np.testing.assert_allclose(context.logits, expected, atol=0.05)  # the cells are in another order


def test_bytes_that_are_no_state(make_context: MakeContext) -> None:
    context = make_context(n_seq_max=2, n_ctx=512)
    context.decode(random_tokens(30))
    whole, one = context.state_save(), context.state_save(0)
    rng = np.random.default_rng(0)
    for state in (whole, one):
        seq_id = None if state is whole else 0
        for i in [0, 8, 12, 16, 23, 24, 30, *rng.integers(24, len(state), 20)]:
            damaged = bytearray(state)
            damaged[i] ^= 0x40
            with pytest.raises(ContextError, match="saved state"):
                context.state_load(bytes(damaged), seq_id)
        for cut in (0, 1, 23, 24, len(state) - 1):
            with pytest.raises(ContextError, match="saved state"):
                context.state_load(state[:cut], seq_id)
    with pytest.raises(ContextError, match="of all sequences"):
        context.state_load(whole, 0)
    with pytest.raises(ContextError, match="of one sequence"):
        context.state_load(one)
    for bad in ("text", None, 5):
        with pytest.raises(ParamsError, match="bytes"):
            context.state_load(bad)
    with pytest.raises(ParamsError, match="seq_id"):
        context.state_load(one, 2)
    with pytest.raises(ParamsError, match="seq_id"):
        context.state_save(-1)
    assert context.memory.seq_pos_max() == 29


def test_a_state_that_another_context_can_not_hold(make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context(n_ctx=512)
    context.decode(random_tokens(400))
    state = context.state_save()
    with pytest.raises(ContextError, match="can not be loaded: not enough cells"):
        make_context(n_ctx=256).state_load(state)
    with pytest.raises(ContextError, match="can not be loaded"):
        make_context(n_ctx=512, type_k="f32").state_load(state)
    with pytest.raises(ContextError, match="can not be loaded"):
        make_context(n_ctx=512, kv_mixed="hot=64").state_load(state)
    with Model(write_tiny_model(tmp_path / "other.gguf", n_layer=1)) as model:
        other = make_context(model, n_ctx=512)
        with pytest.raises(ContextError, match="can not be loaded"):
            other.state_load(state)
        other.memory.clear()
        other.decode([5])
        assert np.isfinite(other.logits).all()


#
# the mixed KV cache
#


def test_mixed_is_the_default(tiny_model: Model) -> None:
    with Context(tiny_model, n_threads=1) as context:
        assert context.n_ctx == 4096
        params, stats = context.kv_mixed, context.stats
    assert params.spec() == KVMixedParams(hot=512, cold="iq4_nl", cold_size=4096 - 512).spec()
    assert (stats.hot_size, stats.cold_size, stats.type_hot_k, stats.type_cold_v) == (512, 3584, "f16", "iq4_nl")


@pytest.mark.parametrize("kv_mixed", [False, "off"])
def test_plain(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, kv_mixed: object) -> None:
    monkeypatch.setenv("LLAMA_KV_MIXED", "hot=64")  # has no say
    context = make_context(kv_mixed=kv_mixed)
    assert context.kv_mixed is None and context.stats is None


def test_stats(make_context: MakeContext) -> None:
    context = make_context(n_ctx=512, n_seq_max=2, kv_mixed="hot=64,group=16,cold_k=q8_0,cold_v=q4_0,sink=2")
    before = context.stats
    assert (before.n_stream, before.n_layer, before.hot_used, before.cold_used, before.n_migrations) == (2, 2, 0, 0, 0)
    # 256 cells per stream; a row of K or V has 2 heads of 64 elements
    assert (before.hot_size, before.cold_size) == (2 * 64, 2 * 192)
    assert before.bytes_hot == 2 * 64 * 2 * 2 * 128 * 2
    assert before.bytes_cold == 2 * 192 * 2 * (4 * 34 + 4 * 18) + 2 * 2 * 2 * 128 * 2  # and the means of two pages
    assert before.bytes_plain == 512 * 2 * 2 * 128 * 2
    assert before.bytes_total == before.bytes_hot + before.bytes_cold
    assert before.ratio == before.bytes_total / before.bytes_plain
    types = (before.type_hot_k, before.type_hot_v, before.type_cold_k, before.type_cold_v)
    assert types == ("f16", "f16", "q8_0", "q4_0")

    context.decode(random_tokens(150))
    after = context.stats
    assert after.hot_used + after.cold_used == 150
    assert after.cold_used == after.n_tokens_moved
    assert after.n_migrations * 16 >= after.n_tokens_moved >= 150 - 64
    assert after.hot_used <= 52  # 80 % of 64, rounded up
    assert after.t_migrate_us > 0


@pytest.mark.parametrize(
    ("n_ctx", "spec"), [(256, "1"), (1024, "1"), (512, "hot=500"), (512, "hot=100,cold_size=450,group=7")]
)
def test_cells_are_what_the_parameters_say(make_context: MakeContext, n_ctx: int, spec: str) -> None:
    stats = make_context(n_ctx=n_ctx, kv_mixed=spec).stats
    assert KVMixedParams.parse(spec).cells(n_ctx) == (stats.hot_size, stats.cold_size)


def test_a_full_mixed_cache(make_context: MakeContext) -> None:
    context = make_context(kv_mixed="hot=64,group=16", n_batch=32)
    context.decode(random_tokens(250))
    with pytest.raises(ContextFullError):
        context.decode(random_tokens(7))
    assert context.memory.seq_pos_max() == 249
    stats = context.stats
    assert stats.hot_used + stats.cold_used == 250


def test_contexts_that_can_not_be_made(tmp_path: Path, make_context: MakeContext) -> None:
    with pytest.raises(ContextError, match="cold_size"):
        make_context(kv_mixed="hot=32,cold_size=32")
    with pytest.raises(ContextError, match="flash_attn"):
        make_context(type_v="q4_0", flash_attn="off")
    with Model(write_tiny_model(tmp_path / "48.gguf", n_layer=1, head_size=48)) as model:
        for flash_attn in ("off", "auto"):
            with pytest.raises(ContextError, match="type_k=q4_0 .* 48"):
                make_context(model, type_k="q4_0", flash_attn=flash_attn)
        with pytest.raises(ContextError, match="head size 48"):
            make_context(model, kv_mixed=True)


def test_an_architecture_that_stores_v_transposed(tiny_model_path: Path, make_context: MakeContext) -> None:
    with Model(tiny_model_path) as model:
        model.__dict__["metadata"] = dict(model.metadata) | {"general.architecture": "plm"}
        for params in ({"flash_attn": "off", "kv_mixed": True}, {"flash_attn": "auto"}, {"flash_attn": "on"}):
            with pytest.raises(ContextError, match="plm needs flash_attn='off' and kv_mixed=False"):
                make_context(model, **params)
        make_context(model, flash_attn="off").decode([5])


#
# control
#


def test_a_closed_context(tiny_model: Model) -> None:
    with Context(tiny_model, n_ctx=256, n_threads=1, kv_mixed=False) as context:
        context.decode([5])
        state = context.state_save()
        pieces = context.generate("in", 10)
        next(pieces)
        assert "closed" not in repr(context)
    context.close()
    assert "closed" in repr(context)
    for use in (
        lambda: context.decode([5]),
        lambda: context.decode_batch([5], [0]),
        lambda: context.logits,
        lambda: context.embeddings,
        lambda: context.embeddings_seq(0),
        lambda: context.generate("in"),
        lambda: list(pieces),
        lambda: list(context.chat([{"role": "user", "content": "Hi"}])),
        lambda: context.stats,
        lambda: context.kv_mixed,
        lambda: context.perf,
        lambda: context.perf_reset(),
        lambda: context.state_save(),
        lambda: context.state_load(state),
        lambda: context.n_threads,
        lambda: context.set_n_threads(1),
        lambda: context.memory.clear(),
        lambda: context.memory.seq_rm(0),
        lambda: context.memory.seq_cp(0, 0, 1) or context.memory.seq_keep(0),
        lambda: context.memory.seq_add(0, 0, -1, 1),
        lambda: context.memory.seq_div(0, 0, -1, 2),
        lambda: context.memory.seq_pos_min(),
        lambda: context.memory.can_shift,
    ):
        with pytest.raises(ContextError, match="closed"):
            use()


def test_abort(make_context: MakeContext) -> None:
    context = make_context(n_ctx=2048, n_ubatch=64)
    calls = []
    context.set_abort_callback(lambda: calls.append(1) or len(calls) > 500)
    with pytest.raises(DecodeAborted) as caught:
        context.decode(random_tokens(2000))
    assert caught.value.code == 2
    assert -1 <= context.memory.seq_pos_max() < 1999
    assert (context.memory.seq_pos_max() + 1) % 64 == 0  # whole ubatches stay

    context.set_abort_callback(None)
    context.memory.clear()
    context.decode(random_tokens(2000))
    assert context.memory.seq_pos_max() == 1999


def test_an_exception_in_the_abort_callback(make_context: MakeContext) -> None:
    context = make_context()

    def fail() -> bool:
        raise RuntimeError("from the callback")

    context.set_abort_callback(fail)
    with pytest.raises(RuntimeError, match="from the callback"):
        context.decode(random_tokens(100))
    context.set_abort_callback(lambda: context.memory.clear())
    with pytest.raises(ContextError, match="busy"):
        context.decode(random_tokens(100))
    context.set_abort_callback(lambda: context.close())
    with pytest.raises(ContextError, match="busy"):
        context.decode(random_tokens(100))
    with pytest.raises(ParamsError, match="callback"):
        context.set_abort_callback(5)
    context.set_abort_callback(None)
    context.decode([5])


@pytest.mark.skipif(sys.platform == "win32", reason="no timer signals")
def test_a_signal_does_not_wait_for_a_long_decode(make_context: MakeContext) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt(*_args: object) -> None:
        raise Interrupt

    context = make_context(n_ctx=8192, n_batch=8192)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupt):
            context.decode(random_tokens(8000))
        taken = time.monotonic() - start
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert context.memory.seq_pos_max() < 7999
    assert taken < 5


def test_threads_take_turns(make_context: MakeContext) -> None:
    prompts = [random_tokens(30, seed) for seed in range(4)]
    expected = []
    for prompt in prompts:
        context = make_context()
        expected.append("".join(context.generate(prompt, 20, GREEDY)))

    shared = make_context(n_ctx=1024, n_seq_max=4)
    texts: dict[int, str] = {}

    def work(seq_id: int) -> None:
        texts[seq_id] = "".join(shared.generate(prompts[seq_id], 20, GREEDY, seq_id=seq_id))

    threads = [threading.Thread(target=work, args=(seq_id,)) for seq_id in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[seq_id] for seq_id in range(4)] == expected


def test_closing_waits_for_another_thread(make_context: MakeContext) -> None:
    context = make_context(n_ctx=4096, n_batch=4096)
    started = threading.Event()
    results = []
    context.set_abort_callback(lambda: started.set() or False)

    def work() -> None:
        context.decode(random_tokens(1000))
        results.append("decoded")

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(10)
    context.close()
    results.append("closed")
    thread.join()
    assert results in (["decoded", "closed"], ["closed", "decoded"])  # the order of the two appends is open
    with pytest.raises(ContextError, match="closed"):
        context.decode([5])


# each line is what an object of the process before raises in a process that was forked, or what came of it
FORKED = """
import gc, os, sys, threading
import numpy as np
from llamamix import Batch, Context, LlamamixError, MixedKVCache, Model, SBatch, Trace
from llamamix.attention import FlashAttnExt
from llamamix.params import SamplingParams
from llamamix.sampling import Sampler

model = Model(sys.argv[1])
context, held = (Context(model, n_ctx=256, n_threads=2, kv_mixed="hot=64") for _ in range(2))
context.decode([5, 6, 7])
pieces = context.generate([8, 9], 20, SamplingParams(temperature=0))
next(pieces)
inner = MixedKVCache.from_context(context)
cache = MixedKVCache(hot=8, cold_size=8, sink=0)
batch = Batch()
batch.add(5, 0, 0)
sbatch = SBatch(batch)
sampler = Sampler(model, SamplingParams())
trace = Trace(context)
trace.start()
rows = np.zeros((1, 1, 1, 32), np.float32)
flash = FlashAttnExt(rows, rows, rows, types="f32", n_threads=2)
flash.compute()
before = context.memory.seq_pos_max()

# another thread has the lock of a context, and will never give it back in the other process
locked, done = threading.Event(), threading.Event()

def hold():
    with held._handle:
        locked.set()
        done.wait()

thread = threading.Thread(target=hold)
thread.start()
locked.wait()

pid = os.fork()
if pid == 0:
    def fresh(**params):
        with Context(Model(sys.argv[1]), n_ctx=256, **params) as another:
            another.decode([5, 6, 7])
            return another.memory.seq_pos_max()

    for name, use in {
        "decode": lambda: context.decode([5]),
        "locked": lambda: held.decode([5]),
        "memory": lambda: context.memory.seq_rm(0),
        "stats": lambda: context.stats,
        "state": lambda: context.state_save(),
        "generate": lambda: next(pieces),
        "model": lambda: model.tokenize("a"),
        "context of the model": lambda: Context(model),
        "sampler": lambda: sampler.sample(np.zeros(400, np.float32)),
        "cache": lambda: cache.seq_rm(0),
        "tier": lambda: cache.hot.used,
        "cache of a context": lambda: inner.hot.used,
        "sbatch": lambda: sbatch.split_simple(1),
        "trace": lambda: trace.read(),
        "flash": lambda: flash.compute(),
        "two threads": lambda: fresh(n_threads=2),
        "more threads": lambda: fresh(n_threads=1, n_threads_batch=2),
        "one thread": lambda: fresh(n_threads=1),
    }.items():
        try:
            result = use()
        except LlamamixError as error:
            result = f"{type(error).__name__}: {error}"
        print(name, "|", result, flush=True)
    for closed in (trace.stop, context.close, held.close, cache.close, inner.close, sbatch.close, sampler.close, flash.close):
        closed()
    print("closed", "|", context._handle.closed, flush=True)
    del model, context, held, cache, inner, sbatch, sampler, trace, flash, pieces, closed
    gc.collect()
    sys.exit(7)
print("exit", "|", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
done.set()
thread.join()
# nothing of this process was freed
context.decode([5])
print("parent", "|", context.memory.seq_pos_max() - before, len(trace.read()) > 0, next(pieces) != "", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_is_refused_what_another_one_made(tiny_model_path: Path) -> None:
    env = environment(LLAMAMIX_LIB_PATH=str(library_dir()))
    command = [sys.executable, "-c", FORKED, str(tiny_model_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    found = dict(line.split(" | ") for line in result.stdout.splitlines())
    why = "from which this one was forked; make another one here, or start processes with the method 'spawn'."
    error_of = {
        "decode": ("ContextError", "context"), "locked": ("ContextError", "context"), "memory": ("ContextError", "context"),
        "stats": ("ContextError", "context"), "state": ("ContextError", "context"), "generate": ("ContextError", "sampler"),
        "model": ("ModelError", "model"), "context of the model": ("ModelError", "model"),
        "sampler": ("ContextError", "sampler"), "cache": ("CacheError", "cache"), "tier": ("CacheError", "cache"),
        "cache of a context": ("ContextError", "context"), "sbatch": ("LlamamixError", "sbatch"),
        "trace": ("ContextError", "context"), "flash": ("LlamamixError", "graph"),
    }  # fmt: skip
    for name, (error, what) in error_of.items():
        assert found.pop(name) == f"{error}: The {what} belongs to the process that made it, {why}"
    for name in ("two threads", "more threads"):
        if b"OPENMP = 1" in ffi.string(lib.llama_print_system_info()):
            assert found.pop(name).startswith("ContextError: This process was forked from one that had computed with")
        else:  # ggml starts threads of its own
            assert found.pop(name) == "2"
    assert found == {"one thread": "2", "closed": "True", "exit": "7", "parent": "1 True True"}


def test_n_threads(make_context: MakeContext) -> None:
    context = make_context(n_threads=2, n_threads_batch=3)
    assert (context.n_threads, context.n_threads_batch) == (2, 3)
    context.set_n_threads(1)
    assert (context.n_threads, context.n_threads_batch) == (1, 1)
    context.set_n_threads(1, 2)
    assert (context.n_threads, context.n_threads_batch) == (1, 2)
    for bad in (0, -1, 513, 1.5, None):
        with pytest.raises(ParamsError):
            context.set_n_threads(bad)


def test_perf(make_context: MakeContext) -> None:
    context = make_context()
    assert (context.perf.n_p_eval, context.perf.n_eval, context.perf.eval_per_second) == (0, 0, 0.0)
    context.decode(random_tokens(50))
    for _ in range(3):
        context.decode([5])
    perf = context.perf
    assert (perf.n_p_eval, perf.n_eval) == (50, 3)
    assert perf.p_eval_per_second == pytest.approx(50e3 / perf.t_p_eval_ms)
    assert perf.eval_per_second == pytest.approx(3e3 / perf.t_eval_ms)
    context.perf_reset()
    assert (context.perf.n_p_eval, context.perf.n_eval) == (0, 0)


def test_sizes(make_context: MakeContext) -> None:
    context = make_context(n_ctx=1000, n_seq_max=2, n_batch=128, n_ubatch=64)
    assert (context.n_ctx, context.n_ctx_seq, context.n_seq_max) == (1024, 512, 2)
    assert (context.n_batch, context.n_ubatch) == (128, 64)
    shared = make_context(n_ctx=1000, n_seq_max=2, kv_unified=True)
    assert (shared.n_ctx, shared.n_ctx_seq) == (1024, 1024)
    trained = make_context(n_ctx=0)
    assert trained.n_ctx == 8192
