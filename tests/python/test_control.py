"""Contexts that are closed, aborted, shared by threads or forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.processes import environment, library_dir
from helpers.tiny_model import random_tokens

from llamamix import Context, ContextError, DecodeAborted, Model, ParamsError, SamplingParams
from llamamix._ffi import ffi, lib

MakeContext = Callable[..., Context]

GREEDY = SamplingParams(temperature=0)


def test_a_closed_context(tiny_model: Model) -> None:
    with Context(tiny_model, n_ctx=256, n_threads=1, kv_mixed=False) as context:
        context.decode([5])
        state = context.state_save()
        pieces = context.generate("in", 10)
        next(pieces)
        assert "closed" not in repr(context)
    context.close()
    assert "closed" in repr(context)
    for use in (
        lambda: context.decode([5]),
        lambda: context.decode_batch([5], [0]),
        lambda: context.logits,
        lambda: context.embeddings,
        lambda: context.embeddings_seq(0),
        lambda: context.generate("in"),
        lambda: list(pieces),
        lambda: list(context.chat([{"role": "user", "content": "Hi"}])),
        lambda: context.stats,
        lambda: context.kv_mixed,
        lambda: context.perf,
        lambda: context.perf_reset(),
        lambda: context.state_save(),
        lambda: context.state_load(state),
        lambda: context.n_threads,
        lambda: context.set_n_threads(1),
        lambda: context.memory.clear(),
        lambda: context.memory.seq_rm(0),
        lambda: context.memory.seq_cp(0, 0, 1) or context.memory.seq_keep(0),
        lambda: context.memory.seq_add(0, 0, -1, 1),
        lambda: context.memory.seq_div(0, 0, -1, 2),
        lambda: context.memory.seq_pos_min(),
        lambda: context.memory.can_shift,
    ):
        with pytest.raises(ContextError, match="closed"):
            use()


def test_abort(make_context: MakeContext) -> None:
    context = make_context(n_ctx=2048, n_ubatch=64)
    calls = []
    context.set_abort_callback(lambda: calls.append(1) or len(calls) > 500)
    with pytest.raises(DecodeAborted) as caught:
        context.decode(random_tokens(2000))
    assert caught.value.code == 2
    assert -1 <= context.memory.seq_pos_max() < 1999
    assert (context.memory.seq_pos_max() + 1) % 64 == 0  # whole ubatches stay

    context.set_abort_callback(None)
    context.memory.clear()
    context.decode(random_tokens(2000))
    assert context.memory.seq_pos_max() == 1999


def test_an_exception_in_the_abort_callback(make_context: MakeContext) -> None:
    context = make_context()

    def fail() -> bool:
        raise RuntimeError("from the callback")

    context.set_abort_callback(fail)
    with pytest.raises(RuntimeError, match="from the callback"):
        context.decode(random_tokens(100))
    context.set_abort_callback(lambda: context.memory.clear())
    with pytest.raises(ContextError, match="busy"):
        context.decode(random_tokens(100))
    context.set_abort_callback(lambda: context.close())
    with pytest.raises(ContextError, match="busy"):
        context.decode(random_tokens(100))
    with pytest.raises(ParamsError, match="callback"):
        context.set_abort_callback(5)
    context.set_abort_callback(None)
    context.decode([5])


@pytest.mark.skipif(sys.platform == "win32", reason="no timer signals")
def test_a_signal_does_not_wait_for_a_long_decode(make_context: MakeContext) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt(*_args: object) -> None:
        raise Interrupt

    context = make_context(n_ctx=8192, n_batch=8192)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupt):
            context.decode(random_tokens(8000))
        taken = time.monotonic() - start
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert context.memory.seq_pos_max() < 7999
    assert taken < 5


def test_threads_take_turns(make_context: MakeContext) -> None:
    prompts = [random_tokens(30, seed) for seed in range(4)]
    expected = []
    for prompt in prompts:
        context = make_context()
        expected.append("".join(context.generate(prompt, 20, GREEDY)))

    shared = make_context(n_ctx=1024, n_seq_max=4)
    texts: dict[int, str] = {}

    def work(seq_id: int) -> None:
        texts[seq_id] = "".join(shared.generate(prompts[seq_id], 20, GREEDY, seq_id=seq_id))

    threads = [threading.Thread(target=work, args=(seq_id,)) for seq_id in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[seq_id] for seq_id in range(4)] == expected


def test_closing_waits_for_another_thread(make_context: MakeContext) -> None:
    context = make_context(n_ctx=4096, n_batch=4096)
    started = threading.Event()
    results = []
    context.set_abort_callback(lambda: started.set() or False)

    def work() -> None:
        context.decode(random_tokens(1000))
        results.append("decoded")

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(10)
    context.close()
    results.append("closed")
    thread.join()
    assert results in (["decoded", "closed"], ["closed", "decoded"])  # the order of the two appends is open
    with pytest.raises(ContextError, match="closed"):
        context.decode([5])


# each line is what an object of the process before raises in a process that was forked, or what came of it
FORKED = """
import gc, os, sys, threading
import numpy as np
from llamamix import Batch, Context, LlamamixError, MixedKVCache, Model, SBatch, Trace
from llamamix.attention import FlashAttnExt
from llamamix.params import SamplingParams
from llamamix.sampling import Sampler

