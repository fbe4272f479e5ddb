"""Samplers: chains of links, grammars, JSON schemas."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamamix import (
    Context,
    ContextError,
    LibraryError,
    Model,
    ParamsError,
    Sampler,
    SamplingParams,
    ServerError,
    _ffi,
    json_schema_to_grammar,
)
from llamamix.samplers import (
    Draw,
    Dry,
    Greedy,
    Link,
    LogitBias,
    MinP,
    Mirostat,
    Penalties,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
    Xtc,
    links_of,
)
from llamamix.server import Server, find_server

MakeContext = Callable[..., Context]

N_VOCAB = 400

# 7, 8, 9 and 10 with probabilities 0.5, 0.3, 0.15 and 0.05; all others together have 1e-6
LOGITS = np.full(N_VOCAB, -20, np.float32)
LOGITS[[7, 8, 9, 10]] = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def draw(model: Model, links: list[Link], n: int = 200, logits: np.ndarray = LOGITS) -> list[int]:
    with Sampler(model, links) as sampler:
        return [sampler.sample(logits) for _ in range(n)]


#
# links
#


@pytest.mark.parametrize(
    ("links", "drawn"),
    [
        ([Draw(1)], {7, 8, 9, 10}),
        ([TopK(2), Draw(1)], {7, 8}),
        ([TopP(0.9), Draw(1)], {7, 8, 9}),
        ([TopP(0.1, min_keep=3), Draw(1)], {7, 8, 9}),
        ([MinP(0.2), Draw(1)], {7, 8, 9}),
        # entropy 1.14: 8 with surprise 1.2 is the most typical, then 7 with 0.69
        ([Typical(0.2), Draw(1)], {8}),
        # the logits' standard deviation is 1.9, their maximum log(0.5): within 0.5 of it are 7 and 8, within 0.1 only 7
        ([TopNSigma(0.5), Draw(1)], {7, 8}),
        ([TopNSigma(0.1), Draw(1)], {7}),
        # over 0.1 are 7, 8 and 9, of which the least likely stays
        ([Xtc(1.0, 0.1, seed=1), Draw(1)], {9, 10}),
        ([Xtc(0.0, 0.1, seed=1), Draw(1)], {7, 8, 9, 10}),
        ([Temperature(0.05), Draw(1)], {7}),
        ([Temperature(0), Draw(1)], {7}),
        ([LogitBias({7: float("-inf"), 10: 9.0}), Greedy()], {10}),
        ([Greedy()], {7}),
        # the order matters: at this temperature they have 0.68, 0.25, 0.06 and 0.01
        ([Temperature(0.5), TopP(0.9), Draw(1)], {7, 8}),
        ([TopP(0.9), Temperature(0.5), Draw(1)], {7, 8, 9}),
    ],
    ids=repr,
)
def test_what_links_do(tiny_model: Model, links: list[Link], drawn: set[int]) -> None:
    assert set(draw(tiny_model, links)) == drawn


def test_the_temperature_follows_the_entropy(tiny_model: Model) -> None:
    """Certain candidates are drawn at t - delta, candidates that are all alike at t + delta."""
    certain = np.full(N_VOCAB, -20, np.float32)
    certain[[7, 8]] = [3, 0]  # 0.95 to 0.05: an entropy of 0.2 of the log(400) = 6 that there could be
    links: list[Link] = [Temperature(1.0, delta=0.99), Draw(1)]
    assert set(draw(tiny_model, links, logits=certain)) == {7}
    assert set(draw(tiny_model, [Temperature(1.0), Draw(1)], logits=certain)) == {7, 8}


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_aims_at_a_surprise(tiny_model: Model, version: int) -> None:
    logits = -1.1 * np.log(np.arange(1, N_VOCAB + 1, dtype=np.float32))  # Zipf's law
    surprise = -(logits - np.log(np.exp(logits).sum())) / np.log(2)
    low, high = (draw(tiny_model, [Mirostat(tau, seed=1, version=version)], 1000, logits)[300:] for tau in (3, 5))
    # it draws from the most likely tokens, as many as the target asks for
    assert max(low) < 50 and max(high) > 100
    assert surprise[low].mean() + 1 < surprise[high].mean()


def test_penalties_and_dry(tiny_model: Model) -> None:
    logits = np.linspace(5, 1, N_VOCAB, dtype=np.float32)  # the lower the token the more likely, by 0.01
    assert draw(tiny_model, [Penalties(presence=10.0), Greedy()], 4, logits) == [0, 1, 2, 3]
    assert draw(tiny_model, [Penalties(last_n=2, presence=10.0), Greedy()], 5, logits) == [0, 1, 2, 0, 1]
    # after 20 21 22 20 21 the token 22 would repeat three; other tokens are as before
    best = np.full(N_VOCAB, -5, np.float32)
    best[[22, 30]] = [1.0, 0.9]
    for links, expected in (([Greedy()], 22), ([Dry(1.0, allowed_length=2, breakers=()), Greedy()], 30)):
        with Sampler(tiny_model, links) as sampler:
            sampler.accept([20, 21, 22, 20, 21])
            assert sampler.sample(best) == expected


def test_params_are_a_chain(tiny_model: Model) -> None:
    params = SamplingParams(
        temperature=1.3, top_k=7, top_p=0.9, min_p=0.01, typical_p=0.99, seed=4, repeat_penalty=1.2,
        repeat_last_n=9, frequency_penalty=0.1, presence_penalty=0.2, logit_bias={7: -0.5},
    )  # fmt: skip
    links = [
        LogitBias({7: -0.5}), Penalties(9, 1.2, 0.1, 0.2), TopK(7), Typical(0.99), TopP(0.9), MinP(0.01),
        Temperature(1.3), Draw(4),
    ]  # fmt: skip
    assert links_of(params) == links
    with Sampler(tiny_model, params) as sampler:
        assert list(sampler.links) == links
        assert [sampler.sample(LOGITS) for _ in range(50)] == draw(tiny_model, links, 50)
    assert links_of(SamplingParams(temperature=0)) == [Penalties(64), Greedy()]


@pytest.mark.parametrize(
    ("link", "arguments"),
    [
        (TopK, {"k": -1}), (TopK, {"k": 1.5}), (TopP, {"p": 1.1}), (TopP, {"min_keep": -1}), (MinP, {"p": -0.1}),
        (Typical, {"p": float("nan")}), (TopNSigma, {"n": -1}), (Xtc, {"probability": 2}), (Xtc, {"seed": -1}),
        (Temperature, {"t": -1}), (Temperature, {"delta": float("inf")}), (Draw, {"seed": 2**32 - 1}),
        (Mirostat, {"m": 1}), (Mirostat, {"version": 3}), (Penalties, {"repeat": 0}), (Penalties, {"last_n": -1}),
        (Dry, {"base": 0.5}), (Dry, {"breakers": ("",)}), (LogitBias, {"biases": {1: float("nan")}}),
        (LogitBias, {"biases": [1]}),
    ],
    ids=str,
)  # fmt: skip
def test_links_refuse_what_can_not_work(link: type[Link], arguments: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match=next(iter(arguments)).replace("biases", "logit_bias")):
        link(**arguments)


@pytest.mark.parametrize(
    ("chain", "named"),
    [([], "take a token"), ([TopK(3)], "take a token"), ([Greedy(), TopK(3)], "take a token"), (["greedy"], "links"),
     (7, "links"), ("greedy", "links")],
    ids=str,
)  # fmt: skip
def test_what_is_no_chain(tiny_model: Model, chain: Any, named: str) -> None:
    with pytest.raises(ParamsError, match=named):
        Sampler(tiny_model, chain)
    with pytest.raises(ParamsError, match="not in the vocabulary"):
        Sampler(tiny_model, [LogitBias({N_VOCAB: 1.0}), Greedy()])
    with pytest.raises(ParamsError, match="have one of their own"):
        Sampler(tiny_model, SamplingParams(), grammar='root ::= "a"')


#
# the sampler
#


def test_begin_anew(tiny_model: Model) -> None:
    with Sampler(tiny_model, [Penalties(presence=1.0), Draw(1)], grammar='root ::= "the" "in"*') as sampler:
        first = [sampler.sample(LOGITS) for _ in range(6)]
        second = [sampler.sample(LOGITS) for _ in range(6)]
        sampler.reset()
        assert [sampler.sample(LOGITS) for _ in range(12)] == first + second
    assert first != second


def test_a_closed_sampler(tiny_model: Model) -> None:
    sampler = Sampler(tiny_model)
    assert "closed" not in repr(sampler) and "Draw" in repr(sampler)
    sampler.close()
    sampler.close()
    assert "closed" in repr(sampler)
    for use in (lambda: sampler.sample(LOGITS), lambda: sampler.accept(5), sampler.reset):
        with pytest.raises(ContextError, match="sampler is closed"):
            use()


def test_a_sampler_outlives_its_model(tiny_model_path: Path) -> None:
    with Model(tiny_model_path, vocab_only=True) as model:
        sampler = Sampler(model, [Greedy()], grammar='root ::= "the"')
    assert sampler.sample(LOGITS) > 0
    sampler.close()


def test_what_a_sampler_refuses(tiny_model: Model) -> None:
    with Sampler(tiny_model, [Penalties(presence=9.0), Greedy()]) as sampler:
        for logits in (LOGITS[:-1], LOGITS[None], 7.0):
            with pytest.raises(ParamsError, match="shape"):
                sampler.sample(logits)
        for tokens in (N_VOCAB, -1, [5, N_VOCAB], "the", True):
            with pytest.raises(ParamsError):
                sampler.accept(tokens)
        assert sampler.sample(LOGITS) == 7
        sampler.accept(8)
        assert sampler.sample(LOGITS) == 9


#
# JSON schemas
#

PERSON = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "tame": {"type": "boolean"},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
        "names": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[a-z]{1,3}$"},
            "minItems": 1,
            "maxItems": 2,
        },
    },
    "required": ["kind", "tame", "age", "names"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("schema", [PERSON, json.dumps(PERSON)], ids=["object", "text"])
def test_text_follows_a_schema(make_context: MakeContext, schema: Any) -> None:
    for seed in range(5):
        params = SamplingParams(temperature=2.0, top_k=0, top_p=1, min_p=0, seed=seed, json_schema=schema)
        text = "".join(make_context(n_ctx=512).generate("in the", 400, params))
        value = json.loads(text)
        assert list(value) == list(PERSON["properties"])
        assert value["kind"] in ("cat", "dog") and isinstance(value["tame"], bool) and 0 <= value["age"] <= 30
        assert 1 <= len(value["names"]) <= 2 and all(1 <= len(n) <= 3 and n.islower() for n in value["names"])


def test_grammars_are_the_servers(tiny_model_path: Path) -> None:
    """The converter is llama.cpp's own, and so is what it makes."""
    try:
        program = find_server()
    except ServerError as error:
        pytest.skip(str(error))
    schemas = [
        PERSON,
        {"type": "array", "items": {"anyOf": [{"type": "null"}, {"const": "x"}]}},
        {"$defs": {"n": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"type": "string"}}},
        {"type": "string", "format": "date"},
    ]  # fmt: skip
    flags = ["-c", "256", "-np", "1", "-t", "1", "--port", "0", "--no-warmup"]
    with Server(["-m", tiny_model_path, *flags], None, program=program) as server:
        url = f"{server.wait_ready(60)}/completion"
        for schema in schemas:
            body = json.dumps({"prompt": "in", "n_predict": 1, "json_schema": schema}).encode()
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                settings = json.load(answer)["generation_settings"]
            assert json_schema_to_grammar(schema) == settings["grammar"]


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ("{", "not JSON"),
        ("7", "must be an object"),
        ([], "must be an object"),
        ({"a": {1}}, "not JSON"),
        ({"type": "no such type"}, "no such type"),
        ({"$ref": "https://example.org/schema"}, "\\$ref|ref"),
        ({"$ref": "#/missing"}, "missing"),
        ('{"items":' * 300 + "{}" + "}" * 300, "nests more than 200"),
        ('{"items":' * 100_000 + "{}" + "}" * 100_000, "JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_schema(schema: Any, named: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ParamsError, match=named) as caught:
        json_schema_to_grammar(schema)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert capfd.readouterr() == ("", "")


def test_a_schema_and_a_grammar(make_context: MakeContext) -> None:
    with pytest.raises(ParamsError, match="can not be given together"):
        SamplingParams(grammar='root ::= "a"', json_schema={})
    with pytest.raises(ParamsError, match="json_schema must be"):
        SamplingParams(json_schema=7)  # type: ignore[arg-type]
    with pytest.raises(ParamsError, match="can not be made a grammar"):
        make_context().generate("in", 1, SamplingParams(json_schema={"type": "x"}))


def test_a_library_without_the_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def __getattr__(self, name: str) -> Any:
            raise LibraryError(f"no {name}")

    monkeypatch.setattr("llamamix.grammar.lib", Other())
    with pytest.raises(LibraryError, match="need the library llamamix-schema"):
        json_schema_to_grammar({})
    assert _ffi.lib is not None
