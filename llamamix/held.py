"""What is known of the sequences in a KV cache without asking it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np


class Held:
    """The tokens of each sequence, and which sequences may have gaps. All objects of one cache share it.

    A KV cache knows positions, not tokens. They are noted here as they are decoded, and known as long as a sequence is
    nothing but those of positions 0, 1, 2, ...: not after a gap, a shift or a saved state, until it is empty again.

    gaps  sequences that may lack positions between others
    """

    def __init__(self) -> None:
        self.gaps: set[int] = set()
        self._tokens: dict[int, array[int] | None] = {}  # None: not known; missing: none are held

    def tokens(self, seq_id: int) -> np.ndarray | None:
        """The tokens that a sequence holds, a copy, int32 [n]; None: they are not known."""
        known = self._tokens.get(seq_id, array("i"))
        return None if known is None else np.array(known, np.int32)

    def add(self, seq_id: int, pos: np.ndarray, tokens: np.ndarray) -> None:
        """Tokens were decoded; both int32 [n]."""
        known = self._tokens.setdefault(seq_id, array("i"))
        if known is None:
            return
        if np.array_equal(pos, np.arange(len(known), len(known) + len(pos))):
            known.frombytes(np.ascontiguousarray(tokens, np.int32).tobytes())
        else:
            self._tokens[seq_id] = None

    def cut(self, seq_id: int, n: int) -> None:
        """A sequence holds no more than its first n positions."""
        known = self._tokens.get(seq_id)
        if n == 0:
            self._tokens.pop(seq_id, None)
            self.gaps.discard(seq_id)
        elif known is not None:
            del known[n:]

    def remove(self, seq_id: int, p0: int, p1: int, pos_max: int) -> None:
        """Positions [p0, p1) were removed (a p1 of -1: to the end); ``pos_max`` is the last one that is left, or -1."""
        if pos_max < 0:
            self.cut(seq_id, 0)
        elif 0 <= p1 <= pos_max:
            self.gaps.add(seq_id)
            self._tokens[seq_id] = None
        else:
            self.cut(seq_id, max(p0, 0))

    def copy(self, src: int, dst: int, p0: int, p1: int, was_empty: bool) -> None:
        """Positions [p0, p1) of one sequence (a p1 of -1: to the end) became another's, which had none or others."""
        if not was_empty or src in self.gaps:
            self.gaps.add(dst)
        known = self._tokens.get(src, array("i"))
        end = None if p1 < 0 else p1
        self._tokens[dst] = known[:end] if p0 == 0 and was_empty and known is not None else None

    def keep(self, seq_id: int) -> None:
        """All other sequences were removed."""
        self.gaps.intersection_update({seq_id})
        self._tokens = {seq: known for seq, known in self._tokens.items() if seq == seq_id}

    def forget(self, seq_ids: Iterable[int]) -> None:
        """Sequences may hold anything from now on."""
        for seq_id in seq_ids:
            self.gaps.add(seq_id)
            self._tokens[seq_id] = None

    def clear(self) -> None:
        """All sequences are empty."""
        self.gaps.clear()
        self._tokens.clear()


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two arrays begin with alike."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
