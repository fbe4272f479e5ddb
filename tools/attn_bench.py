#!/usr/bin/env python3
"""Times the fused attention kernel beside ggml_flash_attn_ext() on the same rows.

    python tools/attn_bench.py -s 64/3/3,128/8/4 -n 8192,32768 -ctk q4_0,f16 -t 1,2
    python tools/attn_bench.py -s 128/8/4,128/32/1 -n 16384 --v-skip 0,0.01,0.1 --isa avx2

A shape is head size/KV heads/query heads per KV head. Rows lie as in a KV cache, in so many copies that none is in the
processor's caches when its turn comes again; kernels take turns, copy by copy. Times are medians of single calls.

ns        nanoseconds per cell and KV head, of one sequence
GB/s      bytes of K and V rows per time
share     of the read bandwidth with as many threads: memchr() for a byte that is not there, a part of 256 MiB a thread
x ggml    how many times faster than ggml

Our threads are started for every call, what that takes is said at the start; ggml's are kept where it has OpenMP, and a model
keeps both. Several sequences in a call (-b 8) make little of that. With several threads both need processors of their own: on
a busy machine ggml's wait for each other at every barrier.

With --v-skip there are 512 hot cells in F16 beside the others, which have 0.9 of the weights, and scores with a standard
deviation of 2.5: rows of V are left unread where weights are far from equal. ggml sees the other cells alone.

stdout carries the results; everything said along the way goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from llamamix import LlamamixError, ggml
from llamamix.attention import Attention, FlashAttnExt, isas
from llamamix.cli._output import FORMS, render
from llamamix.formats import FORMATS

_N_HOT = 512
_DEVIATION = 2.5  # of scores, where there are hot cells

_CACHE_SIZE = 64 << 20  # where the last-level cache's is not known

# seconds: after a call OpenMP's threads spin for a while before they sleep, on processors that ours need
_SETTLE = 0.02


def _ints(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers above 0, not {text}")
    return [int(part) for part in parts]


def _shapes(text: str) -> list[list[int]]:
    shapes = [_ints(part.replace("/", ",")) for part in text.split(",")]
    if any(len(shape) != 3 for shape in shapes):
        raise argparse.ArgumentTypeError(f"must be head size/KV heads/query heads per KV head, not {text}")
    return shapes


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share < 1 for share in shares):
        raise argparse.ArgumentTypeError(f"must be shares from 0 to below 1, not {text}")
    return shares


def _names(known: tuple[str, ...]) -> Any:
    def names(text: str) -> list[str]:
        values = text.split(",")
        if not set(values) <= set(known):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}")
        return values

    return names


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("-s", "--shape", type=_shapes, default="64/3/3,128/8/4,256/1/4", metavar="S,..", help="default: %(default)s")
    add("-n", "--n-kv", type=_ints, default="8192", metavar="N,..", help="cells (default: %(default)s)")
    add("-p", "--n-tokens", type=_ints, default="1", metavar="N,..", help="query tokens (default: %(default)s)")
    add(
        "-b", "--sequences", type=int, default=1, metavar="N",
        help="in a call, each with rows of its own (default: %(default)s)",
    )  # fmt: skip
    add(
        "-ctk", "--cache-type", type=_names(tuple(FORMATS)), default="q4_0,q8_0,f16", metavar="TYPE,..",
        help="of K and V (default: %(default)s)",
    )  # fmt: skip
    add("--isa", type=_names(isas()), default=",".join(isas()), metavar="ISA,..", help="default: %(default)s")
    add("--v-skip", type=_shares, metavar="SHARE,..", help="our kernels beside hot cells, with these shares of V unread")
    add("-t", "--threads", type=_ints, default="1,2", metavar="N,..", help="default: %(default)s")
    add("-r", "--repetitions", type=int, default=20, metavar="N", help="calls of each (default: %(default)s)")
    add("-o", "--output", choices=FORMS, help="default: a table, in Markdown when stdout is no terminal")
    args = parser.parse_args(argv)
    for name, value in (("-r", args.repetitions), ("-b", args.sequences)):
        if value < 1:
            parser.error(f"{name} must be at least 1")
    return args


def say(text: str) -> None:
    print(f"attn_bench.py: {text}", file=sys.stderr, flush=True)


#
# the machine
#


def cache_size() -> int:
    """Bytes of the largest cache that a processor has."""
    sizes = [_CACHE_SIZE]
    with contextlib.suppress(OSError, ValueError):
        found = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        sizes = [int(p.read_text().strip().removesuffix("K")) << 10 for p in found] or sizes
    return max(sizes)


def read_bandwidth(n_threads: int, n_bytes: int = 256 << 20, repetitions: int = 5) -> float:
    """Bytes per second that so many threads read together; memchr() does nothing else, and releases the GIL."""
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes, memchr.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    data = np.ones(n_bytes, np.uint8)
    part = n_bytes // n_threads
    times = []
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(repetitions):
            start = time.perf_counter()
            list(pool.map(lambda i: memchr(data.ctypes.data + i * part, 2, part), range(n_threads)))
            times.append(time.perf_counter() - start)
    return part * n_threads / statistics.median(times)


def call_time(n_threads: int) -> float:
    """Seconds that a call takes which has next to nothing to do."""
    rows = np.zeros((1, 1, 1, 32), np.float32)
    call = Attention(rows, None, (rows, rows), types=("f32", "f32"))
    times = []
    for _ in range(50):
        start = time.perf_counter()
        call.compute(n_threads)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


#
# the kernels
#


def make_hot(q: np.ndarray, n_head_kv: int, scale: float, n_kv: int) -> tuple[np.ndarray, np.ndarray]:
    """K and V of hot cells: for every query there is one whose score makes its weight 9 times that of all other cells."""
    n_seq, n_tokens, n_head, n_embd = q.shape
    keys = q.reshape(n_seq, n_tokens, n_head_kv, -1, n_embd).transpose(0, 1, 3, 2, 4).reshape(n_seq, -1, n_head_kv, n_embd)
    score = np.log(9 * n_kv) + _DEVIATION**2 / 2
    keys = keys[:, :_N_HOT]
    k = np.zeros((n_seq, _N_HOT, n_head_kv, n_embd), np.float32)
    k[:, : keys.shape[1]] = score / scale * keys / np.square(keys).sum(axis=-1, keepdims=True)
    return k.astype(np.float16), np.ones_like(k, np.float16)


def measure(
    shape: list[int],
    n_kv: int,
    n_tokens: int,
    kv_type: str,
    kernels: list[tuple[str, float | None]],
    n_threads: int,
    n: int,
    n_seq: int,
) -> dict[tuple[str, float | None], float]:
    """Seconds per call and sequence of each kernel and its v_skip, "ggml" being ggml's; None: there are no hot cells."""
    n_embd, n_head_kv, n_gqa = shape
    rng = np.random.default_rng(0)
    rows = [
        ggml.quantize(rng.standard_normal((n_seq, n_kv, n_head_kv, n_embd), np.float32), kv_type).data for _ in range(2)
    ]
    q = rng.standard_normal((n_seq, n_tokens, n_head_kv * n_gqa, n_embd), np.float32)
    n_copies = min(1 + -(-2 * cache_size() // sum(x.nbytes for x in rows)), (n + 1) * len(kernels))

    scale = 1 / np.sqrt(n_embd)
    hot = None
    if any(v_skip is not None for _, v_skip in kernels):
        scale *= _DEVIATION
        # queries that share a KV head look for much the same
        groups = q.reshape(n_seq, n_tokens, n_head_kv, n_gqa, n_embd)
        q = (0.9 * groups[:, :, :, :1] + np.sqrt(1 - 0.9**2) * groups).reshape(q.shape).astype(np.float32)
        hot = make_hot(q, n_head_kv, scale, n_kv)

    times: dict[tuple[str, float | None], list[float]] = {kernel: [] for kernel in kernels}
    with contextlib.ExitStack() as stack:
        theirs = [
            stack.enter_context(FlashAttnExt(q, *rows, types=kv_type, n_threads=n_threads)) for _ in range(n_copies)
        ]
        ours = {
            v_skip: [
                Attention(q, (x.k, x.v), hot, types=(kv_type, "f16"), scale=scale, v_skip=v_skip or 0.0) for x in theirs
            ]
            for v_skip in {v_skip for kernel, v_skip in kernels if kernel != "ggml"}
        }
        copies = itertools.cycle(range(n_copies))
        # the first round is not counted
        for i in range(n + 1):
            for kernel in kernels:
                copy = next(copies)
                time.sleep(_SETTLE if n_threads > 1 else 0)
                start = time.perf_counter()
                if kernel[0] == "ggml":
                    theirs[copy].compute()
                else:
                    ours[kernel[1]][copy].compute(n_threads, kernel[0])
                if i > 0:
                    times[kernel].append(time.perf_counter() - start)
        del ours
    return {kernel: statistics.median(values) / n_seq for kernel, values in times.items()}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    bandwidth = {}
    for n_threads in args.threads:
        bandwidth[n_threads] = read_bandwidth(n_threads)
        say(
            f"{n_threads} threads read {bandwidth[n_threads] / 1e9:.1f} GB/s;"
            f" a call that has nothing to do takes {call_time(n_threads) * 1e6:.0f} µs"
        )
    if max(args.threads) > (os.cpu_count() or 1):
        say(f"there are {os.cpu_count()} processors only")
    if os.getloadavg()[0] > 0.5:
        say(f"other programs keep {os.getloadavg()[0]:.1f} processors busy, so that the times mean little")

    records = []
    cases = itertools.product(args.shape, args.n_kv, args.n_tokens, args.cache_type, args.threads)
    for shape, n_kv, n_tokens, kv_type, n_threads in cases:
        name = "/".join(map(str, shape))
        say(f"{name}, {n_kv} cells, {n_tokens} tokens, {kv_type}, {n_threads} threads")
        kernels = [*itertools.product(args.isa, args.v_skip or [None]), ("ggml", None)]
        times = measure(shape, n_kv, n_tokens, kv_type, kernels, n_threads, args.repetitions, args.sequences)
        n_bytes = 2 * n_kv * shape[1] * ggml.row_size(kv_type, shape[0])
        for (kernel, v_skip), seconds in times.items():
            records.append(
                {
                    "shape": name, "n_kv": n_kv, "n_tokens": n_tokens, "type": kv_type, "threads": n_threads,
                    "kernel": kernel if v_skip is None else f"{kernel}, v_skip={v_skip:g}",
                    "ns": seconds * 1e9 / (n_kv * shape[1]), "GB/s": n_bytes / seconds / 1e9,
                    "share": n_bytes / seconds / bandwidth[n_threads], "x ggml": times["ggml", None] / seconds,
                }
            )  # fmt: skip
    return records


def table(records: list[dict[str, Any]]) -> Table:
    res = Table(box=box.SIMPLE)
    short = {"n_tokens": "p", "threads": "t"}
    for name, value in records[0].items():
        res.add_column(short.get(name, name), no_wrap=True, justify="left" if isinstance(value, str) else "right")
    for record in records:
        *case, kernel, ns, rate, share, ratio = record.values()
        res.add_row(*map(str, case), kernel, f"{ns:.2f}", f"{rate:.2f}", f"{share:.0%}", f"{ratio:.1f}")
        if kernel == "ggml":
            res.add_section()
    return res


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        records = run(args)
    except LlamamixError as error:
        say(str(error))
        return 1
    if args.output is None and sys.stdout.isatty():
        Console().print(table(records))
    else:
        print(render(records, args.output or "md"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
