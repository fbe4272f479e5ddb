"""Generations: tokens with their probabilities, how one ends, cancellation, and the async form."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers.tiny_model import write_tiny_model

from llamamix import (
    Context,
    ContextError,
    ContextFullError,
    DecodeAborted,
    GeneratedToken,
    Generation,
    Model,
    ParamsError,
    Sampler,
    SamplingParams,
)
from llamamix.generation import log_softmax, most_likely

MakeContext = Callable[..., Context]

N_VOCAB = 400
GREEDY = SamplingParams(temperature=0)


def by_hand(context: Context, prompt: list[int], n: int) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens, and the logits that each is the best of."""
    tokens, rows = [], []
    context.decode(prompt)
    for _ in range(n):
        rows.append(context.logits[0].astype(np.float64))
        tokens.append(int(rows[-1].argmax()))
        context.decode([tokens[-1]])
    return tokens, rows


#
# tokens
#


def test_tokens_come_with_their_probabilities(tiny_model: Model, make_context: MakeContext) -> None:
    prompt = tiny_model.tokenize("in the")
    expected, rows = by_hand(make_context(), prompt, 20)
    context = make_context()
    generation = context.generate_tokens("in the", 20, GREEDY, top=3)
    for i, token in enumerate(generation):
        assert context.memory.seq_pos_max() + 1 == len(prompt) + i + 1  # it is in the cache
        p = np.exp(rows[i] - rows[i].max())
        p /= p.sum()
        assert (token.id, token.piece) == (expected[i], tiny_model.token_to_piece(expected[i]))
        assert token.logprob == pytest.approx(np.log(p[token.id]), abs=1e-9)  # float64 twice, 400 terms of 1e-16
        assert [t.id for t in token.top] == np.argsort(-rows[i], kind="stable")[:3].tolist()
        assert [t.logprob for t in token.top] == pytest.approx(np.sort(np.log(p))[:-4:-1].tolist(), abs=1e-9)
        assert token.top[0].id == token.id and token.top[0].piece == token.piece
    assert generation.n_tokens == i + 1 == 20
    assert generation.finish_reason == "length"


def test_probabilities_are_those_before_sampling(make_context: MakeContext) -> None:
    """Temperature, bans and the like do not show in them."""
    plain = next(make_context().generate_tokens("in the", 1, GREEDY, top=2))
    banned = SamplingParams(temperature=3.0, top_k=1, logit_bias={plain.id: float("-inf")})
    token = next(make_context().generate_tokens("in the", 1, banned, top=2))
    assert (token.id, token.logprob) == (plain.top[1].id, plain.top[1].logprob)
    assert token.top == plain.top


def test_no_top_by_default_and_all_of_them(make_context: MakeContext) -> None:
    assert next(make_context().generate_tokens("in", 1, GREEDY)).top == ()
    top = next(make_context().generate_tokens("in", 1, GREEDY, top=N_VOCAB)).top
    assert sorted(t.id for t in top) == list(range(N_VOCAB))
    assert sum(np.exp(t.logprob) for t in top) == pytest.approx(1, abs=1e-9)
    for wrong in (-1, N_VOCAB + 1, 1.5, True):
        with pytest.raises(ParamsError, match="top"):
            make_context().generate_tokens("in", 1, top=wrong)


def test_a_character_of_several_tokens_is_the_last_ones(make_context: MakeContext) -> None:
    params = SamplingParams(temperature=0, grammar='root ::= "a\u00fc\u20ac!"')
    tokens = list(make_context().generate_tokens("in", 20, params))
    assert "".join(t.text for t in tokens) == "a\u00fc\u20ac!"
    assert b"".join(t.piece for t in tokens) == "a\u00fc\u20ac!".encode()
    assert [t.text for t in tokens] == ["a", "", "\u00fc", "", "", "\u20ac", "!"]


def test_text_and_tokens_are_the_same(make_context: MakeContext) -> None:
    params = SamplingParams(temperature=1.5, top_k=0, seed=5)
    text = "".join(make_context().generate("in the", 40, params))
    tokens = list(make_context().generate_tokens("in the", 40, params))
    assert b"".join(t.piece for t in tokens).decode("utf-8", "replace") == text


def test_log_softmax_and_most_likely() -> None:
    logits = np.array([1000, 999, -1e30, 1000, -np.inf], np.float32)
    p = np.exp(log_softmax(logits))
    assert p == pytest.approx([1 / (2 + np.exp(-1)), np.exp(-1) / (2 + np.exp(-1)), 0, 1 / (2 + np.exp(-1)), 0])
    assert most_likely(logits, 3).tolist() == [0, 3, 1]
    assert most_likely(logits, 1).tolist() == [0]
    assert most_likely(logits, 0).tolist() == []
    assert most_likely(logits, 9).tolist() == [0, 3, 1, 2, 4]


