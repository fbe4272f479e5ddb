"""llama-server on our libllama with the mixed KV cache, through the official OpenAI client.

Greedy texts are compared with Context, token for token. They are well-defined where the best token leads by more than
rounding can move it (MARGIN), and where the same tokens are cold at the same time, or cold rows lose nothing (f16).
"""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamamix import Context, KVMixedParams, Model, ServerError
from llamamix.server import Server, find_server

openai = pytest.importorskip("openai", reason="the openai package is not installed")

try:
    PROGRAM = find_server()
except ServerError as error:
    pytest.skip(str(error), allow_module_level=True)

SPEC = "hot=64,group=16,sink=4"
LOSSLESS = f"{SPEC},cold=f16"
GRAMMAR = "root ::= [ a-z]+"  # plain letters, and no end
MARGIN = 0.02  # logits have a standard deviation of 3; another order of summation moves them by less than 1e-3
DEADLINE = 60.0  # seconds


@dataclass
class Running:
    """A server, a client of it, and its log."""

    server: Server
    client: Any
    log: list[str] = field(default_factory=list)

    def complete(self, prompt: Sequence[int], n: int, **options: Any) -> Any:
        """A greedy completion of n tokens; options that are not OpenAI's go to ``extra_body``."""
        extra = {"grammar": GRAMMAR, "ignore_eos": True} | options.pop("extra", {})
        return self.client.completions.create(
            model="tiny", prompt=list(prompt), max_tokens=n, temperature=0, extra_body=extra, **options
        )

    def text(self, prompt: Sequence[int], n: int, **extra: Any) -> str:
        answer = self.complete(prompt, n, extra=extra)
        assert answer.usage.completion_tokens == n and answer.usage.prompt_tokens == len(prompt)
        return answer.choices[0].text

    def call(self, path: str, **body: Any) -> tuple[int, Any]:
        """One of llama-server's own endpoints: the status and the answer."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(
            f"{self.server.url}{path}", data, {"Content-Type": "application/json"}, method="POST" if body else "GET"
        )
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def busy(self) -> list[bool]:
        return [slot["is_processing"] for slot in self.call("/slots")[1]]

    def wait_idle(self) -> None:
        poll(lambda: not any(self.busy()), "all slots to be idle")

    def errors(self) -> list[str]:
        return [line for line in self.log if re.match(r"^[\d.]+ E ", line)]


def poll(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"waited {DEADLINE:g} s for {what}"


@pytest.fixture
def serve(tiny_model_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts servers of the tiny model: one slot of 512 tokens unless asked otherwise."""
    running: list[Running] = []

    def start(*args: str, spec: str | None = SPEC, n_ctx: int = 512, n_slots: int = 1, model: Path = tiny_model_path):
        log: list[str] = []
        flags = ["-c", n_ctx * n_slots, "-np", n_slots, "-t", 1, "-tb", 1, "--port", 0, "--no-warmup", *args]
        server = Server(
            ["-m", model, *map(str, flags)], spec and KVMixedParams.parse(spec), program=PROGRAM, on_line=log.append
        )
        client = openai.OpenAI(base_url="http://127.0.0.1", api_key="none", timeout=DEADLINE, max_retries=0)
        running.append(Running(server, client, log))
        client.base_url = f"{server.wait_ready(DEADLINE)}/v1/"
        return running[-1]

    yield start
    for item in running:
        item.client.close()
        item.server.stop()


#
# what greedy texts have to be
#


class Greedy:
    """Chooses tokens as a server with GRAMMAR and temperature 0 does."""

    def __init__(self, model: Model) -> None:
        pieces = [model.token_to_piece(t) for t in range(model.n_vocab)]
        self._allowed = np.array([t for t, piece in enumerate(pieces) if re.fullmatch(rb"[ a-z]+", piece)])
        self.pieces = [piece.decode("utf-8", "replace") for piece in pieces]
        self.margin = np.inf

    def choose(self, logits: np.ndarray) -> int:
        values = logits[self._allowed]
        second, first = np.partition(values, -2)[-2:]
        self.margin = min(self.margin, float(first - second))
        return int(self._allowed[np.argmax(values)])


def expected(model: Model, prompt: Sequence[int], n: int, spec: Any = SPEC, **params: Any) -> tuple[list[int], float]:
    """The n tokens that follow a prompt, and the least lead that one of them had."""
    greedy = Greedy(model)
    with Context(model, **{"n_ctx": 512, "n_threads": 1, "kv_mixed": spec} | params) as context:
        context.decode(list(prompt))
        tokens = [greedy.choose(context.logits[-1])]
        while len(tokens) < n:
            context.decode(tokens[-1:])
            tokens.append(greedy.choose(context.logits[-1]))
    return tokens, greedy.margin


