"""The kernels in a program of their own (attn_run.cpp), compiled for another processor and run by an emulator.

LLAMAMIX_ATTN_RUN is the command, e.g. "qemu-aarch64 build/aarch64/bin/attn-run".
"""

from __future__ import annotations

import os
import shlex
from functools import cache
from typing import Any

import numpy as np

from llamamix import ggml

from .requests import Program


@cache
def _program() -> Program | None:
    command = shlex.split(os.environ.get("LLAMAMIX_ATTN_RUN", ""))
    return Program(command) if command else None


@cache
def emulated_isas() -> tuple[str, ...]:
    """What the program offers beside the portable kernel; nothing without a program."""
    program = _program()
    return tuple(f"emulated {name}" for name in program.names if name != "generic") if program else ()


def all_isas(native: tuple[str, ...]) -> tuple[str, ...]:
    """What tests of every instruction set take: the library's, the portable one last; with a program its own, and the
    portable one to compare with, since the others are tested without it.
    """
    return (*emulated_isas(), native[-1]) if emulated_isas() else native


def compute(isa: str, *args: Any, **kwargs: Any) -> np.ndarray:
    """Program.attention() by one of these."""
    return _program().attention(isa.removeprefix("emulated "), *args, **kwargs)


def quantize(isa: str, src: ggml.Tensor, kv_type: str, n_rot: int) -> np.ndarray:
    """Rows [n, n_rows], rotated in blocks of n_rot, as the bytes of another type: uint8 [n_rows, row_size]."""
    return _program().quantize(isa.removeprefix("emulated "), src, kv_type, n_rot)