#
# how it ends
#


def test_why_it_ended(tiny_model: Model, make_context: MakeContext) -> None:
    def reason(make: Callable[..., Generation[Any]], **options: Any) -> tuple[str | None, int]:
        generation = make(**{"prompt": "in the", "max_tokens": 12, "sampling": GREEDY} | options)
        assert generation.finish_reason is None and generation.n_tokens == 0
        for _ in generation:
            pass
        assert list(generation) == []  # it has ended
        return generation.finish_reason, generation.n_tokens

    full = "".join(make_context().generate("in the", 12, GREEDY))
    eos = SamplingParams(temperature=0, logit_bias={tiny_model.eos: 1e9})
    for name in ("generate", "generate_tokens"):
        assert reason(getattr(make_context(), name)) == ("length", 12)
        assert reason(getattr(make_context(), name), sampling=eos) == ("end", 0)
        why, n = reason(getattr(make_context(), name), stop=full[8:10])
        assert why == "stop" and 0 < n < 12
        context = make_context()
        generation = getattr(context, name)(list(range(3, 203)), 100, GREEDY)
        with pytest.raises(ContextFullError):
            list(generation)
        assert (generation.finish_reason, generation.n_tokens) == (None, 57)


def test_the_token_that_completes_a_stop_text_is_the_last(make_context: MakeContext) -> None:
    full = list(make_context().generate_tokens("in the", 30, GREEDY))
    stop = full[6].text + full[7].text
    assert len(stop) > 1
    tokens = list(make_context().generate_tokens("in the", 30, GREEDY, stop=stop))
    assert tokens == full[: len(tokens)] and "".join(t.text for t in tokens).endswith(stop)
    text = "".join(make_context().generate("in the", 30, GREEDY, stop=stop))
    assert text + stop == "".join(t.text for t in tokens)


def test_a_generation_explains_itself(make_context: MakeContext) -> None:
    generation = make_context().generate("in the", 3, GREEDY)
    assert repr(generation) == "<Generation 0 tokens, not ended>"
    list(generation)
    assert repr(generation) == "<Generation 3 tokens, length>"


def test_a_generation_that_is_dropped_ends(tiny_model: Model, make_context: MakeContext) -> None:
    """At once, without waiting for the garbage collector: its sampler is freed."""
    gc.disable()
    try:
        before = {id(o) for o in gc.get_objects() if isinstance(o, Sampler)}
        generation = make_context().generate("in the", 50, SamplingParams(seed=1))
        next(generation)
        (sampler,) = [o for o in gc.get_objects() if isinstance(o, Sampler) and id(o) not in before]
        assert not sampler._chain.closed
        del generation
        assert sampler._chain.closed
    finally:
        gc.enable()


#
# cancellation
#


@pytest.mark.parametrize("name", ["generate", "generate_tokens"])
def test_cancelled_between_tokens(make_context: MakeContext, name: str) -> None:
    context = make_context()
    generation = getattr(context, name)("in the", 50, GREEDY)
    next(generation)
    n = generation.n_tokens
    held = context.memory.held.tokens(0)
    generation.cancel()
    assert len(list(generation)) <= 1  # what was certain of the text
    assert (generation.finish_reason, generation.n_tokens) == ("cancelled", n)
    np.testing.assert_array_equal(context.memory.held.tokens(0), held)
    # the context goes on
    context.decode([5])


def test_cancelled_before_it_began(make_context: MakeContext) -> None:
    context = make_context()
    generation = context.generate("in the", 5)
    generation.cancel()
    assert list(generation) == [] and generation.finish_reason == "cancelled"
    assert context.memory.seq_pos_max() == -1


def test_cancelled_while_a_long_prompt_is_computed(make_context: MakeContext) -> None:
    context = make_context(n_ctx=1024, n_ubatch=32)
    prompt = np.random.default_rng(0).integers(3, N_VOCAB, 900)
    asked = itertools.count()

    def ask() -> bool:  # the context's own callback is asked first
        if next(asked) == 150:
            generation.cancel()
        return False

    generation = context.generate(prompt, 5, GREEDY)
    context.set_abort_callback(ask)
    assert list(generation) == []
    assert generation.finish_reason == "cancelled" and next(asked) <= 152
    held = context.memory.held.tokens(0)
    assert held is not None and len(held) == context.memory.seq_pos_max() + 1 < 900
    np.testing.assert_array_equal(held, prompt[: len(held)])

    # another one's decode is not given up, and the callback's own word is an exception
    context.set_abort_callback(None)
    context.memory.clear()
    assert len(list(context.generate_tokens(prompt, 3, GREEDY))) == 3
    context.set_abort_callback(lambda: True)
    other = context.generate(prompt[:50], 5, GREEDY)
    with pytest.raises(DecodeAborted):
        list(other)
    assert other.finish_reason is None