model = Model(sys.argv[1])
context, held = (Context(model, n_ctx=256, n_threads=2, kv_mixed="hot=64") for _ in range(2))
context.decode([5, 6, 7])
pieces = context.generate([8, 9], 20, SamplingParams(temperature=0))
next(pieces)
inner = MixedKVCache.from_context(context)
cache = MixedKVCache(hot=8, cold_size=8, sink=0)
batch = Batch()
batch.add(5, 0, 0)
sbatch = SBatch(batch)
sampler = Sampler(model, SamplingParams())
trace = Trace(context)
trace.start()
rows = np.zeros((1, 1, 1, 32), np.float32)
flash = FlashAttnExt(rows, rows, rows, types="f32", n_threads=2)
flash.compute()
before = context.memory.seq_pos_max()

# another thread has the lock of a context, and will never give it back in the other process
locked, done = threading.Event(), threading.Event()

def hold():
    with held._handle:
        locked.set()
        done.wait()

thread = threading.Thread(target=hold)
thread.start()
locked.wait()

pid = os.fork()
if pid == 0:
    def fresh(**params):
        with Context(Model(sys.argv[1]), n_ctx=256, **params) as another:
            another.decode([5, 6, 7])
            return another.memory.seq_pos_max()

    for name, use in {
        "decode": lambda: context.decode([5]),
        "locked": lambda: held.decode([5]),
        "memory": lambda: context.memory.seq_rm(0),
        "stats": lambda: context.stats,
        "state": lambda: context.state_save(),
        "generate": lambda: next(pieces),
        "model": lambda: model.tokenize("a"),
        "context of the model": lambda: Context(model),
        "sampler": lambda: sampler.sample(np.zeros(400, np.float32)),
        "cache": lambda: cache.seq_rm(0),
        "tier": lambda: cache.hot.used,
        "cache of a context": lambda: inner.hot.used,
        "sbatch": lambda: sbatch.split_simple(1),
        "trace": lambda: trace.read(),
        "flash": lambda: flash.compute(),
        "two threads": lambda: fresh(n_threads=2),
        "more threads": lambda: fresh(n_threads=1, n_threads_batch=2),
        "one thread": lambda: fresh(n_threads=1),
    }.items():
        try:
            result = use()
        except LlamamixError as error:
            result = f"{type(error).__name__}: {error}"
        print(name, "|", result, flush=True)
    for closed in (trace.stop, context.close, held.close, cache.close, inner.close, sbatch.close, sampler.close, flash.close):
        closed()
    print("closed", "|", context._handle.closed, flush=True)
    del model, context, held, cache, inner, sbatch, sampler, trace, flash, pieces, closed
    gc.collect()
    sys.exit(7)
print("exit", "|", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
done.set()
thread.join()
# nothing of this process was freed
context.decode([5])
print("parent", "|", context.memory.seq_pos_max() - before, len(trace.read()) > 0, next(pieces) != "", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_is_refused_what_another_one_made(tiny_model_path: Path) -> None:
    env = environment(LLAMAMIX_LIB_PATH=str(library_dir()))
    command = [sys.executable, "-c", FORKED, str(tiny_model_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    found = dict(line.split(" | ") for line in result.stdout.splitlines())
    why = "from which this one was forked; make another one here, or start processes with the method 'spawn'."
    error_of = {
        "decode": ("ContextError", "context"), "locked": ("ContextError", "context"), "memory": ("ContextError", "context"),
        "stats": ("ContextError", "context"), "state": ("ContextError", "context"), "generate": ("ContextError", "sampler"),
        "model": ("ModelError", "model"), "context of the model": ("ModelError", "model"),
        "sampler": ("ContextError", "sampler"), "cache": ("CacheError", "cache"), "tier": ("CacheError", "cache"),
        "cache of a context": ("ContextError", "context"), "sbatch": ("LlamamixError", "sbatch"),
        "trace": ("ContextError", "context"), "flash": ("LlamamixError", "graph"),
    }  # fmt: skip
    for name, (error, what) in error_of.items():
        assert found.pop(name) == f"{error}: The {what} belongs to the process that made it, {why}"
    for name in ("two threads", "more threads"):
        if b"OPENMP = 1" in ffi.string(lib.llama_print_system_info()):
            assert found.pop(name).startswith("ContextError: This process was forked from one that had computed with")
        else:  # ggml starts threads of its own
            assert found.pop(name) == "2"
    assert found == {"one thread": "2", "closed": "True", "exit": "7", "parent": "1 True True"}
