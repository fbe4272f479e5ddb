"""How many threads compute attention, and what that changes: nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import cffi
import numpy as np
import pytest
from helpers.attention_cases import ISAS, Case, make_data
from helpers.processes import library_dir
from helpers.tiny_model import random_tokens

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


@pytest.fixture(scope="module")
def other_work() -> Iterator[None]:
    """A program for each processor that does not stop."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    yield
    assert all(program.poll() is None for program in programs)
    for program in programs:
        program.kill()
        program.wait()


THREADS = [4, 8, 16]

# tasks of several heads and their merge, of one head and its merge, tasks that wait for those of hot cells, blocks of a prompt
WORK = [
    Case(n_head_kv=16, n_gqa=2, n_cold=5000),
    Case(n_head_kv=1, n_cold=5000, mask="sparse"),
    Case(n_head_kv=16, n_gqa=2, n_cold=5000, q_size=8.0, v_skip=0.1),
    Case(n_tokens=130, n_cold=1000, mask="causal"),
]


@pytest.mark.parametrize("n_threads", THREADS)
@pytest.mark.parametrize("case", WORK, ids=["heads", "cells", "skip", "prompt"])
def test_more_threads_than_processors(case: Case, n_threads: int, other_work: None) -> None:
    """Tasks are taken by whoever is free, and are the same ones: a thread that has to wait holds nobody up for more than
    its own, and changes no bit."""
    data = make_data(case)
    for isa in ISAS:
        alone = data.compute(isa, 1).tobytes()
        assert all(data.compute(isa, n_threads).tobytes() == alone for _ in range(5))


@pytest.mark.parametrize("n_threads", THREADS)
def test_a_context_with_more_threads_than_processors(n_threads: int, tiny_model: Model, other_work: None) -> None:
    """Prompts, migrations and decoding; ggml's threads wait for each other there."""

    def logits(n_threads: int) -> np.ndarray:
        tokens = random_tokens(120)
        rows = []
        with Context(tiny_model, n_ctx=256, n_threads=n_threads, kv_mixed="hot=32,group=8,sink=2") as context:
            context.decode(tokens[:100], logits="all")
            rows.append(context.logits.copy())
            for token in tokens[100:]:
                context.decode([token])
                rows.append(context.logits.copy())
            assert context.stats.n_migrations > 5
        return np.concatenate(rows)

    np.testing.assert_array_equal(logits(n_threads), logits(1))
