"""Texts: chunks as llama-perplexity cuts them, and what comes again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamamix import Context, Model, ParamsError, SamplingParams
from llamamix.eval import Plan, Recall, Text
from llamamix.eval.recall import _order
from llamamix.eval.texts import EvalError, check_names, code, from_file, prose

WORDS = "the man and the thing of it all in a den on the hill at ten, and then "


def text_of(n_chars: int, name: str = "words") -> Text:
    rng = np.random.default_rng(0)
    words = WORDS.split()
    return Text(name, "made up", " ".join(rng.choice(words, n_chars // 3)))


def test_chunks(tiny_model: Model) -> None:
    text = text_of(6000)
    tokens = tiny_model.tokenize(text.text)
    assert tokens[0] == tiny_model.bos
    chunks = text.chunks(tiny_model, 256, 3)
    for i, chunk in enumerate(chunks):
        assert chunk.tokens.dtype == np.int32 and len(chunk.tokens) == 256
        # the model's first token takes the place of another one
        assert chunk.tokens[0] == tiny_model.bos
        assert chunk.tokens[1:].tolist() == tokens[256 * i + 1 : 256 * (i + 1)]
        assert chunk.scored.tolist() == [True] * 255 + [False]
        assert chunk.lookups == ()
    with pytest.raises(ParamsError, match=r"words has \d+ tokens, and 99 chunks of 256 need 25344: .*longer text"):
        text.chunks(tiny_model, 256, 99)
    with pytest.raises(ParamsError, match="and 1 chunk of 65536 needs 65536"):
        text.chunks(tiny_model, 65536, 1)


@pytest.mark.parametrize("n_ctx", [256, 512, 4096])
def test_what_comes_again(tiny_model: Model, n_ctx: int) -> None:
    base = text_of(40_000)
    source = tiny_model.tokenize(base.text, add_special=False)
    chunks = Recall(base).chunks(tiny_model, n_ctx, 2)
    n_lines = min(16, n_ctx // 128)
    for number, chunk in enumerate(chunks):
        tokens = chunk.tokens.tolist()
        assert len(tokens) == len(chunk.scored) == n_ctx and tokens[0] == tiny_model.bos
        assert len(chunk.lookups) == n_lines

        # the passage: n/4 tokens of the text, from n/8 on, and again
        n_passage, first = n_ctx // 4, 1 + n_ctx // 8
        passage = tokens[first : first + n_passage]
        (again,) = [i for i in range(first + 1, n_ctx) if tokens[i : i + n_passage] == passage]
        assert again >= n_ctx / 2  # the prompt leg scores all of it
        n_tail = n_ctx - (again + n_passage)
        assert again - first == 5 * n_ctx // 8 - n_tail - 1 and n_tail < n_ctx / 4
        begun = [i for i in range(len(source)) if source[i : i + n_passage] == passage]
        assert any(number * (n_ctx - n_passage) <= i < (number + 1) * (n_ctx - n_passage) for i in begun)

        # what is scored: the token behind each of the passage, and values
        scored = np.zeros(n_ctx, bool)
        scored[again : again + n_passage - 1] = True
        values = []
        for lookup in chunk.lookups:
            scored[lookup.start - 1 : lookup.end - 1] = True
            value = tokens[lookup.start : lookup.end]
            # with the whole key before it it was there once before, as far back as it says, and not in the passage
            key = tiny_model.tokenize("\nThe word of", add_special=False)
            n = next(n for n in range(1, 60) if tokens[lookup.start - n : lookup.start - n + len(key)] == key)
            line = tokens[lookup.start - n : lookup.end]
            places = [i for i in range(n_ctx) if tokens[i : i + len(line)] == line]
            assert places == [lookup.start - n - lookup.distance, lookup.start - n]
            assert not first - len(line) < places[0] < first + n_passage
            assert lookup.start >= again + n_passage
            values.append(tiny_model.detokenize(value).strip())
        assert (chunk.scored == scored).all()
        assert len(set(values)) == n_lines and all(value.isalpha() for value in values)
        distances = [lookup.distance for lookup in chunk.lookups]
        if n_ctx == 4096:  # several depths, and not asked for in the order of the text
            assert min(distances) < n_ctx / 3 and max(distances) > n_ctx * 0.8
            assert distances not in (sorted(distances), sorted(distances, reverse=True))
    assert chunks[0].tokens.tolist() != chunks[1].tokens.tolist()
    with pytest.raises(ParamsError, match="The text for recall has"):
        Recall(text_of(600)).chunks(tiny_model, n_ctx, 9)


def test_a_context_too_short_for_lines(tiny_model: Model) -> None:
    """A tokenizer of letters makes long lines."""
    with pytest.raises(ParamsError, match="recall needs a longer context than 128 tokens"):
        Recall(text_of(6000)).chunks(tiny_model, 128, 1)


def test_orders() -> None:
    for n in range(1, 25):
        assert sorted(_order(n)) == list(range(n))


def test_a_value_is_found_where_greedy_decoding_gives_it(smollm2_path: Path, botchan_path: Path) -> None:
    """Token for token what a model goes on with behind the key."""
    from llamamix.eval.compare import Reference
    from llamamix.eval.runner import _lookups

    text = Text("botchan", "", botchan_path.read_text(encoding="utf-8"))
    with Model(smollm2_path) as model:
        chunk = Recall(text).chunks(model, 1024, 1)[0]
        for lookup in chunk.lookups[3::4]:  # other values than before, which are not to be found
            chunk.tokens[lookup.start] = chunk.tokens[chunk.lookups[0].start]
        plan = Plan(n_ctx=(1024,), n_decode=256)
        positions = plan.positions(chunk, "decode")
        n_tail = int(min(lookup.start for lookup in chunk.lookups)) - 8
        with Context(model, n_ctx=1024, kv_mixed=False) as context:
            mask = np.zeros(1024, np.int8)
            mask[positions] = 1
            context.decode(chunk.tokens, logits=mask)
            reference = Reference(positions, chunk.tokens[positions + 1], context.logits)
            found = [hit for _, hit in _lookups(chunk, reference.own_scores())]
            greedy = []
            for lookup in sorted(chunk.lookups, key=lambda lookup: -lookup.start):
                context.memory.seq_rm(0, min(n_tail, lookup.start - 1))
                first = context.memory.seq_pos_max() + 1
                value = chunk.tokens[lookup.start : lookup.end].tolist()
                pieces = context.generate(chunk.tokens[first : lookup.start], len(value), SamplingParams(temperature=0))
                greedy.append("".join(pieces) == model.detokenize(value))
        assert found == greedy[::-1] and len(found) == 8
        assert not found[3] and not found[7] and sum(found) >= 3


def test_positions(tiny_model: Model) -> None:
    (plain,) = text_of(6000).chunks(tiny_model, 512, 1)
    (recall,) = Recall(text_of(6000)).chunks(tiny_model, 512, 1)
    plan = Plan(n_ctx=(512,), n_decode=100)
    # llama-perplexity's: from the middle on, and not the last, behind which there is nothing
    assert plan.positions(plain, "prompt").tolist() == list(range(256, 511))
    assert plan.positions(plain, "decode").tolist() == list(range(412, 511))
    sparse = Plan(n_ctx=(512,), stride=8)
    assert sparse.positions(plain, "prompt").tolist() == list(range(256, 511, 8))
    assert sparse.positions(plain, "decode").tolist() == list(range(256, 511))
    # all of a value is scored, whatever the stride
    values = {i for lookup in recall.lookups for i in range(lookup.start - 1, lookup.end - 1)}
    passage = set(np.flatnonzero(recall.scored)) - values
    assert set(sparse.positions(recall, "prompt")) == values | {i for i in passage if i % 8 == 0}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_ctx": (100,)}, "n_ctx"),
        ({"n_ctx": (300,)}, "multiple of 256 tokens, not 300"),
        ({"n_chunks": (0,)}, "chunks"),
        ({"n_ctx": (256, 512, 1024), "n_chunks": (1, 2), "n_decode": 8}, "--chunks has 2 numbers and -c has 3"),
        ({"legs": ("prompt", "left")}, "'left'"),
        ({"legs": ()}, "no leg"),
        ({"n_decode": 1}, "n_decode"),
        ({"n_ctx": (512,), "n_decode": 257}, r"half of a context \(256\), not 257"),
        ({"stride": 0}, "stride"),
        ({"n_batch": 0}, "n_batch"),
        ({"n_ubatch": 0}, "n_ubatch"),
        ({"n_threads": 0}, "n_threads"),
        ({"reference": "q8_0"}, "f16, f32, not 'q8_0'"),
    ],
)
def test_a_plan_that_can_not_be(options: dict, text: str) -> None:
    with pytest.raises(ParamsError, match=text):
        Plan(**options)


def test_contexts_with_their_chunks() -> None:
    assert list(Plan(n_ctx=(512, 1024), n_chunks=(3,)).contexts()) == [(512, 3), (1024, 3)]
    assert list(Plan(n_ctx=(512, 1024), n_chunks=(3, 1)).contexts()) == [(512, 3), (1024, 1)]


#
# where texts come from
#


def test_prose(botchan_path: Path) -> None:
    """The novel, without what the publisher says."""
    text = prose()
    assert text.name == "prose" and text.source == "botchan.txt"
    whole = botchan_path.read_text(encoding="utf-8-sig")
    assert text.text in whole and len(text.text) > 0.9 * len(whole)
    assert "Gutenberg" not in text.text and "EBOOK" not in text.text


def test_code() -> None:
    import argparse
    import platform
    import typing

    text = code()
    for module in (argparse, typing):
        assert Path(module.__file__).read_text(encoding="utf-8") in text.text
    assert text.source.startswith(f"Python {platform.python_version()}: argparse")


def test_code_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(EvalError, match="argparse is not there; give source code with -f"):
        code()


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt").write_text("")
    text = from_file(str(tmp_path / "a.txt"))
    assert (text.name, text.text) == ("a.txt", "some text")
    # sha256sum of these nine letters
    assert text.sha256 == "b94f6f125c79e3a5ffaa826f584c10d52ada669e6762051b826b55776d05aed2"
    with pytest.raises(ParamsError, match="b.txt is empty"):
        from_file(str(tmp_path / "b.txt"))
    check_names(["a", "b"])
    with pytest.raises(ParamsError, match="Two texts are called a;"):
        check_names(["a", "b", "a"])
