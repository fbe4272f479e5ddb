"""Text from a context: pieces, greedy and drawn tokens, stop strings, grammars, chat."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import numpy as np
import pytest
from helpers.tiny_model import random_tokens

from llamamix import Context, ContextError, ContextFullError, Model, ParamsError, SamplingParams
from llamamix.sampling import Sampler
from llamamix.text import TextStream

MakeContext = Callable[..., Context]

GREEDY = SamplingParams(temperature=0)
N_VOCAB = 400


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
