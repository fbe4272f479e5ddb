"""The kernels in a program of their own (attn_run.cpp), compiled for another processor and run by an emulator.

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

from llamamix import ggml
from llamamix.formats import FORMATS

_ATTENTION, _QUANTIZE = 0, 1


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


def _request(isa: str, what: int, header: bytes, arrays: list[np.ndarray], n_bytes: int) -> bytes:
    process = _process()
    start = struct.pack("16sq", isa.removeprefix("emulated ").encode(), what)
    process.stdin.write(b"".join([start, header, *(np.ascontiguousarray(x).tobytes() for x in arrays)]))
    process.stdin.flush()
    data = process.stdout.read(n_bytes)
    assert len(data) == n_bytes, f"{isa}: the program has stopped"
    return data


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
    means: np.ndarray | None,
) -> np.ndarray:
    """attention() of arrays as that takes them; segments: types and rows of K and V, cold and hot."""
    n_stream, n_tokens, n_head, n_embd_k = q.shape
    sizes: list[Any] = []
    arrays = [q]
    for (type_k, k), (type_v, v) in segments:
        sizes += [FORMATS[type_k].type, FORMATS[type_v].type, k.shape[1], k.shape[3] * k.itemsize, v.shape[3] * v.itemsize]
        arrays += [k, v]
    _, hot_v = segments[1][1]
    n_embd_v = hot_v.shape[3]  # hot rows are not quantised
    arrays += [x for x in (mask, sinks, means) if x is not None]
    header = struct.pack(
        "22q3d", n_threads, n_embd_k, n_embd_v, n_head, segments[0][0][1].shape[2], n_tokens, n_stream, *sizes,
        0 if mask is None else mask.itemsize, int(sinks is not None), *n_rot, 0 if means is None else means.shape[1], scale, logit_softcap, max_bias,
    )  # fmt: skip
    shape = (n_stream, n_tokens, n_head, n_embd_v)
    data = _request(isa, _ATTENTION, header, arrays, 4 * int(np.prod(shape)))
    return np.frombuffer(data, np.float32).reshape(shape)


def quantize(isa: str, src: ggml.Tensor, kv_type: str, n_rot: int) -> np.ndarray:
    """Rows [n, n_rows], rotated in blocks of n_rot, as the bytes of another type: uint8 [n_rows, row_size]."""
    n, n_rows = src.ne
    header = struct.pack("5q", FORMATS[src.type].type, FORMATS[kv_type].type, n_rows, n, n_rot)
    row_size = ggml.row_size(kv_type, n)
    data = _request(isa, _QUANTIZE, header, [src.data], n_rows * row_size)
    return np.frombuffer(data, np.uint8).reshape(n_rows, row_size)