def as_text(model: Model, tokens: Sequence[int]) -> str:
    return "".join(Greedy(model).pieces[t] for t in tokens)


@dataclass
class Case:
    prompt: list[int]
    tokens: list[int]
    text: str


def find_case(model: Model, n_prompt: int, n: int, spec: Any = SPEC, **params: Any) -> Case:
    """A random prompt whose greedy text is well-defined."""
    for seed in range(200):
        prompt = [1, *np.random.default_rng([seed, n_prompt]).integers(3, 380, n_prompt - 1).tolist()]
        tokens, margin = expected(model, prompt, n, spec, **params)
        if margin >= MARGIN:
            return Case(prompt, tokens, as_text(model, tokens))
    raise AssertionError("no prompt has a well-defined text")


#
# texts
#


@pytest.mark.parametrize(
    ("spec", "n_prompt", "flash"),
    # the prompt fits in hot, or cold rows lose nothing: what the server's batches are makes no difference
    [(SPEC, 40, "auto"), (SPEC, 40, "off"), (f"{SPEC},cold=q8_0", 40, "auto"), (LOSSLESS, 300, "auto"), (None, 300, "auto")],
)  # fmt: skip
def test_the_text_of_a_context(
    serve: Callable[..., Running], tiny_model: Model, spec: str | None, n_prompt: int, flash: str
) -> None:
    case = find_case(tiny_model, n_prompt, 60, spec or False, flash_attn=flash)
    assert serve("-fa", flash, spec=spec).text(case.prompt, 60) == case.text


def test_the_cache_is_mixed(serve: Callable[..., Running], tiny_model: Model) -> None:
    """A Q4_0 cache gives another text than a plain one, and the server gives that."""
    case = find_case(tiny_model, 40, 200)
    plain, _ = expected(tiny_model, case.prompt, 200, spec=False)
    assert case.tokens != plain
    assert serve().text(case.prompt, 200) == case.text
    assert serve(spec=None).text(case.prompt, 200) == as_text(tiny_model, plain)


def test_four_slots_at_once(serve: Callable[..., Running], tiny_model: Model) -> None:
    cases = [find_case(tiny_model, n_prompt, 40, LOSSLESS) for n_prompt in (20, 60, 150, 300)]
    running = serve(spec=LOSSLESS, n_slots=4)
    together = threading.Barrier(4)

    def ask(slot: int) -> list[str]:
        together.wait(DEADLINE)
        # again and again, so that the four meet in all phases
        return [running.text(cases[slot].prompt, 40, id_slot=slot, cache_prompt=bool(i % 2)) for i in range(10)]

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, slot) for slot in range(4)]
        poll(lambda: all(running.busy()), "four busy slots")
        for case, answer in zip(cases, answers, strict=True):
            assert answer.result(DEADLINE) == [case.text] * 10
    running.wait_idle()
    assert running.errors() == []


