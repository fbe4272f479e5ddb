"""The device with memory of its own that tests load (tests/cache/own_memory.cpp), and caches on it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from helpers.processes import find_program, library_dir
from llamamix import Context, KVMixedParams, Model, _ffi

N_LAYER, N_EMBD_KV = 2, 128  # of the tiny model, values in a row of K or V


def mixed(cold: str, attn: str = "auto", **params: Any) -> KVMixedParams:
    return KVMixedParams(**{"hot": 48, "group": 12, "sink": 4, "cold": cold, "attn": attn} | params)


def assert_moved(context: Context, n_tokens: int = 240) -> None:
    stats = context.stats
    assert stats.n_migrations > 10
    assert stats.hot_used + stats.cold_used == n_tokens
    assert stats.cold_used > n_tokens - 48


class Device:
    """The device, and models whose layers are on it or on the CPU."""

    def __init__(self, path: Path) -> None:
        self.on_cpu = Model(path)  # before there is a device

        # own-memory.so takes ggml's functions from the process
        for name in ("ggml-base", "ggml"):
            ggml = ctypes.CDLL(str(library_dir() / _ffi._file_name(name)), mode=ctypes.RTLD_GLOBAL)
        library = str(find_program("own-memory.so", "own-memory"))
        self._own = ctypes.CDLL(library)  # never closed: it stays in memory when ggml unloads it
        ggml.ggml_backend_load.restype = ctypes.c_void_p
        self._reg = ctypes.c_void_p(ggml.ggml_backend_load(library.encode()))
        assert self._reg
        self._unload = ggml.ggml_backend_unload

        self.whole = Model(path, n_gpu_layers=99)
        self.upper = Model(path, n_gpu_layers=2)  # the second layer and the output

    def refuse(self, *operations: str) -> None:
        """Operations that it does not have, by the types of their first source and of their result."""
        self._own.own_memory_refuse(",".join(operations).encode())

    def claim_custom(self, claims: bool) -> None:
        """Whether it says that it has custom operations."""
        self._own.own_memory_claim_custom(ctypes.c_bool(claims))

    def emulate_cuda(self, emulates: bool) -> None:
        """Whether it has the kernels for CUDA, emulated. Counts of its nodes start at 0."""
        self._own.own_memory_emulate_cuda(ctypes.c_bool(emulates))

    def n_nodes(self, kind: str) -> int:
        """How many nodes of a kind it has computed by these."""
        return self._own.own_memory_n_emulated(("attention", "join", "means", "move").index(kind) + 1)

    def n_read(self) -> int:
        """Bytes that went from it to the host since the last call."""
        self._own.own_memory_n_read.restype = ctypes.c_size_t
        return self._own.own_memory_n_read()

    def n_waits(self) -> int:
        """How often somebody waited since the last call, for what was not done."""
        self._own.own_memory_n_waits.restype = ctypes.c_size_t
        return self._own.own_memory_n_waits()

    def close(self) -> None:
        for model in (self.on_cpu, self.whole, self.upper):
            model.close()
        self._unload(self._reg)
