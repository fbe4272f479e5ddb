"""Context.chat(): what of a conversation is computed, and that the answer is that of an empty cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_model import write_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from llamamix import Context, ContextFullError, DecodeAborted, Model, ParamsError, SamplingParams
from llamamix.held import common_prefix

MakeContext = Callable[..., Context]
Messages = list[dict[str, Any]]

GREEDY = SamplingParams(temperature=0)

# F32 throughout: a kept prefix was computed in other batches, which moves logits (standard deviation 3) by some
# 1e-5. The best of 400 leads by more in all but very few rows, so greedy texts are the same.
F32: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
# one that loses nothing when tokens become cold
LOSSLESS = {"kv_mixed": "hot=64,group=16,sink=4,cold=f32"}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


LONG = "the thing and the other in order to be on the inner end of the string " * 3


def prompt_of(model: Model, messages: Messages) -> list[int]:
    return model.tokenize(model.apply_chat_template(messages), parse_special=True)


def held(context: Context, seq_id: int = 0) -> list[int] | None:
    tokens = context.memory.held.tokens(seq_id)
    return None if tokens is None else tokens.tolist()


def answer(context: Context, messages: Messages, n: int = 10, **options: Any) -> tuple[str, int]:
    """The greedy answer, and how many tokens were computed for it."""
    context.perf_reset()
    text = "".join(context.chat(messages, n, GREEDY, **options))
    return text, context.perf.n_p_eval + context.perf.n_eval


def check(context: Context, fresh: Context, messages: Messages, n_kept: int, n: int = 10, **options: Any) -> str:
    """Answer, and compare with a context that holds nothing; ``n_kept`` tokens of the prompt are not computed."""
    before = len(prompt_of(context.model, messages))
    text, n_computed = answer(context, messages, n, **options)
    assert (context.n_kept, n_computed) == (n_kept, before - n_kept + n)
    fresh.memory.clear()
    assert (text, before + n) == answer(fresh, messages, n)
    assert fresh.n_kept == 0
    return text


def common(context: Context, messages: Messages, seq_id: int = 0) -> int:
    tokens, prompt = held(context, seq_id), prompt_of(context.model, messages)
    assert tokens is not None
    n = next((i for i, pair in enumerate(zip(tokens, prompt, strict=False)) if pair[0] != pair[1]), None)
    return min(len(tokens), len(prompt) - 1) if n is None else n


@pytest.mark.parametrize("kv_mixed", [{"kv_mixed": False}, LOSSLESS], ids=["plain", "mixed"])
def test_a_second_turn_costs_its_own_tokens(make_context: MakeContext, kv_mixed: dict[str, Any]) -> None:
    context, fresh = (make_context(n_ctx=4608, **F32, **kv_mixed) for _ in range(2))
    messages = [user(LONG * 40)]
    assert len(prompt_of(context.model, messages)) > 4000
    text = check(context, fresh, messages, 0)
    # what the model wrote need not be what the tokenizer makes of it, but the first turn is the same
    messages += [assistant(text), user("and the other?")]
    n = common(context, messages)
    assert n >= len(prompt_of(context.model, messages[:1]))
    check(context, fresh, messages, n)
    # the same again: all but the last token of the prompt is there
    check(context, fresh, messages, len(prompt_of(context.model, messages)) - 1)
    # and back to the first turn
    check(context, fresh, messages[:1], len(prompt_of(context.model, messages[:1])) - 1)
    if kv_mixed is LOSSLESS:
        assert context.stats is not None and context.stats.n_tokens_moved > 3900


def test_real_turns_of_a_real_model(smollm2_path: Path) -> None:
    """Greedy answers that come back as the same tokens: a turn costs its message and the answer."""
    with Model(smollm2_path) as model, Context(model, n_ctx=1024, n_threads=1) as context:
        messages = [user("Name three colours.")]
        text, n_computed = answer(context, messages, 24)
        n_first = len(prompt_of(model, messages))
        n_answer = context.memory.seq_pos_max() + 1 - n_first
        assert n_computed == n_first + n_answer
        messages += [assistant(text), user("And three animals?")]
        _, n_computed = answer(context, messages, 1)
        assert context.n_kept == n_first + n_answer
        assert n_computed == len(prompt_of(model, messages)) - context.n_kept + 1


def test_another_conversation_keeps_what_is_the_same(make_context: MakeContext) -> None:
    context, fresh = (make_context(n_ctx=512, **F32) for _ in range(2))
    system = {"role": "system", "content": LONG}
    answer(context, [system, user("in")])
    messages = [system, user("on")]
    n = common(context, messages)
    assert n > len(prompt_of(context.model, [system])) - 20
    check(context, fresh, messages, n)
    other = [user("the")]
    check(context, fresh, other, common(context, other))  # what begins every text


def test_sequences_have_conversations_of_their_own(make_context: MakeContext) -> None:
    context, fresh = make_context(n_ctx=1024, n_seq_max=2, **F32), make_context(n_ctx=512, **F32)
    first, second = [user(LONG)], [user(f"on {LONG}")]
    check(context, fresh, first, 0, seq_id=0)
    check(context, fresh, second, 0, seq_id=1)
    for seq_id, messages in enumerate((first, second)):
        check(context, fresh, messages, len(prompt_of(context.model, messages)) - 1, seq_id=seq_id)


def test_generated_text_and_decoded_tokens_count_as_well(make_context: MakeContext) -> None:
    context, fresh = (make_context(n_ctx=512, **F32) for _ in range(2))
    messages = [user(LONG)]
    prompt = prompt_of(context.model, messages)
    context.decode(prompt[:50])
    list(context.generate(prompt[50:60], 3, GREEDY))
    check(context, fresh, messages, 60)
    context.memory.seq_rm(0, 30)
    check(context, fresh, messages, 30)
    context.memory.seq_rm(0, 30, 40)  # a gap: what is behind it is no longer what it was
    check(context, fresh, messages, 0)


def test_after_what_changes_a_cache_otherwise(make_context: MakeContext) -> None:
    context, fresh = (make_context(n_ctx=512, **F32) for _ in range(2))
    messages = [user(LONG)]

    def loaded() -> None:
        context.state_load(context.state_save())

    def shifted() -> None:
        context.memory.seq_rm(0, 4, 8)
        context.memory.seq_add(0, 8, -1, -4)

    for change in (context.memory.clear, lambda: context.memory.seq_rm(-1), shifted, loaded):
        answer(context, messages)
        change()
        check(context, fresh, messages, 0)
        check(context, fresh, messages, len(prompt_of(context.model, messages)) - 1)


def test_a_conversation_that_does_not_fit_changes_nothing(make_context: MakeContext) -> None:
    context = make_context(**F32)
    messages = [user("the inner string")]
    answer(context, messages, 3)
    tokens = held(context)
    with pytest.raises(ContextFullError, match=r"would have \d+ tokens, and the context holds 256"):
        list(context.chat([*messages, assistant("no"), user(LONG * 3)]))
    assert held(context) == tokens and context.memory.seq_pos_max() == len(tokens or []) - 1


@pytest.mark.parametrize(
    "arguments",
    [{"messages": []}, {"max_tokens": 0}, {"seq_id": 1}, {"stop": ""}, {"tools": "x"}, {"template": "{% x %}"}],
    ids=ascii,
)  # fmt: skip
def test_what_chat_refuses_changes_nothing(make_context: MakeContext, arguments: dict[str, Any]) -> None:
    context = make_context()
    context.decode([5, 6, 7])
    with pytest.raises(Exception) as caught:
        context.chat(**{"messages": [user("in")]} | arguments)
    assert type(caught.value).__module__ == "llamamix.errors"
    assert held(context) == [5, 6, 7]


def test_a_decode_that_was_aborted(make_context: MakeContext) -> None:
    """The ubatches that were finished are in the cache, and known."""
    context, fresh = (make_context(n_ctx=512, n_ubatch=32, **F32) for _ in range(2))
    messages = [user(LONG)]
    prompt = prompt_of(context.model, messages)
    context.set_abort_callback(lambda: context_calls() > 200)
    calls = iter(range(10**9))

    def context_calls() -> int:
        return next(calls)

    with pytest.raises(DecodeAborted):
        list(context.chat(messages))
    context.set_abort_callback(None)
    n = context.memory.seq_pos_max() + 1
    assert 0 < n < len(prompt) and n % 32 == 0
    assert held(context) == prompt[:n]
    check(context, fresh, messages, n)


def test_tools_variables_and_templates_reach_the_text(make_context: MakeContext) -> None:
    context = make_context(n_ctx=512)
    template = "{{ messages[0].content }} {{ tools | length }} {{ depth }}"
    tool = {"type": "function", "function": {"name": "f"}}
    list(context.chat([user("in")], 1, tools=[tool], variables={"depth": 3}, template=template))
    assert held(context)[:-1] == context.model.tokenize("in 1 3")  # type: ignore[index]


#
# caches that can not go back anywhere
#


@pytest.fixture(scope="module", params=["gemma4", "lfm2"])
def narrow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Models with sliding windows of 64 tokens, and with recurrent layers."""
    shape: dict[str, Any] = {"n_layer": 6} if request.param == "gemma4" else {"n_embd": 256}
    path = write_tiny_model(tmp_path_factory.mktemp("models") / "m.gguf", arch=request.param, **shape)
    with Model(path) as model:
        yield model


