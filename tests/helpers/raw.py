"""Functions of libllama that the bindings have no use for, called as a C program would."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cffi
import numpy as np

from llamamix import Context, MixedKVCache
from llamamix import _ffi as bindings

from .paths import ROOT
from .processes import library_dir

ffi = cffi.FFI()
ffi.cdef(
    """
    typedef struct { int32_t n_tokens; int32_t * token; float * embd; int32_t * pos; int32_t * n_seq_id;
                     int32_t ** seq_id; int8_t * logits; } llama_batch;

    int32_t llama_decode(void * ctx, llama_batch batch);
    int32_t llama_encode(void * ctx, llama_batch batch);
    float * llama_get_logits(void * ctx);
    void    llama_set_causal_attn(void * ctx, bool causal);
    void    llama_set_embeddings(void * ctx, bool embeddings);
    float * llama_get_embeddings_seq(void * ctx, int32_t seq_id);

    size_t llama_state_get_size(void * ctx);
    size_t llama_state_get_data(void * ctx, uint8_t * dst, size_t size);
    size_t llama_state_set_data(void * ctx, const uint8_t * src, size_t size);

    size_t llama_state_seq_get_size_ext(void * ctx, int32_t seq_id, uint32_t flags);
    size_t llama_state_seq_get_data_ext(void * ctx, uint8_t * dst, size_t size, int32_t seq_id, uint32_t flags);
    size_t llama_state_seq_set_data_ext(void * ctx, const uint8_t * src, size_t size, int32_t seq_id, uint32_t flags);

    bool llama_state_save_file(void * ctx, const char * path, const int32_t * tokens, size_t n);
    bool llama_state_load_file(void * ctx, const char * path, int32_t * tokens, size_t n_max, size_t * n);
    size_t llama_state_seq_save_file(void * ctx, const char * path, int32_t seq_id, const int32_t * tokens, size_t n);
    size_t llama_state_seq_load_file(void * ctx, const char * path, int32_t seq_id, int32_t * tokens, size_t n_max,
                                     size_t * n);
    """
)
# the functions for tests alone
_test = ROOT / "vendor" / "overlay" / "include" / "llama-kv-mixed-test.decl.h"
ffi.cdef("struct llama_kv_mixed_cache;\n" + _test.read_text())
_path = library_dir() / bindings._file_name("llama")
lib: Any = ffi.dlopen(str(_path))

PARTIAL_ONLY, ON_DEVICE = 1, 2


@contextmanager
def pointer(context: Context) -> Iterator[Any]:
    """A context's llama_context, while it is held."""
    with context._handle as ctx:
        yield ffi.cast("void *", int(bindings.ffi.cast("uintptr_t", ctx)))


def decode_sequences(context: Context, sequences: Sequence[np.ndarray], first: int = 0) -> int:
    """One call of llama_decode() with all tokens as output, one sequence after the other."""
    n = sum(map(len, sequences))
    ids = [ffi.new("int32_t[1]", [seq]) for seq, part in enumerate(sequences) for _ in part]
    keep = [
        ffi.new("int32_t[]", np.concatenate(sequences).tolist()),
        ffi.new("int32_t[]", [first + i for part in sequences for i in range(len(part))]),
        ffi.new("int32_t[]", [1] * n),
        ffi.new("int32_t *[]", ids),
        ffi.new("int8_t[]", [1] * n),
    ]
    batch = ffi.new("llama_batch *", [n, keep[0], ffi.NULL, *keep[1:]])[0]
    with pointer(context) as ctx:
        return lib.llama_decode(ctx, batch)


def pooled(context: Context, seq: int, n_embd: int = 128) -> np.ndarray:
    """The embedding of a sequence, float32 [n_embd]."""
    with pointer(context) as ctx:
        out = lib.llama_get_embeddings_seq(ctx, seq)
        return np.frombuffer(ffi.buffer(out, 4 * n_embd), np.float32).copy()


