"""The programs in examples/: each runs, and what it computes is what is computed without its devices."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers.paths import ROOT
from helpers.tiny_model import write_tiny_model

import llamamix
from llamamix import Context, Model, Sampler, SamplingParams

MakeContext = Callable[..., Context]

EXAMPLES = ROOT / "examples"
GREEDY = SamplingParams(temperature=0)

# F32 throughout, and cold rows that lose nothing: batches of other sizes move logits (standard deviation 3) by some
# 1e-5, and the best of 400 leads by more in all but very few rows
F32: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
LOSSLESS: dict[str, Any] = F32 | {"kv_mixed": "hot=64,group=16,sink=4,cold=f32"}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(capsys: pytest.CaptureFixture[str], name: str, *args: object) -> str:
    """What an example prints, which the test's log shows as well."""
    env = os.environ | {"PYTHONPATH": str(Path(llamamix.__file__).parents[1])}
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, args)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    with capsys.disabled():
        print(f"\n$ python examples/{name}.py {shlex.join(map(str, args[1:]))}\n{result.stdout}")
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_every_example_has_a_test() -> None:
    own = Path(__file__).read_text(encoding="utf-8")
    assert {path.stem for path in EXAMPLES.glob("*.py")} >= {"batched", "speculative"}
    for path in EXAMPLES.glob("*.py"):
        assert f'run(capsys, "{path.stem}"' in own


#
# batched
#


def test_batched_on_a_real_model(capsys: pytest.CaptureFixture[str], smollm2_path: Path) -> None:
    prompts = [" is the capital of France.", " is a river.", " is"]
    out = run(capsys, "batched", smollm2_path, *prompts, "--prefix", "Paris", "-n", 12)
    starts = [out.index(f"Paris{prompt} ->") for prompt in prompts]
    assert starts == sorted(starts) and min(np.diff([*starts, out.index("hot  ")])) > 40  # a text follows on each
    assert "of 512 cells, f16" in out


@pytest.mark.parametrize("cache", [F32, LOSSLESS], ids=["plain", "mixed"])
def test_batched_answers_are_those_of_one_at_a_time(
    tiny_model: Model, make_context: MakeContext, cache: dict[str, Any]
) -> None:
    prefix, prompts = "the thing and the other in order to be " * 4, ["on the inner end", "in", "of a string to the"]
    expected = []
    for prompt in prompts:
        tokens = tiny_model.tokenize(prefix) + tiny_model.tokenize(prompt, add_special=False)
        expected.append("".join(make_context(n_ctx=512, **F32).generate(tokens, 30, GREEDY)))
    context = make_context(n_ctx=1024, n_seq_max=3, kv_unified=True, **cache)
    assert example("batched").answer(context, prefix, prompts, 30, GREEDY) == expected
    # the prefix was computed once, and takes cells once
    n_prompts = sum(len(tiny_model.tokenize(prompt, add_special=False)) for prompt in prompts)
    n_all = len(tiny_model.tokenize(prefix)) + n_prompts + 3 * 30
    assert context.perf.n_p_eval + context.perf.n_eval == n_all
    if context.stats is not None:
        assert context.stats.hot_used + context.stats.cold_used == n_all and context.stats.cold_used > 0


def test_batched_answers_end_on_their_own(tiny_model: Model, make_context: MakeContext) -> None:
    """A sequence that has ended leaves the batch; the others are as they were."""
    prompts = ["on the inner end", "in", "of a string to the"]
    make = {"n_ctx": 1024, "n_seq_max": 3, "kv_unified": True, **F32}
    answer = example("batched").answer
    hot = SamplingParams(temperature=1.0, top_k=0, seed=1, logit_bias={tiny_model.eos: 6.0})
    texts = answer(make_context(**make), "the ", prompts, 40, hot)
    lengths = []
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = tiny_model.tokenize("the ") + tiny_model.tokenize(prompt, add_special=False)
        generation = make_context(n_ctx=256, **F32).generate(tokens, 40, hot)
        assert "".join(generation) == text
        lengths.append(generation.n_tokens)
    assert len(set(lengths)) > 1 and min(lengths) < 40


#
# speculative
#


def test_speculative_on_a_real_model(capsys: pytest.CaptureFixture[str], smollm2_path: Path) -> None:
    prompt = "red green blue red green blue red green blue red green"
    out = run(capsys, "speculative", smollm2_path, "-p", prompt, "-n", 24)
    assert out.startswith(prompt)
    n_accepted, n_guessed, n_steps = map(int, re.findall(r"(\d+) of (\d+) guesses were right, (\d+) steps", out)[0])
    assert 0 < n_accepted <= n_guessed and n_accepted + n_steps == 24  # each step gives one token more than was guessed


@pytest.mark.parametrize("cache", [F32, LOSSLESS], ids=["plain", "mixed"])
@pytest.mark.parametrize("kind", ["lookup", "same model", "other model"])
def test_speculative_text_is_that_of_token_by_token(
    tiny_model: Model, make_context: MakeContext, tmp_path: Path, kind: str, cache: dict[str, Any]
) -> None:
    module = example("speculative")
    prompt = tiny_model.tokenize("the thing and the other in order to be " * 5)
    expected = [t.id for t in make_context(n_ctx=512, **F32).generate_tokens(prompt, 60, GREEDY)]
    context = make_context(n_ctx=512, **cache)
    if kind == "lookup":
        draft = module.lookup
    elif kind == "same model":
        draft = module.DraftModel(make_context(n_ctx=512, **F32))
    else:
        draft = module.DraftModel(make_context(Model(write_tiny_model(tmp_path / "m.gguf", seed=1)), n_ctx=512, **F32))
    speculation = module.Speculation(context, draft, 5)
    with Sampler(tiny_model, GREEDY) as sampler:
        assert list(speculation.run(prompt, 60, sampler)) == expected
    # the cache holds what was accepted, but for the last token
    held = context.memory.held.tokens(0)
    np.testing.assert_array_equal(held, (prompt + expected)[: len(held)])
    assert len(held) in (len(prompt) + 59, len(prompt) + 60)
    if kind == "same model":
        assert speculation.n_accepted == speculation.n_guessed == 50 and speculation.n_steps == 10
    if kind == "other model":
        assert speculation.n_accepted < speculation.n_guessed
    if context.stats is not None:
        assert context.stats.n_tokens_moved > 50


def test_speculation_with_random_numbers(tiny_model: Model, make_context: MakeContext) -> None:
    """A sampler draws once for every token, guessed or not: the same numbers, the same text."""
    module = example("speculative")
    prompt = tiny_model.tokenize("in the")
    hot = SamplingParams(temperature=0.7, seed=3)
    expected = [t.id for t in make_context(**F32).generate_tokens(prompt, 40, hot)]
    speculation = module.Speculation(make_context(**F32), module.DraftModel(make_context(**F32)), 4)
    with Sampler(tiny_model, hot) as sampler:
        assert list(speculation.run(prompt, 40, sampler)) == expected
    assert 0 < speculation.n_accepted < speculation.n_guessed


def test_lookup() -> None:
    lookup = example("speculative").lookup
    assert lookup([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert lookup([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1) == [5]  # the last time
    assert lookup([1, 2, 3, 1, 2, 3], 9) == [1, 2, 3]
    assert lookup([7, 7, 7, 7, 7], 9) == [7]
    assert lookup([1, 2, 3, 4], 9) == lookup([1], 9) == []