@pytest.mark.parametrize("kv_mixed", [{"kv_mixed": False}, LOSSLESS], ids=["plain", "mixed"])
def test_a_cache_that_can_not_go_back(
    narrow: Model, make_context: MakeContext, kv_mixed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    options = F32 | kv_mixed | {"n_ctx": 1024, "n_ubatch": 64, "swa_full": False}
    context, fresh = (make_context(narrow, **options) for _ in range(2))
    caplog.set_level(logging.WARNING, "llamamix")
    messages = [user(LONG * 3)]
    check(context, fresh, messages, 0)
    n_prompt = len(prompt_of(narrow, messages))
    assert context.memory.seq_pos_min() > 64 or not narrow.n_swa

    # far back: the windows are gone, and so are the states
    other = [user(LONG), assistant("on"), user("the")]
    n = common(context, other)
    check(context, fresh, other, 0)
    (record,) = caplog.records
    why = "sliding windows are gone" if narrow.n_swa else "recurrent layers have no way back"
    assert why in record.getMessage() and f"the first {n} are those of the conversation" in record.getMessage()

    # nothing has to be undone where a conversation goes on from all that is held
    caplog.clear()
    context.memory.clear()
    context.decode(prompt_of(narrow, messages)[:-5])
    check(context, fresh, messages, n_prompt - 5)
    assert caplog.records == []

    # a step back stays within the windows
    check(context, fresh, messages, n_prompt - 1 if narrow.n_swa else 0)
    assert len(caplog.records) == (0 if narrow.n_swa else 1)


#
# which tokens are held
#


@pytest.mark.parametrize("n_seq_max", [1, 3])
@pytest.mark.parametrize("kv_unified", [True, False])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_known_tokens_are_those_of_the_cache(
    tiny_model: Model, kv_unified: bool, n_seq_max: int, data: st.DataObject
) -> None:
    """A twin that knows every position's token, by what the operations are said to do."""
    seqs = st.integers(0, n_seq_max - 1)
    ends = st.integers(-1, 30)
    with Context(
        tiny_model, n_ctx=256 * n_seq_max, n_seq_max=n_seq_max, n_threads=1, kv_unified=kv_unified, kv_mixed=False
    ) as context:
        memory = context.memory
        twin: list[dict[int, int]] = [{} for _ in range(n_seq_max)]
        plain = [True] * n_seq_max  # nothing has happened to it, since it was empty, but tokens at its end
        for _ in range(data.draw(st.integers(1, 8))):
            seq = data.draw(seqs)
            own = twin[seq]
            operation = data.draw(st.sampled_from(["decode", "batch", "rm", "cp", "keep", "add", "state"]))
            if operation in ("decode", "batch"):
                into = [seq] if operation == "decode" else list(range(n_seq_max))
                n = data.draw(st.integers(1, 8)) if operation == "decode" else 1
                tokens = data.draw(st.lists(st.integers(3, 399), min_size=n * len(into), max_size=n * len(into)))
                context.decode_batch(tokens, np.repeat(into, n))
                for i, each in enumerate(into):
                    plain[each] |= not twin[each]
                    twin[each].update(enumerate(tokens[n * i : n * i + n], max(twin[each], default=-1) + 1))
            elif operation == "rm":
                p0, p1 = max(0, data.draw(ends)), data.draw(ends)
                memory.seq_rm(seq, p0, p1)
                twin[seq] = {p: t for p, t in own.items() if not (p0 <= p and (p1 < 0 or p < p1))}
                plain[seq] = not twin[seq] or (plain[seq] and not 0 <= p1 <= max(twin[seq]))
            elif operation == "cp":
                dst, p1 = data.draw(seqs), data.draw(ends)
                try:
                    memory.seq_cp(seq, dst, 0, p1)
                except ParamsError:
                    continue
                if dst != seq:
                    plain[dst] = plain[seq] and not twin[dst]
                    twin[dst].update({p: t for p, t in own.items() if p1 < 0 or p < p1})
            elif operation == "keep":
                memory.seq_keep(seq)
                twin = [each if i == seq else {} for i, each in enumerate(twin)]
                plain = [plain[seq] if i == seq else True for i in range(n_seq_max)]
            elif operation == "add":
                memory.seq_add(seq, 0, -1, 0)
                for i in range(n_seq_max) if kv_unified else (seq,):  # they may share cells
                    plain[i], twin[i] = False, dict.fromkeys(twin[i], -1)
            else:
                context.state_load(context.state_save())
                plain, twin = [False] * n_seq_max, [dict.fromkeys(each, -1) for each in twin]
            for i, each in enumerate(twin):
                known = held(context, i)
                assert known is None or dict(enumerate(known)) == each
                assert known is not None or not plain[i]


def test_common_prefix() -> None:
    def n(a: list[int], b: list[int]) -> int:
        return common_prefix(np.array(a, np.int32), np.array(b, np.int32))

    assert [n([], [1]), n([1, 2], [1, 2, 3]), n([1, 2, 3], [1, 4, 3]), n([2], [1]), n([1, 2], [1, 2])] == [
        0,
        2,
        1,
        0,
        2,
    ]