def test_streaming(serve: Callable[..., Running], tiny_model: Model) -> None:
    case = find_case(tiny_model, 40, 60)
    chunks = list(serve().complete(case.prompt, 60, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(texts) == case.text
    assert sum(map(bool, texts)) == 60  # a token each
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    usage = next(chunk.usage for chunk in chunks if chunk.usage)
    assert (usage.prompt_tokens, usage.completion_tokens) == (40, 60)


#
# the prompt cache
#


def test_a_prefix_is_not_computed_again(serve: Callable[..., Running], tiny_model: Model) -> None:
    case = find_case(tiny_model, 300, 40, LOSSLESS)
    running = serve(spec=LOSSLESS)

    def cached(prompt: Sequence[int], text: str) -> int:
        answer = running.complete(prompt, 40)
        assert answer.choices[0].text == text
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached(case.prompt, case.text) == 0
    assert cached(case.prompt, case.text) == 299  # the last token's logits are needed

    # a conversation that goes on: all but the last token of the answer is there
    longer = [*case.prompt, *case.tokens, 11, 12, 13]
    tokens, _ = expected(tiny_model, longer, 40, LOSSLESS)
    assert cached(longer, as_text(tiny_model, tokens)) == 339
    # an edit in the middle, where tokens are cold
    edited = [*case.prompt[:150], 77, *case.prompt[151:]]
    tokens, _ = expected(tiny_model, edited, 40, LOSSLESS)
    assert cached(edited, as_text(tiny_model, tokens)) == 150


def test_chunks_are_shifted_to_where_they_are_again(serve: Callable[..., Running], tiny_model: Model) -> None:
    """--cache-reuse: what follows a cut keeps its rows, hot and cold, and moves."""
    prompt = find_case(tiny_model, 300, 1).prompt
    cut = [*prompt[:100], *prompt[140:]]
    running = serve("--cache-reuse", "32", "--cache-prompt")
    running.text(prompt, 1)
    answer = running.complete(cut, 40)
    # the last token of what is reused is computed, as that of a prefix
    assert answer.usage.prompt_tokens_details.cached_tokens == len(cut) - 1

    greedy = Greedy(tiny_model)
    with Context(tiny_model, n_ctx=512, n_threads=1, kv_mixed=SPEC) as context:
        context.decode(prompt)
        context.memory.seq_rm(0, 100, 140)
        context.memory.seq_add(0, 140, -1, -40)
        context.memory.seq_rm(0, len(cut) - 1, -1)
        tokens = [cut[-1]]
        for _ in range(40):
            context.decode(tokens[-1:])
            tokens.append(greedy.choose(context.logits[-1]))
    assert answer.choices[0].text == as_text(tiny_model, tokens[1:])


#
# slots on disk
#


def test_save_and_restore(serve: Callable[..., Running], tiny_model: Model, tmp_path: Path) -> None:
    prompt = find_case(tiny_model, 200, 1).prompt
    other = find_case(tiny_model, 250, 1).prompt
    running = serve("--slot-save-path", f"{tmp_path}", n_slots=2)

    first = running.text(prompt, 60, id_slot=0)
    status, saved = running.call("/slots/0?action=save", filename="slot.bin")
    # the last token that was generated has not been decoded
    assert (status, saved["n_saved"]) == (200, 259) and saved["n_written"] == (tmp_path / "slot.bin").stat().st_size

    whole = [*prompt, *tiny_model.tokenize(first, add_special=False), 9]

    def continue_in(slot: int) -> tuple[str, int]:
        answer = running.complete(whole, 60, extra={"id_slot": slot})
        return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens

    expected_text, n_cached = continue_in(0)
    assert n_cached >= 200
    fresh = running.text(whole, 60, id_slot=1, cache_prompt=False)
    for slot in (0, 1):
        running.text(other, 60, id_slot=slot)
        status, restored = running.call(f"/slots/{slot}?action=restore", filename="slot.bin")
        assert (status, restored["n_restored"], restored["n_read"]) == (200, 259, saved["n_written"])
        assert continue_in(slot) == (expected_text, n_cached)
    assert fresh != expected_text  # computed at once other tokens are cold: the rows were really used
    assert running.errors() == []


def test_a_full_hot_is_restored_beside_another_slot(
    serve: Callable[..., Running], tiny_model: Model, tmp_path: Path
) -> None:
    """A prompt that fills hot, and one token: the sinks of the other slot are where some of it was."""
    prompt = find_case(tiny_model, 63, 1).prompt
    running = serve("--slot-save-path", f"{tmp_path}", "-kvu", "--no-cache-idle-slots", n_slots=2)
    running.text(prompt, 1, id_slot=0)
    assert running.call("/slots/0?action=save", filename="slot.bin")[0] == 200
    running.text(find_case(tiny_model, 250, 1).prompt, 5, id_slot=1)
    running.text([*reversed(prompt)], 5, id_slot=0)
    status, restored = running.call("/slots/0?action=restore", filename="slot.bin")
    assert (status, restored["n_restored"]) == (200, 63)
    answer = running.complete([*prompt, 9], 1, extra={"id_slot": 0})
    assert answer.usage.prompt_tokens_details.cached_tokens == 63
    assert running.errors() == []


def test_a_slot_of_another_cache_is_refused(
    serve: Callable[..., Running], tiny_model: Model, tmp_path: Path
) -> None:
    case = find_case(tiny_model, 40, 40)
    flags = ("--slot-save-path", f"{tmp_path}")
    for spec, name in ((SPEC, "mixed.bin"), (None, "plain.bin")):
        running = serve(*flags, spec=spec)
        running.text(case.prompt, 1)
        assert running.call("/slots/0?action=save", filename=name)[0] == 200
    mixed = serve(*flags)
    status, answer = mixed.call("/slots/0?action=restore", filename="plain.bin")
    assert status == 400 and "Unable to restore slot" in answer["error"]["message"]
    poll(lambda: any("it was saved without LLAMA_KV_MIXED" in line for line in mixed.errors()), "the reason in the log")
    assert mixed.text(case.prompt, 40) == case.text
    assert serve(*flags, spec=None).call("/slots/0?action=restore", filename="mixed.bin")[0] == 400


#
# at the end of a context
#


def test_a_context_that_shifts(serve: Callable[..., Running], tiny_model: Model) -> None:
    """600 tokens in a context of 256: the text is that of a Context whose owner shifts it in the same way."""
    n_ctx, n = 256, 600
    prompt = find_case(tiny_model, 40, 1).prompt
    running = serve("--context-shift", n_ctx=n_ctx)
    answer = running.complete(prompt, n, extra={"n_keep": 8})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (n, "length")
    poll(lambda: sum("slot context shift" in line for line in running.log) >= 3, "the log to tell of three shifts")

    greedy = Greedy(tiny_model)
    n_keep = 8 + 1  # and the beginning of the text
    with Context(tiny_model, n_ctx=n_ctx, n_threads=1, kv_mixed=SPEC) as context:
        context.decode(prompt)
        tokens = [greedy.choose(context.logits[-1])]
        n_held = len(prompt)
        while len(tokens) < n:
            if n_held + 1 >= n_ctx:
                n_discard = (n_held - n_keep) // 2
                context.memory.seq_rm(0, n_keep, n_keep + n_discard)
                context.memory.seq_add(0, n_keep + n_discard, n_held, -n_discard)
                n_held -= n_discard
            context.decode(tokens[-1:])
            n_held += 1
            tokens.append(greedy.choose(context.logits[-1]))
        assert context.stats.n_migrations > 10
    assert answer.choices[0].text == as_text(tiny_model, tokens)


def test_a_context_that_ends(serve: Callable[..., Running], tiny_model: Model) -> None:
    case = find_case(tiny_model, 40, 40)
    running = serve(n_ctx=256)
    answer = running.complete(case.prompt, 1000)
    assert (answer.choices[0].finish_reason, answer.usage.total_tokens) == ("length", 256)
    assert answer.choices[0].text.startswith(case.text)
    assert running.text(case.prompt, 40, cache_prompt=False) == case.text


def test_a_prompt_that_is_too_long(serve: Callable[..., Running], tiny_model: Model) -> None:
    case = find_case(tiny_model, 40, 40)
    running = serve(n_slots=2)
    for n_prompt in (512, 3000):
        with pytest.raises(openai.BadRequestError, match="exceeds the available context size") as raised:
            running.complete([1] * n_prompt, 5)
        assert raised.value.status_code == 400 and raised.value.type == "exceed_context_size_error"
    assert not any(running.busy())
    assert running.text(case.prompt, 40) == case.text


#
# clients that go away
#


def test_a_client_that_disconnects(serve: Callable[..., Running], tiny_model: Model) -> None:
    case = find_case(tiny_model, 40, 40)
    running = serve("--context-shift", n_slots=2)
    for n_chunks in (1, 5, 100):
        stream = running.complete(case.prompt, 1_000_000, stream=True, extra={"id_slot": 1})
        for _ in range(n_chunks):
            next(stream)
        assert running.busy()[1]
        stream.close()
        running.wait_idle()
        assert running.text(case.prompt, 40, id_slot=1, cache_prompt=False) == case.text
    assert running.errors() == []


def test_a_client_that_disconnects_while_its_prompt_is_computed(
    serve: Callable[..., Running], tiny_model: Model
) -> None:
    n_ctx = 8192
    case = find_case(tiny_model, 40, 40)
    running = serve("-b", "64", "-ub", "32", n_ctx=n_ctx)
    impatient = running.client.with_options(timeout=0.1)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model="tiny", prompt=[5] * (n_ctx - 100), max_tokens=50, temperature=0)
    running.wait_idle()
    assert running.text(case.prompt, 40, cache_prompt=False) == case.text


#
# a real model
#


def test_a_real_conversation(serve: Callable[..., Running], smollm2_path: Path) -> None:
    """The prompt's start is cold when the answer is written."""
    running = serve(spec="hot=32,group=8,sink=4", n_ctx=1024, model=smollm2_path)
    messages: Any = [
        {"role": "system", "content": "You are a helpful assistant who answers in one short sentence."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    answer = running.client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=60)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens > 32

    messages += [
        {"role": "assistant", "content": answer.choices[0].message.content},
        {"role": "user", "content": "And of Italy?"},
    ]
    answer = running.client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=60)
    assert "Rome" in answer.choices[0].message.content
    assert answer.usage.prompt_tokens_details.cached_tokens > 32
    assert running.errors() == []
