"""The metadata of a GGUF file, read by ggml: no weights, no tokenizer, nothing that takes long."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ._ffi import error_lines, ffi, lib
from .errors import ModelError

# enum gguf_type, and how its numbers lie in memory
_NUMBERS = {
    0: "uint8_t", 1: "int8_t", 2: "uint16_t", 3: "int16_t", 4: "uint32_t", 5: "int32_t", 6: "float", 7: "bool",
    10: "uint64_t", 11: "int64_t", 12: "double",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


def check_file(path: Path) -> None:
    """Raise ModelError for what is a directory, can not be read, or does not begin as a GGUF file does."""
    if path.is_dir():
        raise ModelError(f"{path} is a directory, not a GGUF file.")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"{path} can not be read: {error.strerror}.") from None
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file.")


def path_bytes(path: Path) -> bytes:
    """A path as llama.cpp takes it: UTF-8 on Windows, and what the file system has elsewhere."""
    return str(path).encode("utf-8") if os.name == "nt" else os.fsencode(path)


class GgufFile:
    """What a GGUF file says before its tensors.

    Raises ModelError for what is no GGUF file, or ends before its last tensor does.
    """

    def __init__(self, path: Path) -> None:
        check_file(path)
        self._path = path
        params = ffi.new("struct gguf_init_params *")
        params.no_alloc = True
        with error_lines() as errors:
            pointer = lib.gguf_init_from_file(path_bytes(path), params[0])
        if pointer == ffi.NULL:
            raise ModelError(f"{path} is not a GGUF file, or damaged ({errors.reason() or 'ggml gives no reason'}).")
        self._pointer = ffi.gc(pointer, lib.gguf_free)
        #: how many tensors it has
        self.n_tensors: int = int(lib.gguf_get_n_tensors(pointer))
        self._check_end()

    def _check_end(self) -> None:
        start = lib.gguf_get_data_offset(self._pointer)
        offset, size = lib.gguf_get_tensor_offset, lib.gguf_get_tensor_size
        ends = (start + offset(self._pointer, i) + size(self._pointer, i) for i in range(self.n_tensors))
        n_needed = max(ends, default=0)
        n_there = self._path.stat().st_size
        if n_there < n_needed:
            raise ModelError(
                f"{self._path} is not complete: it has {n_there} bytes of {n_needed}; fetch or copy it again."
            )

    def get(self, key: str) -> Any:
        """A number, a text, a truth value or a list of numbers; None: there is no such key, or a list of others."""
        i = lib.gguf_find_key(self._pointer, key.encode())
        if i < 0:
            return None
        kind = lib.gguf_get_kv_type(self._pointer, i)
        if kind == _STRING:
            return ffi.string(lib.gguf_get_val_str(self._pointer, i)).decode("utf-8", "replace")
        if kind != _ARRAY:
            return ffi.cast(f"{_NUMBERS[kind]} *", lib.gguf_get_val_data(self._pointer, i))[0]
        kind = lib.gguf_get_arr_type(self._pointer, i)
        if kind not in _NUMBERS:
            return None
        n = lib.gguf_get_arr_n(self._pointer, i)
        data = lib.gguf_get_arr_data(self._pointer, i)
        return list(ffi.unpack(ffi.cast(f"{_NUMBERS[kind]} *", data), n)) if n > 0 else []
