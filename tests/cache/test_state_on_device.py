"""llama_state_seq_*_ext() with LLAMA_STATE_SEQ_FLAGS_ON_DEVICE: rows that stay on the device while a state is kept.

Upstream's reader and writer take types with blocks for others; llama_kv_mixed_io keeps the rows of those from them.
"""

from __future__ import annotations

import cffi
import numpy as np
import pytest
from helpers.processes import library_dir

from llamamix import Context, Model, _ffi

ON_DEVICE = 2
N = 200


@pytest.fixture(scope="module")
def ext() -> tuple[cffi.FFI, object]:
    """The functions, which the bindings have no use for."""
    ffi = cffi.FFI()
    ffi.cdef("""
        size_t llama_state_seq_get_size_ext(void * ctx, int32_t seq_id, uint32_t flags);
        size_t llama_state_seq_get_data_ext(void * ctx, uint8_t * dst, size_t size, int32_t seq_id, uint32_t flags);
        size_t llama_state_seq_set_data_ext(void * ctx, const uint8_t * src, size_t size, int32_t seq_id, uint32_t flags);
    """)
    return ffi, ffi.dlopen(str(library_dir() / _ffi._file_name("llama")))


@pytest.mark.parametrize("cold", ["q4_0", "q8_0", "f16", "cold_k=q4_0,cold_v=f16"])
def test_a_sequence_comes_back(tiny_model: Model, ext: tuple, cold: str) -> None:
    ffi, lib = ext
    cold = cold if "=" in cold else f"cold={cold}"
    tokens = np.random.default_rng(0).integers(3, 380, N).tolist()
    params = {"n_ctx": 512, "n_threads": 1, "n_seq_max": 2, "kv_unified": True}
    with Context(tiny_model, kv_mixed=f"hot=64,group=16,{cold}", **params) as context:
        context.decode(tokens)
        assert context.stats.cold_used > 100
        before = context.state_save(0)
        with context._handle as ctx:
            ctx = ffi.cast("void *", int(_ffi.ffi.cast("uintptr_t", ctx)))
            size = lib.llama_state_seq_get_size_ext(ctx, 0, ON_DEVICE)
            data = ffi.new("uint8_t[]", size)
            assert lib.llama_state_seq_get_data_ext(ctx, data, size, 0, ON_DEVICE) == size
        assert size < len(before)  # hot rows are not in it

        # other rows take the cells
        context.memory.clear()
        context.decode(tokens[::-1], seq_id=1)
        context.memory.seq_rm(1)
        with context._handle as ctx:
            ctx = ffi.cast("void *", int(_ffi.ffi.cast("uintptr_t", ctx)))
            assert lib.llama_state_seq_set_data_ext(ctx, data, size, 0, ON_DEVICE) == size
        assert context.state_save(0) == before  # byte for byte
