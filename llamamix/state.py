"""Saved states of a context: what libllama writes, behind a header by which damaged bytes are told."""

from __future__ import annotations

import struct
import zlib
from typing import Any

from ._ffi import error_lines, ffi, lib
from .errors import ContextError, ParamsError

# magic, what it is of (-1: all sequences, 0: one), CRC-32 and size of what follows
_HEADER = struct.Struct("<8siIQ")
_MAGIC = b"LLAMAMIX"


def save_state(ctx: Any, seq_id: int | None) -> bytes:
    """The state of one sequence or of all (None). Raises ContextError."""
    with error_lines() as errors:
        if seq_id is None:
            size = lib.llama_state_get_size(ctx)
        else:
            size = lib.llama_state_seq_get_size(ctx, seq_id)
        state = bytearray(_HEADER.size + size)
        body = memoryview(state)[_HEADER.size :]
        with ffi.from_buffer("uint8_t[]", body) as target:
            if seq_id is None:
                written = lib.llama_state_get_data(ctx, target, size)
            else:
                written = lib.llama_state_seq_get_data(ctx, target, size, seq_id)
        if size == 0 or written != size:
            raise ContextError(f"The state can not be saved: {errors.reason() or 'libllama gives no reason'}.")
        _HEADER.pack_into(state, 0, _MAGIC, -1 if seq_id is None else 0, zlib.crc32(body), size)
        return bytes(state)


def state_body(state: Any, whole: bool) -> memoryview:
    """What follows the header. Raises ParamsError for what are no bytes, ContextError for what is no such state."""
    try:
        view = memoryview(state).cast("B")
    except TypeError:
        raise ParamsError(f"A state must be bytes, not {type(state).__name__}.") from None
    if len(view) < _HEADER.size:
        raise ContextError("These bytes are no saved state.")
    magic, whose, crc, size = _HEADER.unpack_from(view)
    body = view[_HEADER.size :]
    if magic != _MAGIC:
        raise ContextError("These bytes are no saved state.")
    if whose not in (-1, 0) or len(body) != size or zlib.crc32(body) != crc:
        raise ContextError("The saved state is damaged.")
    if whole != (whose == -1):
        held = "all sequences" if whose == -1 else "one sequence"
        raise ContextError(f"The saved state is that of {held}.")
    return body


def load_state(ctx: Any, body: memoryview, seq_id: int | None) -> None:
    """Put it in place of one sequence or of all (None). Raises ContextError; what it replaces is gone then."""
    with error_lines() as errors:
        # released before an exception: its traceback may be kept, and freed in any order
        with ffi.from_buffer("uint8_t[]", body) as source:
            if seq_id is None:
                read = lib.llama_state_set_data(ctx, source, len(body))
            else:
                read = lib.llama_state_seq_set_data(ctx, source, len(body), seq_id)
        if read != len(body):
            raise ContextError(f"The state can not be loaded: {errors.reason() or 'it is of another context'}.")
