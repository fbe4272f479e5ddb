"""Batches and their split into ubatches, as a KV cache that is driven by hand takes them.

    batch = Batch()
    batch.add(101, 0, 0)
    ubatch = SBatch(batch, n_seq_max=1).split_simple(4)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ._ffi import error_lines, ffi, lib
from ._handle import ExclusiveHandle
from .batch import Batch as Tokens
from .errors import LlamamixError, ParamsError
from .memory import check_int

if TYPE_CHECKING:
    from .cache import KVCache

_N_SEQ_MAX = 256  # LLAMA_MAX_SEQ
_TOKEN_MAX = 2**31 - 1
_POS_MAX = 2**31 - 2

_SPLITS = {"simple": 0, "equal": 1, "seq": 2}


class Batch:
    """Tokens with their positions and sequences, in the order in which they were added."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._pos: list[int] = []
        self._seq_ids: list[list[int]] = []
        self._logits: list[bool] = []

    def add(self, token: int, pos: int, seq_ids: int | Iterable[int], logits: bool = False) -> None:
        """Add a token.

        token    its id
        pos      its position in its sequences
        seq_ids  a sequence id, or those of the sequences that share the token
        logits   whether its logits are wanted

        Raises ParamsError, and nothing is added then.
        """
        ids = list(seq_ids) if isinstance(seq_ids, Iterable) else [seq_ids]
        ids = [check_int(seq_id, "seq_ids", 0, _N_SEQ_MAX - 1) for seq_id in ids]
        if not ids or len(set(ids)) != len(ids):
            raise ParamsError(f"seq_ids must be different sequence ids, at least one, not {seq_ids!r}.")
        token = check_int(token, "token", 0, _TOKEN_MAX)
        pos = check_int(pos, "pos", 0, _POS_MAX)
        self._tokens.append(token)
        self._pos.append(pos)
        self._seq_ids.append(sorted(ids))
        self._logits.append(bool(logits))

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


@dataclass(frozen=True, slots=True, eq=False)
class UBatch:
    """A part of a batch that goes through a model, or into a KV cache, at once. The arrays are copies.

    n_tokens      tokens
    n_seq_tokens  tokens of each of the ``n_seqs`` sets of sequences
    n_seqs        sets of sequences; after split_simple() every token counts as one
    token         token ids, int32 [n_tokens]
    pos           positions, int32 [n_tokens]
    seq_id        the sequence ids of each token, ascending, n_tokens tuples
    output        1 where logits are wanted, int8 [n_tokens]
    """

    n_tokens: int
    n_seq_tokens: int
    n_seqs: int
    token: np.ndarray
    pos: np.ndarray
    seq_id: tuple[tuple[int, ...], ...]
    output: np.ndarray

    # for a cache's find_slot()
    source: SBatch = field(repr=False)
    n_reset: int = field(repr=False)  # the source's at the time of the split
    index: int = field(repr=False)

    def __len__(self) -> int:
        return self.n_tokens


