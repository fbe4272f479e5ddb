"""The progress of prompts, as the commands show it in a terminal and record it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.command import Screen, command, in_terminal

from llamamix import PromptProgress
from llamamix.cli.bench import _Bar

N_TOKENS = 8000
SPEC = "hot=128,group=32"


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    path.write_text("x" * (N_TOKENS - 2))  # a token each, and two that begin the text
    return path


def flags(model: Path, prompt: Path) -> tuple:
    return ("-m", model, "-f", prompt, "-t", 1, "-c", 8192, "-ub", 64, "-n", 3, "--temp", 0, "--kv-mixed", SPEC)


def steps(screen: Screen, pattern: str) -> list[tuple[int, ...]]:
    """The numbers of all lines that say how far it is."""
    return [tuple(map(int, match.groups())) for line in screen.lines if (match := re.match(pattern, line))]


@pytest.mark.parametrize("name", ["generate", "trace"])
def test_a_prompt_in_a_terminal(tiny_model_path: Path, prompt: Path, name: str) -> None:
    wide = r"prompt {2}(\d+)/8000(?: {2}\d+ tokens/s)? {2}hot (\d+)/128 {2}cold (\d+)/8064"
    if name == "trace":  # its live view has bars of its own
        wide = r".*hot \(f16\) .*?()(\d+)/128"
    screen = in_terminal(name, *flags(tiny_model_path, prompt), columns=100)
    assert screen.code == 0
    found = steps(screen, wide) if name == "generate" else re.findall(r"tokens in +(\d+) ", "\n".join(screen.lines))
    done = [int(step[0]) if name == "generate" else int(step) for step in found]
    assert done == sorted(done) and done[-1] == N_TOKENS
    between = {n for n in done if 0 < n < N_TOKENS}
    assert between and all(n % 64 == 0 for n in between)  # ubatches
    if name == "generate":
        for n, hot, cold in found:
            assert n <= hot + cold <= N_TOKENS


def test_a_narrow_terminal(tiny_model_path: Path, prompt: Path) -> None:
    screen = in_terminal("generate", *flags(tiny_model_path, prompt), columns=40)
    found = steps(screen, r"(\d+)/8000(?: \d+/s)? hot (\d+) cold (\d+)$")
    assert screen.code == 0 and found and max(map(len, screen.lines)) <= 40


def test_nothing_of_it_where_there_is_no_terminal(tiny_model_path: Path, prompt: Path) -> None:
    result = subprocess.run(command("generate", *flags(tiny_model_path, prompt)), capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"") and result.stdout.strip()


def test_what_bench_says_of_a_step() -> None:
    said: list[str] = []
    console = SimpleNamespace(width=100)
    progress = SimpleNamespace(console=console, update=lambda _task, description, **_: said.append(description))
    bar = _Bar(progress, 0)
    bar.step("d1024 f16")
    bar.tokens(PromptProgress(0, 1024, None))
    assert said == ["d1024 f16", "d1024 f16 0/1024"]
    bar.tokens(PromptProgress(512, 1024, None))
    assert re.fullmatch(r"d1024 f16 512/1024 \d+/s", said[-1])


def test_a_trace_records_it(tiny_model_path: Path, prompt: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    args = command("trace", *flags(tiny_model_path, prompt), "--jsonl", path, "-o", "csv")
    subprocess.run(args, check=True, capture_output=True)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    progress = [r for r in records if r["record"] == "progress" and r["n_out"] == 0]
    assert any(0 < r["n_in"] < N_TOKENS for r in progress)
    for r in progress:
        # the ubatch that is computed is in the cache, as well as those before
        assert r["n_in"] <= r["hot_used"] + r["cold_used"] <= N_TOKENS
        assert (r["prefill"] > 0) == (r["n_in"] > 0)
