"""The attention kernel in a program of its own (attn_run.cpp), compiled for another processor and run by an emulator.

LLAMAMIX_ATTN_RUN is the command, e.g. "qemu-aarch64 build/aarch64/bin/attn-run".
"""

from __future__ import annotations

import os
import shlex
import struct
import subprocess
from functools import cache
from typing import Any

import numpy as np

from llamamix.params import KV_TYPES


@cache
def _process() -> subprocess.Popen[bytes] | None:
    command = shlex.split(os.environ.get("LLAMAMIX_ATTN_RUN", ""))
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) if command else None


@cache
def emulated_isas() -> tuple[str, ...]:
    """What the program offers beside the portable kernel; nothing without a program."""
    process = _process()
    if process is None:
        return ()
    names = process.stdout.readline().decode().split()
    assert names, f"{os.environ['LLAMAMIX_ATTN_RUN']} does not start"
    return tuple(f"emulated {name}" for name in names if name != "generic")


def compute(
    isa: str,
    n_threads: int,
    q: np.ndarray,
    segments: list[tuple[tuple[str, np.ndarray], tuple[str, np.ndarray]]],
    mask: np.ndarray | None,
    sinks: np.ndarray | None,
    scale: float,
    logit_softcap: float,
    max_bias: float,
    n_rot: tuple[int, int],
) -> np.ndarray:
    """attention() of arrays as that takes them; segments: types and rows of K and V, cold and hot."""
    n_stream, n_tokens, n_head, n_embd_k = q.shape
    sizes: list[Any] = []
    arrays = [q]
    for (type_k, k), (type_v, v) in segments:
        sizes += [KV_TYPES[type_k], KV_TYPES[type_v], k.shape[1], k.shape[3] * k.itemsize, v.shape[3] * v.itemsize]
        arrays += [k, v]
    _, hot_v = segments[1][1]
    n_embd_v = hot_v.shape[3]  # hot rows are not quantised
    arrays += [x for x in (mask, sinks) if x is not None]
    header = struct.pack(
        "16s21q3d", isa.removeprefix("emulated ").encode(), n_threads, n_embd_k, n_embd_v, n_head,
        segments[0][0][1].shape[2], n_tokens, n_stream, *sizes, 0 if mask is None else mask.itemsize,
        int(sinks is not None), *n_rot, scale, logit_softcap, max_bias,
    )  # fmt: skip
    process = _process()
    process.stdin.write(b"".join([header, *(np.ascontiguousarray(x).tobytes() for x in arrays)]))
    process.stdin.flush()
    shape = (n_stream, n_tokens, n_head, n_embd_v)
    data = process.stdout.read(4 * int(np.prod(shape)))
    assert len(data) == 4 * int(np.prod(shape)), f"{isa}: the program has stopped"
    return np.frombuffer(data, np.float32).reshape(shape)
