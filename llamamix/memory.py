"""The sequences in a context's KV cache."""

from __future__ import annotations

from typing import Any

from ._ffi import lib
from ._handle import ExclusiveHandle
from .errors import ContextError, ParamsError
from .params import check_int

_POS_MAX = 2**31 - 1


class Memory:
    """Operations on sequences and position ranges [p0, p1); a p1 of -1 means to the end.

    What libllama would abort the process for raises ParamsError (an argument) or ContextError (the cache can not do
    it).
    """

    def __init__(self, handle: ExclusiveHandle, *, n_seq_max: int, n_stream: int, has_multi_pos: bool) -> None:
        self._handle = handle
        self._n_seq_max = n_seq_max
        self._n_stream = n_stream
        self._has_multi_pos = has_multi_pos
        self._holes: set[int] = set()  # sequences that may have positions missing between others

    def clear(self) -> None:
        """Forget everything."""
        with self._handle as ctx:
            lib.llama_memory_clear(lib.llama_get_memory(ctx), True)
            self._holes.clear()

    def seq_rm(self, seq_id: int = -1, p0: int = 0, p1: int = -1) -> None:
        """Remove positions of one sequence, or of all (-1).

        Raises ContextError when the cache can not remove a part of a sequence (recurrent models).
        """
        check_int(seq_id, "seq_id", -1, self._n_seq_max - 1)
        p0, p1 = self._range(p0, p1)
        with self._handle as ctx:
            memory = lib.llama_get_memory(ctx)
            if not lib.llama_memory_seq_rm(memory, seq_id, p0, p1):
                raise ContextError("This KV cache can not remove a part of a sequence.")
            for seq in range(self._n_seq_max) if seq_id < 0 else (seq_id,):
                pos_max = lib.llama_memory_seq_pos_max(memory, seq)
                if pos_max < 0:
                    self._holes.discard(seq)
                elif 0 <= p1 <= pos_max:
                    self._holes.add(seq)

    def seq_cp(self, seq_id_src: int, seq_id_dst: int, p0: int = 0, p1: int = -1) -> None:
        """Make positions of one sequence positions of another too, which must not have any in that range.

        When every sequence has its own stream, only whole sequences can be copied, and to an empty one.
        """
        self._seq(seq_id_src, "seq_id_src")
        self._seq(seq_id_dst, "seq_id_dst")
        p0, p1 = self._range(p0, p1)
        if seq_id_src == seq_id_dst:
            return
        with self._handle as ctx:
            memory = lib.llama_get_memory(ctx)
            dst_min = lib.llama_memory_seq_pos_min(memory, seq_id_dst)
            dst_max = lib.llama_memory_seq_pos_max(memory, seq_id_dst)
            src_max = lib.llama_memory_seq_pos_max(memory, seq_id_src)
            whole = p0 == 0 and not 0 <= p1 <= src_max
            if self._n_stream > 1:
                if not whole:
                    raise ParamsError(
                        "A part of a sequence can not be copied between streams; kv_unified=True allows it."
                    )
                if dst_max >= 0:
                    raise ParamsError(f"Sequence {seq_id_dst} must be empty to be copied to; remove it first.")
            elif dst_max >= p0 and (p1 < 0 or dst_min < p1):
                raise ParamsError(f"Sequence {seq_id_dst} has positions in that range already; remove them first.")
            if whole:
                p0, p1 = -1, -1
            lib.llama_memory_seq_cp(memory, seq_id_src, seq_id_dst, p0, p1)
            if dst_max >= 0 or seq_id_src in self._holes:
                self._holes.add(seq_id_dst)

    def seq_keep(self, seq_id: int) -> None:
        """Remove all other sequences."""
        self._seq(seq_id, "seq_id")
        with self._handle as ctx:
            memory = lib.llama_get_memory(ctx)
            lib.llama_memory_seq_keep(memory, seq_id)
            if self._n_stream > 1:  # that was this sequence's stream only
                for other in range(self._n_seq_max):
                    if other != seq_id:
                        lib.llama_memory_seq_rm(memory, other, -1, -1)
            self._holes &= {seq_id}

    def seq_add(self, seq_id: int, p0: int, p1: int, delta: int) -> None:
        """Move positions by ``delta``; those that come out below 0 are removed."""
        check_int(delta, "delta", -_POS_MAX, _POS_MAX)
        with self._handle as ctx:
            memory, p0, p1 = self._shift(ctx, seq_id, p0, p1)
            if lib.llama_memory_seq_pos_max(memory, seq_id) + delta >= _POS_MAX:
                raise ParamsError(f"delta moves positions of sequence {seq_id} beyond {_POS_MAX}.")
            lib.llama_memory_seq_add(memory, seq_id, p0, p1, delta)
            self._holes.add(seq_id)

    def seq_div(self, seq_id: int, p0: int, p1: int, d: int) -> None:
        """Divide positions by ``d``, rounding down."""
        check_int(d, "d", 1, _POS_MAX)
        with self._handle as ctx:
            memory, p0, p1 = self._shift(ctx, seq_id, p0, p1)
            lib.llama_memory_seq_div(memory, seq_id, p0, p1, d)
            self._holes.add(seq_id)

    def seq_pos_min(self, seq_id: int = 0) -> int:
        """The smallest position of a sequence, -1: it is empty."""
        self._seq(seq_id, "seq_id")
        with self._handle as ctx:
            return int(lib.llama_memory_seq_pos_min(lib.llama_get_memory(ctx), seq_id))

    def seq_pos_max(self, seq_id: int = 0) -> int:
        """The largest position of a sequence, -1: it is empty."""
        self._seq(seq_id, "seq_id")
        with self._handle as ctx:
            return int(lib.llama_memory_seq_pos_max(lib.llama_get_memory(ctx), seq_id))

    @property
    def can_shift(self) -> bool:
        """True when positions can be moved (seq_add, seq_div)."""
        with self._handle as ctx:
            return not self._has_multi_pos and bool(lib.llama_memory_can_shift(lib.llama_get_memory(ctx)))

    def n_cells(self, ctx: Any, seq_id: int, first: int, end: int) -> int:
        """Cells that a sequence certainly has when positions ``first`` to ``end`` - 1 are added."""
        if seq_id in self._holes:
            return end - first
        pos_min = lib.llama_memory_seq_pos_min(lib.llama_get_memory(ctx), seq_id)
        return end - (first if pos_min < 0 else pos_min)

    def note_loaded(self, seq_id: int | None) -> None:
        """A saved state has taken the place of a sequence, or of all (None)."""
        self._holes.update(range(self._n_seq_max) if seq_id is None else (seq_id,))

    def _seq(self, seq_id: Any, name: str) -> None:
        check_int(seq_id, name, 0, self._n_seq_max - 1)

    def _range(self, p0: Any, p1: Any) -> tuple[int, int]:
        check_int(p0, "p0", -1, _POS_MAX)
        check_int(p1, "p1", -1, _POS_MAX)
        return max(int(p0), 0), int(p1)

    def _shift(self, ctx: Any, seq_id: Any, p0: Any, p1: Any) -> tuple[Any, int, int]:
        self._seq(seq_id, "seq_id")
        p0, p1 = self._range(p0, p1)
        memory = lib.llama_get_memory(ctx)
        if self._has_multi_pos or not lib.llama_memory_can_shift(memory):
            raise ContextError("The positions in this KV cache can not be moved.")
        return memory, p0, p1
