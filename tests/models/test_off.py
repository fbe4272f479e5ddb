"""Off means upstream: without LLAMA_KV_MIXED the library computes what an unpatched one computes, byte for byte.

LLAMAMIX_UPSTREAM_LIB_PATH names the folder of an unpatched libllama, built from the same source with the same flags.
Two builds of one library do not get along in one process, so each runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type
from helpers.families import WRITE
from helpers.processes import environment, library_dir
from helpers.tiny_model import write_tiny_model

import llamamix

UPSTREAM = os.environ.get("LLAMAMIX_UPSTREAM_LIB_PATH")

needs_upstream = pytest.mark.skipif(
    not UPSTREAM, reason="LLAMAMIX_UPSTREAM_LIB_PATH does not name the folder of an unpatched libllama"
)

# upstream's header and nothing of ours: decodes, moves sequences and saves, and prints a hash of all that comes out
PROGRAM = """
import hashlib, json, sys
from pathlib import Path
import cffi, numpy as np

folder, declarations, model_path, params = json.loads(sys.argv[1])
ffi = cffi.FFI()
ffi.cdef(Path(declarations).read_text(encoding="utf-8"))
ffi.cdef("struct llama_context * llama_init_from_model(struct llama_model *, struct llama_context_params);")
suffix = {"darwin": "lib%s.dylib", "win32": "%s.dll"}.get(sys.platform, "lib%s.so")
lib = ffi.dlopen(str(Path(folder) / (suffix % "llama")))
log = ffi.callback("void(int32_t, char *, void *)", lambda level, text, data: None)
lib.llama_log_set(log, ffi.NULL)
ggml = ffi.dlopen(str(Path(folder) / (suffix % "ggml")))
if ggml.ggml_backend_reg_count() == 0:
    ggml.ggml_backend_load_all_from_path(folder.encode())
lib.llama_backend_init()

model = lib.llama_model_load_from_file(model_path.encode(), lib.llama_model_default_params())
c = lib.llama_context_default_params()
c.n_ctx, c.n_batch, c.n_ubatch, c.n_seq_max, c.n_threads, c.n_threads_batch = 1024, 512, 96, 2, 1, 1
for name, value in params.items():
    setattr(c, name, value)
ctx = lib.llama_init_from_model(model, c)
assert ctx != ffi.NULL
memory = lib.llama_get_memory(ctx)
n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
rng = np.random.default_rng(0)
digests = []