def _test_function(name: str, cache: Context | MixedKVCache, n: int) -> None:
    if isinstance(cache, Context):
        with MixedKVCache.from_context(cache) as own:
            return _test_function(name, own, n)
    with cache._handle as handle:
        pointer = ffi.cast("struct llama_kv_mixed_cache *", int(bindings.ffi.cast("uintptr_t", handle)))
        assert getattr(lib, name)(pointer, n) == 0
    return None


def fail_moves(cache: Context | MixedKVCache, n: int) -> None:
    """The next n migrations of a cache, or of a context's, can not copy their rows."""
    _test_function("llama_kv_mixed_cache_fail_moves", cache, n)


def fail_shift(cache: Context | MixedKVCache, n: int) -> None:
    """The next shift of positions fails when it has computed the rows of n layers."""
    _test_function("llama_kv_mixed_cache_fail_shift", cache, n)


def state_get(context: Context, seq_id: int | None = None, flags: int = 0) -> bytes:
    """The state of a sequence or of all (None), without a header of the bindings."""
    with pointer(context) as ctx:
        if seq_id is None:
            size = lib.llama_state_get_size(ctx)
            data = ffi.new("uint8_t[]", size)
            assert lib.llama_state_get_data(ctx, data, size) == size
        else:
            size = lib.llama_state_seq_get_size_ext(ctx, seq_id, flags)
            data = ffi.new("uint8_t[]", size)
            assert lib.llama_state_seq_get_data_ext(ctx, data, size, seq_id, flags) == size
        return bytes(ffi.buffer(data))


def state_set(context: Context, state: bytes, seq_id: int | None = None, flags: int = 0) -> tuple[int, str]:
    """Bytes read, 0: refused; and the reason."""
    with pointer(context) as ctx, bindings.error_lines() as errors:
        if seq_id is None:
            n = lib.llama_state_set_data(ctx, ffi.from_buffer("uint8_t[]", state), len(state))
        else:
            n = lib.llama_state_seq_set_data_ext(ctx, ffi.from_buffer("uint8_t[]", state), len(state), seq_id, flags)
    context.memory.note_loaded(seq_id)
    return n, errors.reason()


class _Map(ctypes.Structure):
    """std::map as libstdc++ has it: a header node, whose parent is the root."""

    _fields_ = [("words", ctypes.c_uint64 * 6)]


class _Node(ctypes.Structure):
    _fields_ = [
        ("color", ctypes.c_uint64),
        ("parent", ctypes.c_uint64),
        ("left", ctypes.c_uint64),
        ("right", ctypes.c_uint64),
        ("key", ctypes.c_uint64),
        ("model", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("compute", ctypes.c_uint64),
    ]


def memory_breakdown(ctx: Any) -> tuple[int, int] | None:
    """Bytes of context and computation, of all kinds of buffers; None: this libllama's std::map is another one."""
    found = _breakdown(ctx)
    return None if found is None else (sum(n.context for n in found), sum(n.compute for n in found))


def context_by_buffer(ctx: Any) -> dict[str, int] | None:
    """Bytes of the context in each kind of buffer, by its name; None: as above."""
    found = _breakdown(ctx)
    base = ctypes.CDLL(str(_path.parent / bindings._file_name("ggml-base")))
    base.ggml_backend_buft_name.restype, base.ggml_backend_buft_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    return None if found is None else {base.ggml_backend_buft_name(n.key).decode(): n.context for n in found if n.context}


def _breakdown(ctx: Any) -> list[_Node] | None:
    try:
        function = ctypes.CDLL(str(_path))["_Z26llama_get_memory_breakdownPK13llama_context"]
    except AttributeError:
        return None
    if not sys.platform.startswith("linux"):
        return None
    function.restype, function.argtypes = _Map, [ctypes.c_void_p]

    def nodes(address: int) -> Iterator[_Node]:
        if address:
            node = _Node.from_address(address)
            yield from nodes(node.left)
            yield node
            yield from nodes(node.right)

    result = function(int(ffi.cast("uintptr_t", ctx)))
    found = list(nodes(result.words[2]))
    assert len(found) == result.words[5]
    return found
