"""libllama.so under programs that know upstream's only, switched on by LLAMA_KV_MIXED alone."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.processes import environment, find_program, library_dir
from helpers.tiny_model import write_tiny_model

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


EMBED = """
import json, sys
from llama_cpp import Llama

model, texts, params = json.loads(sys.argv[1])
sizes = {"n_ctx": 2048, "n_batch": 1024, "n_ubatch": 1024}
llama = Llama(model, embedding=True, pooling_type=1, verbose=True, n_threads=1, **sizes, **params)
print(json.dumps(llama.embed(texts, normalize=False)))
"""


@needs_llama_cpp
def test_embeddings_are_those_of_a_plain_cache(tiny_model_path: Path) -> None:
    """It asks for 256 sequences in one unified cache, whose sinks alone would fill hot, and for texts longer than hot."""
    texts = ["abc " * 200, "x", "de fg " * 90]

    def embed(spec: str | None, **params: Any) -> np.ndarray:
        command = [sys.executable, "-c", EMBED, json.dumps([str(tiny_model_path), texts, params])]
        env = environment(LLAMA_CPP_LIB_PATH=str(library_dir()), LLAMA_KV_MIXED=spec)
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
        assert ("creating hot KV cache" in result.stderr) == (spec is not None)
        return np.array(json.loads(result.stdout))

    plain = embed(None)
    # what another kernel makes of the same rows: ggml's flash attention, whose sums are less exact than ours
    noise = np.abs(embed(None, flash_attn=True) - plain).max()
    for spec in ("1", "hot=64"):
        assert np.abs(embed(spec) - plain).max() <= 2 * noise
    assert np.abs(plain[0] - plain[2]).max() > 100 * noise  # texts differ by more


@needs_llama_cpp
def test_a_bad_spec_is_an_error(tiny_model_path: Path) -> None:
    with pytest.raises(AssertionError, match="LLAMA_KV_MIXED: hot=many is not a whole number"):
        run_llama_cpp(tiny_model_path, [5], "hot=many", n_ctx=256)


#
# llama-fit-params: what -fit of llama.cpp's programs chooses
#

N_CTX_TRAIN = 1 << 17
BYTES_F16 = 2 * 2 * 8 * 128 * 2  # of a cell: K and V, 2 layers, 8 heads of 128


@pytest.fixture(scope="module")
def large_cache_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Little but its cache: 1 GiB in F16."""
    path = tmp_path_factory.mktemp("models") / "large-cache.gguf"
    return write_tiny_model(path, n_head=8, n_head_kv=8, head_size=128, n_ctx_train=N_CTX_TRAIN)


def run_fit(model: Path, spec: str | None, *args: object) -> tuple[list[int], str]:
    """The numbers that it prints, and its log."""
    command = [find_program("llama-fit-params"), "-m", model, "-fa", "on", "-v", *args]
    env = environment(LLAMA_KV_MIXED=spec)
    result = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr[-2000:]
    return [int(word) for word in result.stdout.split() if word.lstrip("-").isdigit()], result.stderr


def test_fit_counts_both_caches(large_cache_model: Path) -> None:
    for spec in (None, SPEC):
        (_, context_mib, _), _ = run_fit(large_cache_model, spec, "-c", 65536, "-fitp", "on")
        with Model(large_cache_model) as model, Context(model, n_ctx=65536, kv_mixed=spec or False) as context:
            stats = context.stats
        expected = stats.bytes_hot + stats.bytes_cold if spec else 65536 * BYTES_F16
        assert context_mib == expected >> 20


def test_fit_finds_room_for_a_longer_context(large_cache_model: Path) -> None:
    _, log = run_fit(large_cache_model, None)
    total = int(re.search(r"(\d+) MiB of total host memory", log)[1])
    # room for half the context in F16, and for the graphs
    margin = total - (N_CTX_TRAIN // 2 * BYTES_F16 >> 20) - 200
    (n_ctx, _), log = run_fit(large_cache_model, None, "-fitt", margin)
    assert N_CTX_TRAIN // 3 < n_ctx < N_CTX_TRAIN * 2 // 3
    assert "context size reduced" in log
    (n_ctx, _), log = run_fit(large_cache_model, "1", "-fitt", margin)
    assert n_ctx == N_CTX_TRAIN  # in Q4_0 all of it takes 288 MiB of these 512
