"""Tokens as llama_decode() wants them, checked before any pointer is handed over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._ffi import ffi
from .errors import ParamsError
from .params import POS_MAX, check_int


@dataclass(frozen=True, slots=True)
class Tokens:
    """n tokens with their positions and sequences, in the order of their positions.

    tokens   int32 [n]
    pos      int32 [n]
    seq_ids  int32 [m], the sequence ids of all tokens one after the other, m >= n
    n_seq    int32 [n], how many of them belong to each token
    output   int8 [n], 1 where logits are wanted
    """

    tokens: np.ndarray
    pos: np.ndarray
    seq_ids: np.ndarray
    n_seq: np.ndarray
    output: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> Tokens:
        ends = np.concatenate(([0], np.cumsum(self.n_seq)))
        start, stop, _ = part.indices(len(self))
        return Tokens(
            self.tokens[part],
            self.pos[part],
            self.seq_ids[ends[start] : ends[stop]],
            self.n_seq[part],
            self.output[part],
        )

    @property
    def n_outputs(self) -> int:
        """Tokens whose logits are wanted."""
        return int(np.count_nonzero(self.output))

    def spans(self) -> dict[int, tuple[int, int]]:
        """The first position of each sequence, and how many tokens it has."""
        pos = np.repeat(self.pos, self.n_seq)
        of_each = {int(seq_id): pos[self.seq_ids == seq_id] for seq_id in np.unique(self.seq_ids)}
        return {seq_id: (int(own[0]), len(own)) for seq_id, own in of_each.items()}

    def of(self, seq_id: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a sequence and their positions."""
        mine = self.seq_ids == seq_id
        if len(mine) != len(self) or not mine.all():
            mine = np.repeat(np.arange(len(self)), self.n_seq)[mine]
        return self.tokens[mine], self.pos[mine]

    def to_c(self) -> tuple[Any, list[Any]]:
        """A ``struct llama_batch`` and what has to stay alive as long as it is used."""
        starts = np.concatenate(([0], np.cumsum(self.n_seq[:-1])))
        pointers = (self.seq_ids.ctypes.data + 4 * starts).astype(np.uintp)
        arrays = [np.ascontiguousarray(a) for a in (self.tokens, self.pos, self.n_seq, pointers, self.output)]
        token, pos, n_seq_id, seq_id, output = (ffi.from_buffer(a) for a in arrays)

        batch = ffi.new("struct llama_batch *")
        batch.n_tokens = len(self)
        batch.token = ffi.cast("int32_t *", token)
        batch.pos = ffi.cast("int32_t *", pos)
        batch.n_seq_id = ffi.cast("int32_t *", n_seq_id)
        batch.seq_id = ffi.cast("int32_t **", seq_id)
        batch.logits = ffi.cast("int8_t *", output)
        return batch[0], [batch, arrays, self.seq_ids]


def positions(pos: Any, n: int) -> np.ndarray:
    """Positions as int32 [n]. Raises ParamsError."""
    array = np.asarray(pos)
    if array.shape != (n,) or array.dtype.kind not in "iu":
        raise ParamsError(f"pos must be {n} whole numbers, one per token.")
    if int(array.min()) < 0 or int(array.max()) >= POS_MAX:
        raise ParamsError(f"pos must be from 0 to {POS_MAX - 1}.")
    return np.ascontiguousarray(array, np.int32)


def sequence_ids(seq_ids: Any, n: int, n_seq_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequence ids, one or several per token, as Tokens.seq_ids and Batch.n_seq. Raises ParamsError."""
    if not isinstance(seq_ids, (Sequence, np.ndarray)) or isinstance(seq_ids, (str, bytes)) or len(seq_ids) != n:
        raise ParamsError(f"seq_ids must have {n} entries, one per token.")
    flat: list[int] = []
    counts: list[int] = []
    for entry in seq_ids:
        ids = list(entry) if isinstance(entry, (Sequence, np.ndarray)) and not isinstance(entry, str) else [entry]
        for seq_id in ids:
            check_int(seq_id, "A sequence id", 0, n_seq_max - 1)
        if not ids or len(set(ids)) != len(ids):
            raise ParamsError(f"A token's sequence ids must be different and at least one, not {entry!r}.")
        flat += sorted(int(seq_id) for seq_id in ids)
        counts.append(len(ids))
    return np.array(flat, np.int32), np.array(counts, np.int32)


def output_mask(logits: Any, n: int, last: np.ndarray) -> np.ndarray:
    """``"last"``, ``"all"`` or n truth values as Tokens.output; ``last`` says which the last ones are."""
    if isinstance(logits, str):
        if logits == "all":
            return np.ones(n, np.int8)
        if logits == "last":
            return last
        raise ParamsError(f"logits must be 'last', 'all' or one truth value per token, not {logits!r}.")
    mask = np.asarray(logits)
    if mask.shape != (n,) or mask.dtype.kind not in "biu":
        raise ParamsError(f"logits must be 'last', 'all' or {n} truth values, one per token.")
    return np.asarray(mask != 0, np.int8)


def check_order(pos: np.ndarray, seq_ids: np.ndarray, n_seq: np.ndarray, may_jump: bool) -> None:
    """Within a sequence each position must follow the one before; M-RoPE models may jump ahead. Raises ParamsError."""
    token_of = np.repeat(np.arange(len(pos)), n_seq)
    for seq_id in np.unique(seq_ids):
        steps = np.diff(pos[token_of[seq_ids == seq_id]].astype(np.int64))
        if (steps < 1).any() if may_jump else (steps != 1).any():
            raise ParamsError(
                f"The positions of sequence {seq_id} must {'grow' if may_jump else 'grow by one'} from token to token."
            )