def test_cancelled_by_another_thread(make_context: MakeContext) -> None:
    context = make_context(n_ctx=4096)
    generation = context.generate("in the", 4000, GREEDY)
    begun = threading.Event()

    def work() -> None:
        for _ in generation:
            begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(30)
    generation.cancel()
    thread.join(30)
    assert not thread.is_alive()
    assert generation.finish_reason == "cancelled" and 0 < generation.n_tokens < 4000


#
# async
#


def test_async_for(make_context: MakeContext) -> None:
    expected = "".join(make_context().generate("in the", 30, GREEDY))
    context = make_context()
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            await asyncio.sleep(0)

    async def run() -> str:
        task = asyncio.create_task(beat())
        generation = context.generate("in the", 30, GREEDY)
        text = "".join([piece async for piece in generation])
        assert (generation.finish_reason, generation.n_tokens) == ("length", 30)
        with pytest.raises(StopAsyncIteration):
            await generation.__anext__()
        task.cancel()
        return text

    assert asyncio.run(run()) == expected
    assert beats >= 30  # the event loop went on


def test_async_generations_side_by_side(make_context: MakeContext) -> None:
    prompts = ["in the", "of a", "on and"]
    expected = ["".join(make_context().generate(prompt, 20, GREEDY)) for prompt in prompts]
    shared = make_context(n_ctx=768, n_seq_max=3)

    async def text(seq_id: int) -> str:
        return "".join([piece async for piece in shared.generate(prompts[seq_id], 20, GREEDY, seq_id=seq_id)])

    async def run() -> list[str]:
        return await asyncio.gather(*map(text, range(3)))

    assert asyncio.run(run()) == expected


def test_async_tokens_and_chat(make_context: MakeContext) -> None:
    async def run() -> tuple[list[GeneratedToken], str]:
        tokens = [token async for token in make_context().generate_tokens("in the", 5, GREEDY)]
        messages = [{"role": "user", "content": "in"}]
        return tokens, "".join([piece async for piece in make_context().chat(messages, 5, GREEDY)])

    tokens, answer = asyncio.run(run())
    assert tokens == list(make_context().generate_tokens("in the", 5, GREEDY))
    assert answer == "".join(make_context().chat([{"role": "user", "content": "in"}], 5, GREEDY))


def test_a_cancelled_task_leaves_its_context_at_once(make_context: MakeContext) -> None:
    context = make_context(n_ctx=4096)

    async def run() -> None:
        generation = context.generate(np.random.default_rng(0).integers(3, N_VOCAB, 2000), 1000, GREEDY)

        async def consume() -> None:
            async for _ in generation:
                pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not context._handle._lock.locked()  # no thread computes any more
        assert generation.finish_reason in (None, "cancelled")
        n = context.memory.seq_pos_max()
        await asyncio.sleep(0.05)
        assert context.memory.seq_pos_max() == n
        assert [piece async for piece in generation] == [] and generation.finish_reason == "cancelled"

    asyncio.run(run())


def test_an_exception_comes_out_of_async_for(make_context: MakeContext) -> None:
    async def run() -> str:
        text = ""
        with pytest.raises(ContextFullError):
            async for piece in make_context().generate(list(range(3, 243)), 100, GREEDY):
                text += piece
        return text

    assert asyncio.run(run())


#
# samplers of one's own
#


def test_a_sampler_goes_on_and_stays_open(tiny_model: Model, make_context: MakeContext) -> None:
    params = SamplingParams(temperature=1.5, top_k=0, seed=3)
    expected = list(make_context().generate_tokens("in the", 20, params))
    context = make_context()
    with Sampler(tiny_model, params) as sampler:
        first = list(context.generate_tokens("in the", 8, sampler))
        again = list(context.generate_tokens([first[-1].id], 1, GREEDY))  # not the sampler's
        assert len(again) == 1
        context.memory.seq_rm(0, len(tiny_model.tokenize("in the")) + 7)
        rest = list(context.generate_tokens([first[-1].id], 12, sampler))
    assert first + rest == expected
    with pytest.raises(ContextError, match="sampler is closed"):
        list(context.generate("in", 1, sampler))


def test_a_sampler_of_another_model(tmp_path: Any, make_context: MakeContext) -> None:
    with (
        Model(write_tiny_model(tmp_path / "m.gguf", n_layer=1, n_vocab=500), vocab_only=True) as other,
        Sampler(other, GREEDY) as sampler,
        pytest.raises(ParamsError, match="another model, with 500 tokens, not 400"),
    ):
        make_context().generate("in", 1, sampler)