class SBatch:
    """A batch that was found to be consistent, ready to be split.

    batch      what to split; later changes to it have no effect
    n_seq_max  sequence ids must be less than this; None: what the cache has, or 256 without one
    n_vocab    token ids must be less than this
    memory     a cache whose sequences the batch must continue, None: positions may begin anywhere

    Raises ParamsError with libllama's reason for a batch that is not consistent: positions of a sequence that decrease,
    have gaps or do not follow those in the cache, or a token of sequences that are at different positions in the cache.
    """

    def __init__(
        self,
        batch: Batch,
        n_seq_max: int | None = None,
        *,
        n_vocab: int = _TOKEN_MAX,
        memory: KVCache | None = None,
    ) -> None:
        limit = memory.n_seq_max if memory else _N_SEQ_MAX
        n_seq_max = check_int(limit if n_seq_max is None else n_seq_max, "n_seq_max", 1, limit)
        n_vocab = check_int(n_vocab, "n_vocab", 1, _TOKEN_MAX)
        if len(batch) == 0:
            raise ParamsError("The batch has no tokens.")
        c_batch, keep = batch.to_c()
        with error_lines() as errors:
            if memory:
                with memory.use() as (_, c_memory):
                    pointer = lib.llama_kv_mixed_sbatch_init(c_batch, n_seq_max, n_vocab, c_memory)
            else:
                pointer = lib.llama_kv_mixed_sbatch_init(c_batch, n_seq_max, n_vocab, ffi.NULL)
        del keep
        if pointer == ffi.NULL:
            raise ParamsError(f"The batch can not be used: {_reason(errors.reason())}.")
        self._handle = ExclusiveHandle(pointer, lib.llama_kv_mixed_sbatch_free, None, "sbatch", LlamamixError)
        self._n_reset = 0

    def __enter__(self) -> SBatch:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the sbatch. Closing twice is fine. Its ubatches can not go to a cache any more."""
        self._handle.close()

    def split_simple(self, n_ubatch: int) -> UBatch:
        """The next tokens in their order, up to ``n_ubatch``. Every split ends with ubatches of no tokens."""
        return self._split("simple", n_ubatch)

    def split_equal(self, n_ubatch: int) -> UBatch:
        """The next tokens of several sequences, as many of each, up to ``n_ubatch`` together (one more when there are
        more sequences than that): what a cache with a stream for each sequence takes.

        Raises ParamsError when sequences share tokens.
        """
        return self._split("equal", n_ubatch)

    def split_seq(self, n_ubatch: int) -> UBatch:
        """The next tokens of one set of sequences, up to ``n_ubatch``."""
        return self._split("seq", n_ubatch)

    def reset(self) -> None:
        """Begin the split anew. Ubatches that were split before can not go to a cache any more."""
        with self._handle as pointer:
            lib.llama_kv_mixed_sbatch_reset(pointer)
            self._n_reset += 1

    @contextlib.contextmanager
    def use(self, ubatch: UBatch) -> Iterator[Any]:
        """The C object, for a cache that takes one of the ubatches. Raises ParamsError when it can not be taken."""
        with self._handle as pointer:
            if ubatch.n_tokens == 0:
                raise ParamsError("The ubatch has no tokens.")
            if ubatch.n_reset != self._n_reset:
                raise ParamsError("The ubatch was split before a reset().")
            yield pointer

    def _split(self, split: str, n_ubatch: int) -> UBatch:
        check_int(n_ubatch, "n_ubatch", 1, _TOKEN_MAX)
        c_ubatch = ffi.new("struct llama_kv_mixed_ubatch *")
        c_ubatch.struct_size = ffi.sizeof(c_ubatch[0])
        with self._handle as pointer, error_lines() as errors:
            n = lib.llama_kv_mixed_sbatch_split(pointer, _SPLITS[split], n_ubatch, c_ubatch)
            if n < 0:
                raise ParamsError(f"The batch can not be split: {_reason(errors.reason())}.")
            return UBatch(
                n_tokens=n,
                n_seq_tokens=c_ubatch.n_seq_tokens,
                n_seqs=c_ubatch.n_seqs,
                token=_copy(c_ubatch.token, n, np.int32),
                pos=_copy(c_ubatch.pos, n, np.int32),
                seq_id=tuple(tuple(sorted(c_ubatch.seq_id[i][0 : c_ubatch.n_seq_id[i]])) for i in range(n)),
                output=_copy(c_ubatch.output, n, np.int8),
                source=self,
                n_reset=self._n_reset,
                index=c_ubatch.index,
            )


def _copy(pointer: Any, n: int, dtype: type[np.generic]) -> np.ndarray:
    if n == 0:
        return np.empty(0, dtype)
    return np.frombuffer(ffi.buffer(pointer, n * np.dtype(dtype).itemsize), dtype).copy()


def _reason(logged: str) -> str:
    """What libllama logged as one sentence, or the reason that its interface gives."""
    reason = logged or ffi.string(lib.llama_kv_mixed_last_error()).decode("utf-8", "replace")
    return " ".join(reason.split()).rstrip(".")
