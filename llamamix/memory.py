"""The sequences in a context's KV cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ._ffi import lib
from ._handle import ExclusiveHandle
from .errors import ContextError
from .held import Held
from .sequences import Sequences

_N_SHOWN = 8  # sequences


class Memory(Sequences):
    """Operations on the sequences of a context; what its cache can not do raises ContextError."""

    _error = ContextError

    def __init__(self, handle: ExclusiveHandle, *, n_seq_max: int, n_stream: int, has_multi_pos: bool) -> None:
        super().__init__(n_seq_max, n_stream, has_multi_pos, Held())
        self._handle = handle

    def __repr__(self) -> str:
        if self._handle.closed:
            return f"<Memory of {self.n_seq_max} sequences (closed)>"
        with self._handle.glance() as ctx:
            if ctx is None:
                return f"<Memory of {self.n_seq_max} sequences (in use)>"
            memory = lib.llama_get_memory(ctx)
            ends = [
                (lib.llama_memory_seq_pos_min(memory, seq), lib.llama_memory_seq_pos_max(memory, seq))
                for seq in range(self.n_seq_max)
            ]
        held = [f"{seq}: positions {first} to {last}" for seq, (first, last) in enumerate(ends) if last >= 0]
        more = f", and {len(held) - _N_SHOWN} others" if len(held) > _N_SHOWN else ""
        return f"<Memory of {self.n_seq_max} sequences, {', '.join(held[:_N_SHOWN]) or 'all empty'}{more}>"

    @contextlib.contextmanager
    def use_memory(self) -> Iterator[Any]:
        with self._handle as ctx:
            yield lib.llama_get_memory(ctx)

    def n_cells(self, ctx: Any, seq_id: int, first: int, n: int) -> int:
        """Cells that a sequence certainly has when n tokens are added from position ``first`` on."""
        pos_min = lib.llama_memory_seq_pos_min(lib.llama_get_memory(ctx), seq_id)
        if pos_min < 0:
            self.held.cut(seq_id, 0)  # nothing is missing where nothing is
        if (
            pos_min < 0 or seq_id in self.held.gaps or self.has_multi_pos
        ):  # positions of M-RoPE jump, or tokens share them
            return n
        return first + n - int(pos_min)
