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
    """The sequences in a context's KV cache, and operations on them: ``context.memory``.

    Ranges of positions are [p0, p1); a ``p1`` of -1 means to the end. What libllama would abort the process for is
    refused: with ParamsError where an argument is wrong, with ContextError where the cache can not do it. Nothing has
    changed then.

    Attributes:
        n_seq_max (int): Sequences; their ids are 0 to ``n_seq_max - 1``.
        n_stream (int): 1 when they share all cells (``kv_unified``), else one per sequence.
        has_multi_pos (bool): True when a token has several positions (M-RoPE); none can be moved then.
        held (Held): The tokens of the sequences: ``held.tokens(seq_id)`` is int32 [n], or None where they are not
            known.
    """

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
        """The ``llama_memory_t``, while no other thread has it."""
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
