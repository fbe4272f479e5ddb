"""The programs of docs/recipes.md, as they stand there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import DOCS
from helpers.processes import environment, library_dir

from llamamix import Context, KVMixedParams, Model, SamplingParams, ServerError
from llamamix.server import Server

RECIPES = dict(re.findall(r"```python\n# recipe: (\w+)\n(.*?)```", (DOCS / "recipes.md").read_text(encoding="utf-8"), re.S))
COLOUR = [{"role": "user", "content": "Name one colour."}]


def run(name: str, **variables: str) -> str:
    command = [sys.executable, "-c", RECIPES[name]]
    result = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


@pytest.fixture(scope="module")
def answer(smollm2_path: Path) -> str:
    """What the model says with our own bindings."""
    with Model(smollm2_path) as model, Context(model, n_ctx=4096) as context:
        return "".join(context.chat(COLOUR, max_tokens=16, sampling=SamplingParams(temperature=0.0))).strip()


def drop_in(model: Path) -> dict[str, str]:
    return {"MODEL": str(model), "LLAMA_CPP_LIB_PATH": str(library_dir()), "LLAMA_KV_MIXED": "1"}


def test_all_have_a_test() -> None:
    assert set(RECIPES) == {"llama_cpp", "langchain", "openai"}


def test_llama_cpp_python(smollm2_path: Path, answer: str) -> None:
    needs("llama_cpp")
    assert run("llama_cpp", **drop_in(smollm2_path)) == answer


def test_langchain(smollm2_path: Path) -> None:
    needs("llama_cpp")
    needs("langchain_community")
    assert "Paris" in run("langchain", **drop_in(smollm2_path))


def test_openai(smollm2_path: Path, answer: str) -> None:
    needs("openai")
    try:
        server = Server(["-m", str(smollm2_path), "--port", "0", "-c", "4096", "-np", "1"], KVMixedParams())
    except ServerError as error:
        pytest.skip(str(error))
    with server:
        assert run("openai", URL=server.wait_ready(300)) == answer
