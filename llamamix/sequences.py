"""Operations on the sequences of a KV cache: what a context's memory and a cache driven by hand have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

from ._ffi import lib
from .errors import LlamamixError, ParamsError
from .held import Held
from .params import POS_MAX, check_int


class Sequences:
    """Operations on sequences and ranges of positions [p0, p1); a ``p1`` of -1 means to the end.

    What libllama would abort the process for is refused: with ParamsError where an argument is wrong, with CacheError
    (a context's memory: ContextError) where the cache can not do it. Nothing has changed then.

    Attributes:
        n_seq_max (int): Sequences; their ids are 0 to ``n_seq_max - 1``.
        n_stream (int): 1 when they share all cells (unified), else one per sequence.
        has_multi_pos (bool): True when a token has several positions (M-RoPE); none can be moved then.
        held (Held): The tokens of the sequences, as far as they are known; all objects of one cache have the same.
    """

    _error: ClassVar[type[LlamamixError]]

    def __init__(self, n_seq_max: int, n_stream: int, has_multi_pos: bool, held: Held) -> None:
        self.n_seq_max = n_seq_max
        self.n_stream = n_stream
        self.has_multi_pos = has_multi_pos
        self.held = held

    @contextlib.contextmanager
    def use_memory(self) -> Iterator[Any]:
        """The ``llama_memory_t``, while no other thread has it."""
        raise NotImplementedError
        yield

    def clear(self) -> None:
        """Remove all tokens and zero the rows."""
        with self.use_memory() as memory:
            lib.llama_memory_clear(memory, True)
            self.held.clear()

    def seq_rm(self, seq_id: int = -1, p0: int = 0, p1: int = -1) -> None:
        """Remove positions of one sequence, or of all.

        Args:
            seq_id: The sequence; -1: all.
            p0: The first position.
            p1: The one after the last; -1: to the end.

        Raises:
            ParamsError: For an argument out of bounds.
            CacheError: When a part is to be removed of what has no way back, the state of recurrent layers (of a
                context: ContextError).
        """
        check_int(seq_id, "seq_id", -1, self.n_seq_max - 1)
        p0, p1 = _range(p0, p1)
        with self.use_memory() as memory:
            if not lib.llama_memory_seq_rm(memory, seq_id, p0, p1):
                raise self._error("This KV cache can not remove a part of a sequence.")
            for seq in range(self.n_seq_max) if seq_id < 0 else (seq_id,):
                self.held.remove(seq, p0, p1, lib.llama_memory_seq_pos_max(memory, seq))

    def seq_cp(self, seq_id_src: int, seq_id_dst: int, p0: int = 0, p1: int = -1) -> None:
        """Make positions of one sequence positions of another too, which must not have any in that range.

        Unified, the two share the cells then. When every sequence has its own stream, only whole sequences can be
        copied, and to an empty one.

        Args:
            seq_id_src: The sequence that has them.
            seq_id_dst: The sequence that gets them.
            p0: The first position.
            p1: The one after the last; -1: to the end.

        Raises:
            ParamsError: For an argument out of bounds, positions that are there already, and a part where only a whole
                sequence can be copied.
        """
        self._seq(seq_id_src, "seq_id_src")
        self._seq(seq_id_dst, "seq_id_dst")
        p0, p1 = _range(p0, p1)
        if seq_id_src == seq_id_dst:
            return
        with self.use_memory() as memory:
            dst_min = lib.llama_memory_seq_pos_min(memory, seq_id_dst)
            dst_max = lib.llama_memory_seq_pos_max(memory, seq_id_dst)
            whole = p0 == 0 and not 0 <= p1 <= lib.llama_memory_seq_pos_max(memory, seq_id_src)
            if self.n_stream > 1:
                if not whole:
                    raise ParamsError(
                        "p0 and p1 must be all of the sequence: a part can only be copied where sequences share all"
                        " cells (unified)."
                    )
                if dst_max >= 0:
                    raise ParamsError(f"seq_id_dst {seq_id_dst} must be empty to be copied to; remove it first.")
            elif dst_max >= p0 and (p1 < 0 or dst_min < p1):
                raise ParamsError(f"seq_id_dst {seq_id_dst} has positions in that range already; remove them first.")
            lib.llama_memory_seq_cp(memory, seq_id_src, seq_id_dst, *((-1, -1) if whole else (p0, p1)))
            self.held.copy(seq_id_src, seq_id_dst, p0, p1, dst_max < 0)
            if self.n_stream > 1:
                self._copy_rows(seq_id_src, seq_id_dst)

    def seq_keep(self, seq_id: int) -> None:
        """Remove all other sequences.

        Args:
            seq_id: The one that stays.

        Raises:
            ParamsError: For an argument out of bounds.
        """
        self._seq(seq_id, "seq_id")
        with self.use_memory() as memory:
            lib.llama_memory_seq_keep(memory, seq_id)
            if self.n_stream > 1:  # that was this sequence's stream only
                for other in range(self.n_seq_max):
                    if other != seq_id:
                        lib.llama_memory_seq_rm(memory, other, -1, -1)
            self.held.keep(seq_id)

    def seq_add(self, seq_id: int, p0: int, p1: int, delta: int) -> None:
        """Move positions; those that come out below 0 are removed. Cells that sequences share move in all of them.

        The rows of K are turned by the next decode (RoPE).

        Args:
            seq_id: The sequence.
            p0: The first position.
            p1: The one after the last; -1: to the end.
            delta: What is added to them.

        Raises:
            ParamsError: For an argument out of bounds.
            CacheError: When the positions can not be moved, see ``can_shift`` (of a context: ContextError).
        """
        self._seq(seq_id, "seq_id")
        p0, p1 = _range(p0, p1)
        check_int(delta, "delta", -POS_MAX, POS_MAX)
        with self._shifting(seq_id) as memory:
            if lib.llama_memory_seq_pos_max(memory, seq_id) + delta >= POS_MAX:
                raise ParamsError(f"delta moves positions of sequence {seq_id} beyond {POS_MAX}.")
            lib.llama_memory_seq_add(memory, seq_id, p0, p1, delta)

    def seq_div(self, seq_id: int, p0: int, p1: int, d: int) -> None:
        """Divide positions, rounding down. Cells that sequences share move in all of them.

        Args:
            seq_id: The sequence.
            p0: The first position.
            p1: The one after the last; -1: to the end.
            d: What they are divided by, 1 or more.

        Raises:
            ParamsError: For an argument out of bounds.
            CacheError: When the positions can not be moved, see ``can_shift`` (of a context: ContextError).
        """
        self._seq(seq_id, "seq_id")
        p0, p1 = _range(p0, p1)
        check_int(d, "d", 1, POS_MAX)
        with self._shifting(seq_id) as memory:
            lib.llama_memory_seq_div(memory, seq_id, p0, p1, d)

    def seq_pos_min(self, seq_id: int = 0) -> int:
        """The smallest position of a sequence, -1: it is empty.

        Args:
            seq_id: The sequence.

        Raises:
            ParamsError: For a sequence that there is not.
        """
        self._seq(seq_id, "seq_id")
        with self.use_memory() as memory:
            return int(lib.llama_memory_seq_pos_min(memory, seq_id))

    def seq_pos_max(self, seq_id: int = 0) -> int:
        """The largest position of a sequence, -1: it is empty.

        Args:
            seq_id: The sequence.

        Raises:
            ParamsError: For a sequence that there is not.
        """
        self._seq(seq_id, "seq_id")
        with self.use_memory() as memory:
            return int(lib.llama_memory_seq_pos_max(memory, seq_id))

    @property
    def can_shift(self) -> bool:
        """True when positions can be moved (seq_add(), seq_div())."""
        with self.use_memory() as memory:
            return self._can_shift(memory)

    def note_loaded(self, seq_id: int | None) -> None:
        """A saved state has taken the place of a sequence, or of all (None)."""
        self.held.forget(range(self.n_seq_max) if seq_id is None else (seq_id,))

    def _copy_rows(self, src: int, dst: int) -> None:
        """Copy rows between streams where libllama leaves that to the next decode, and there is none."""

    def _can_shift(self, memory: Any) -> bool:
        return not self.has_multi_pos and bool(lib.llama_memory_can_shift(memory))

    @contextlib.contextmanager
    def _shifting(self, seq_id: int) -> Iterator[Any]:
        with self.use_memory() as memory:
            if not self._can_shift(memory):
                raise self._error("The positions in this KV cache can not be moved.")
            yield memory
            # cells that sequences share have moved in all of them
            self.held.forget((seq_id,) if self.n_stream > 1 else range(self.n_seq_max))

    def _seq(self, seq_id: Any, name: str) -> int:
        return check_int(seq_id, name, 0, self.n_seq_max - 1)


def _range(p0: Any, p1: Any) -> tuple[int, int]:
    return max(check_int(p0, "p0", -1, POS_MAX), 0), check_int(p1, "p1", -1, POS_MAX)
