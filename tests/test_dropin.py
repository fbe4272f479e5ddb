"""libllama.so under a program that was made for upstream's: llama-cpp-python, switched on by LLAMA_KV_MIXED alone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import environment, library_dir

from llamamix import Context, Model

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)

SPEC = "hot=64,group=16,sink=4"

# the binding's own generation loop at temperature 0
PROGRAM = """
import itertools, json, sys
from llama_cpp import Llama

model, prompt, params = json.loads(sys.argv[1])
llama = Llama(model, verbose=True, n_threads=1, n_threads_batch=1, **params)
print(json.dumps(list(itertools.islice(llama.generate(prompt, temp=0.0, repeat_penalty=1.0), 60))))
"""


def run_llama_cpp(model: Path, prompt: list[int], spec: str | None, **params: Any) -> tuple[list[int], str]:
    """The tokens that llama-cpp-python generates with our library, and llama.cpp's log."""
    command = [sys.executable, "-c", PROGRAM, json.dumps([str(model), prompt, params])]
    env = environment(LLAMA_CPP_LIB_PATH=str(library_dir()), LLAMA_KV_MIXED=spec)
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout), result.stderr


def generate(model: Model, prompt: list[int], **params: Any) -> list[int]:
    """The same with our own binding."""
    with Context(model, n_threads=1, **params) as context:
        context.decode(prompt)
        tokens = []
        for _ in range(60):
            tokens.append(int(np.argmax(context.logits[-1])))
            context.decode(tokens[-1:])
    return tokens


@needs_llama_cpp
def test_the_same_tokens(tiny_model_path: Path, tiny_model: Model) -> None:
    prompt = np.random.default_rng(0).integers(3, 400, 500).tolist()
    sizes = {"n_ctx": 768, "n_batch": 128, "n_ubatch": 96}  # its flash attention is off unless asked for

    tokens, log = run_llama_cpp(tiny_model_path, prompt, SPEC, **sizes)
    assert "creating hot KV cache (FP16), size = 64 cells" in log
    assert "creating cold KV cache (quantized), size = 704 cells" in log
    assert tokens == generate(tiny_model, prompt, kv_mixed=SPEC, flash_attn="off", **sizes)

    plain, log = run_llama_cpp(tiny_model_path, prompt, None, **sizes)
    assert "creating hot KV cache" not in log
    assert plain == generate(tiny_model, prompt, kv_mixed=False, flash_attn="off", **sizes)
    assert plain != tokens  # Q4_0 makes a difference


@needs_llama_cpp
def test_a_bad_spec_is_an_error(tiny_model_path: Path) -> None:
    with pytest.raises(AssertionError, match="LLAMA_KV_MIXED: hot=many is not a whole number"):
        run_llama_cpp(tiny_model_path, [5], "hot=many", n_ctx=256)
