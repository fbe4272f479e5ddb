"""Batches, as a KV cache that is driven by hand takes them.

    batch = Batch()
    batch.add(101, 0, 0)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .errors import ParamsError
from .params import N_SEQ_MAX, POS_MAX, check_int
from .tokens import Tokens

_TOKEN_MAX = 2**31 - 1


class Batch:
    """Tokens with their positions and sequences, in the order in which they were added, for an
    [SBatch][llamamix.SBatch].
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._pos: list[int] = []
        self._seq_ids: list[list[int]] = []
        self._logits: list[bool] = []

    def add(self, token: int, pos: int, seq_ids: int | Iterable[int], logits: bool = False) -> None:
        """Add a token.

        Args:
            token: Its id.
            pos: Its position in its sequences.
            seq_ids: A sequence id, or those of the sequences that share the token.
            logits: Whether its logits are wanted.

        Raises:
            ParamsError: For an argument that can not be used; nothing is added then.
        """
        ids = list(seq_ids) if isinstance(seq_ids, Iterable) else [seq_ids]
        ids = [check_int(seq_id, "seq_ids", 0, N_SEQ_MAX - 1) for seq_id in ids]
        if not ids or len(set(ids)) != len(ids):
            raise ParamsError(f"seq_ids must be different sequence ids, at least one, not {seq_ids!r}.")
        token = check_int(token, "token", 0, _TOKEN_MAX)
        pos = check_int(pos, "pos", 0, POS_MAX - 1)
        self._tokens.append(token)
        self._pos.append(pos)
        self._seq_ids.append(sorted(ids))
        self._logits.append(bool(logits))

    def __repr__(self) -> str:
        if not self._tokens:
            return "<Batch of no tokens>"
        n_logits = sum(self._logits)
        positions = f"positions {min(self._pos)} to {max(self._pos)}"
        return f"<Batch of {len(self)} tokens, {self.n_seqs} sequences, {positions}, {n_logits} with logits>"

    def clear(self) -> None:
        """Remove all tokens."""
        for part in (self._tokens, self._pos, self._seq_ids, self._logits):
            part.clear()

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def n_tokens(self) -> int:
        """Tokens in the batch."""
        return len(self)

    @property
    def n_seqs(self) -> int:
        """Different sequences that have a token in the batch."""
        return len({seq_id for ids in self._seq_ids for seq_id in ids})

    def to_c(self) -> tuple[Any, list[Any]]:
        """A ``struct llama_batch`` and what has to stay alive as long as it is used."""
        return Tokens(
            tokens=np.array(self._tokens, np.int32),
            pos=np.array(self._pos, np.int32),
            seq_ids=np.array([seq_id for ids in self._seq_ids for seq_id in ids], np.int32),
            n_seq=np.array([len(ids) for ids in self._seq_ids], np.int32),
            output=np.array(self._logits, np.int8),
        ).to_c()
