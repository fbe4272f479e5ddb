"""How many threads compute attention in a context."""

from __future__ import annotations

from typing import Any

import cffi
import pytest
from helpers.processes import library_dir

from llamamix import Context, ContextParams, Model
from llamamix import _ffi as bindings

ffi = cffi.FFI()
ffi.cdef(
    """
    const char * ggml_op_desc(void * t);
    int64_t ggml_nelements(void * t);
    """
)


def test_threads_that_are_added_later_compute_attention(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is used again has memory for so many threads, and further ones have nothing to do.

    The size of the attention's node tells: its output, and scratch memory for each thread.
    """
    base: Any = ffi.dlopen(str(library_dir() / bindings._file_name("ggml-base")))
    sizes: list[int] = []

    @ffi.callback("bool(void *, bool, void *)")
    def see(tensor: Any, ask: bool, _: Any) -> bool:
        if ffi.string(base.ggml_op_desc(tensor)) == b"CUSTOM":
            sizes.append(base.ggml_nelements(tensor))
        return True

    to_c = ContextParams.to_c

    def with_callback(self: ContextParams, n_cpus: int) -> Any:
        c_params = to_c(self, n_cpus)
        c_params.cb_eval = bindings.ffi.cast("void *", int(ffi.cast("uintptr_t", see)))
        return c_params

    monkeypatch.setattr(ContextParams, "to_c", with_callback)

    def decode(context: Context) -> int:
        sizes.clear()
        context.decode([5])
        return max(sizes)

    with Context(tiny_model, n_ctx=256, n_threads=1, kv_mixed="hot=64") as context:
        one = [decode(context) for _ in range(3)]
        context.set_n_threads(3)
        three = [decode(context) for _ in range(3)]
        context.set_n_threads(1)
        again = [decode(context) for _ in range(3)]
    with Context(tiny_model, n_ctx=256, n_threads=2, kv_mixed="hot=64") as context:
        two = [decode(context) for _ in range(3)]

    per_thread = two[0] - one[0]
    assert per_thread > 0
    assert one == 3 * [one[0]] and two == 3 * [two[0]]
    assert three == 3 * [one[0] + 2 * per_thread]
    assert set(again) <= {one[0], three[0]}  # fewer threads do with a graph for more