def decode(first, seqs):
    n = len(seqs)
    tokens = rng.integers(3, n_vocab, n).tolist()
    ids = [ffi.new("int32_t[1]", [s]) for s in seqs]
    keep = [ffi.new("int32_t[]", tokens), ffi.new("int32_t[]", [first + i // len(set(seqs)) for i in range(n)]),
            ffi.new("int32_t[]", [1] * n), ffi.new("int32_t *[]", ids), ffi.new("int8_t[]", [1] * n)]
    batch = ffi.new("struct llama_batch *")
    batch.n_tokens, batch.token, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits = n, *keep
    assert lib.llama_decode(ctx, batch[0]) == 0
    logits = bytes(ffi.buffer(lib.llama_get_logits(ctx), 4 * n * n_vocab))
    assert np.isfinite(np.frombuffer(logits, np.float32)).all()
    digests.append(hashlib.sha256(logits).hexdigest())

decode(0, [0, 1] * 150)
for i in range(20):
    decode(150 + i, [0, 1])
lib.llama_memory_seq_rm(memory, 1, -1, -1)
lib.llama_memory_seq_cp(memory, 0, 1, -1, -1)
decode(170, [0, 1])
lib.llama_memory_seq_rm(memory, 0, 10, 60)
if lib.llama_memory_can_shift(memory):
    lib.llama_memory_seq_add(memory, 0, 60, 171, -50)
    decode(121, [0] * 40)

size = lib.llama_state_get_size(ctx)
state = ffi.new("uint8_t[]", size)
assert lib.llama_state_get_data(ctx, state, size) == size
digests.append(hashlib.sha256(bytes(ffi.buffer(state))).hexdigest())
print(json.dumps(digests))
"""


def digests(folder: Path | str, model: Path, params: dict[str, Any], spec: str | None = None) -> list[str]:
    declarations = Path(llamamix.__file__).parent / "_decl" / "llama.h"
    arguments = json.dumps([str(folder), str(declarations), str(model), params])
    command = [sys.executable, "-c", PROGRAM, arguments]
    result = subprocess.run(command, env=environment(LLAMA_KV_MIXED=spec), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


Q4_0, Q8_0, F32 = 2, 8, 0  # enum ggml_type
CASES = {
    "default": {},
    "no-flash": {"flash_attn_type": 0},
    "flash-q4_0": {"flash_attn_type": 1, "type_k": Q4_0, "type_v": Q4_0},
    "no-flash-q8_0-k": {"flash_attn_type": 0, "type_k": Q8_0},
    "f32": {"flash_attn_type": 0, "type_k": F32, "type_v": F32},
    "unified": {"kv_unified": True},
}


@pytest.fixture(scope="module")
def quantised_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "q8_0.gguf", weight_type=Type.Q8_0)


@needs_upstream
@pytest.mark.parametrize("case", CASES)
def test_byte_for_byte(case: str, tiny_model_path: Path) -> None:
    expected = digests(UPSTREAM, tiny_model_path, CASES[case])
    assert len(set(expected)) == len(expected) > 20
    assert digests(library_dir(), tiny_model_path, CASES[case]) == expected


@needs_upstream
def test_quantised_weights(quantised_model: Path) -> None:
    assert digests(library_dir(), quantised_model, {}) == digests(UPSTREAM, quantised_model, {})


@needs_upstream
@pytest.mark.parametrize("swa_full", [False, True])
@pytest.mark.parametrize("family", WRITE)
def test_families(family: str, swa_full: bool, tmp_path: Path) -> None:
    model = WRITE[family](tmp_path / "model.gguf")
    params = {"swa_full": swa_full}
    assert digests(library_dir(), model, params) == digests(UPSTREAM, model, params)


def test_off_by_name(tiny_model_path: Path) -> None:
    """An empty variable and 0 mean off too; anything else that is valid is seen in the logits."""
    unset = digests(library_dir(), tiny_model_path, {})
    for spec in ("", "0", " 0 "):
        assert digests(library_dir(), tiny_model_path, {}, spec) == unset
    mixed = digests(library_dir(), tiny_model_path, {}, "hot=64")
    assert not set(mixed) & set(unset)


@pytest.mark.parametrize("case", ["default", "no-flash", "f32", "unified"])
def test_nothing_is_cold_where_all_fits_in_hot(case: str, tiny_model_path: Path) -> None:
    """Two sequences of 512 tokens, or 1024 of both: what is computed is that of a plain cache, shifts included.

    By the same attention (by the kernel it is that within a bound, see test_identity.py).
    """
    spec = "attn=compose" + (",hot=1024" if case == "unified" else "")
    *plain, state = digests(library_dir(), tiny_model_path, CASES[case])
    *mixed, state_mixed = digests(library_dir(), tiny_model_path, CASES[case], spec)
    assert mixed == plain
    assert state_mixed != state  # (it is a mixed cache, and can be loaded where there is more to it)


@pytest.mark.parametrize("family", WRITE)
def test_nothing_is_cold_in_families(family: str, tmp_path: Path) -> None:
    model = WRITE[family](tmp_path / "model.gguf")
    params = {"swa_full": False}
    assert digests(library_dir(), model, params, "attn=compose")[:-1] == digests(library_dir(), model, params)[:-1]


def test_a_plain_context_does_not_ask_the_environment(tiny_model_path: Path) -> None:
    program = """
import hashlib, sys
from llamamix import Context, Model
with Model(sys.argv[1]) as model, Context(model, n_ctx=512, n_threads=1, kv_mixed=False) as context:
    context.decode(list(range(3, 303)), logits="all")
    print(context.kv_mixed, hashlib.sha256(context.logits.tobytes()).hexdigest())
"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, str(tiny_model_path)],
            env=environment(LLAMA_KV_MIXED=spec, LLAMAMIX_LIB_PATH=str(library_dir())),
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout
        for spec in (None, "hot=64", "nonsense")
    ]
    assert outputs[0].startswith("None ")
    assert outputs == [outputs[0]] * 3
