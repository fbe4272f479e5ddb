"""The split of a batch into ubatches, as a KV cache that is driven by hand takes them.

    ubatch = SBatch(batch, n_seq_max=1).split_simple(4)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ._ffi import error_lines, ffi, last_error, lib, sized
from ._handle import ExclusiveHandle
from .batch import Batch
from .errors import LlamamixError, ParamsError
from .params import N_SEQ_MAX, check_int
from .sequences import Sequences

_TOKEN_MAX = 2**31 - 1

_SPLITS = {"simple": 0, "equal": 1, "seq": 2}


@dataclass(frozen=True, slots=True, eq=False)
class UBatch:
    """A part of a batch that goes through a model, or into a KV cache, at once. The arrays are copies.

    Attributes:
        n_tokens: Tokens.
        n_seq_tokens: Tokens of each of the ``n_seqs`` sets of sequences.
        n_seqs: Sets of sequences; after split_simple() every token counts as one.
        token: Token ids, int32 [n_tokens].
        pos: Positions, int32 [n_tokens].
        seq_id: The sequence ids of each token, ascending, n_tokens tuples.
        output: 1 where logits are wanted, int8 [n_tokens].
        source: What it is a part of.
        n_reset: How often that had been reset.
        index: Which of its ubatches it is.
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

    Args:
        batch: What to split; later changes to it have no effect.
        n_seq_max: Sequence ids must be less than this; None: what the cache has, or 256 without one.
        n_vocab: Token ids must be less than this.
        memory: The sequences that the batch must continue, a cache's or a context's; None: positions may begin
            anywhere.

    Raises:
        ParamsError: With libllama's reason for a batch that is not consistent: positions of a sequence that decrease,
            have gaps or do not follow those in the cache, or a token of sequences that are at different positions in
            the cache.
    """

    def __init__(
        self,
        batch: Batch,
        n_seq_max: int | None = None,
        *,
        n_vocab: int = _TOKEN_MAX,
        memory: Sequences | None = None,
    ) -> None:
        limit = memory.n_seq_max if memory else N_SEQ_MAX
        n_seq_max = check_int(limit if n_seq_max is None else n_seq_max, "n_seq_max", 1, limit)
        n_vocab = check_int(n_vocab, "n_vocab", 1, _TOKEN_MAX)
        if len(batch) == 0:
            raise ParamsError("The batch has no tokens.")
        c_batch, keep = batch.to_c()
        with error_lines() as errors:
            if memory:
                with memory.use_memory() as c_memory:
                    pointer = lib.llama_kv_mixed_sbatch_init(c_batch, n_seq_max, n_vocab, c_memory)
            else:
                pointer = lib.llama_kv_mixed_sbatch_init(c_batch, n_seq_max, n_vocab, ffi.NULL)
        del keep
        if pointer == ffi.NULL:
            raise ParamsError(f"The batch can not be used: {errors.reason() or last_error()}.")
        self._handle = ExclusiveHandle(pointer, lib.llama_kv_mixed_sbatch_free, None, "sbatch", LlamamixError)
        self._n_reset = 0
        self._n_tokens = len(batch)

    def __repr__(self) -> str:
        return f"<SBatch of {self._n_tokens} tokens{' (closed)' if self._handle.closed else ''}>"

    def __enter__(self) -> SBatch:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the sbatch. Closing twice is fine. Its ubatches can not go to a cache any more."""
        self._handle.close()

    def split_simple(self, n_ubatch: int) -> UBatch:
        """The next tokens in their order. Every split ends with ubatches of no tokens.

        Args:
            n_ubatch: The most tokens.

        Raises:
            ParamsError: For a batch that can not be split like this.
        """
        return self._split("simple", n_ubatch)

    def split_equal(self, n_ubatch: int) -> UBatch:
        """The next tokens of several sequences, as many of each: what a cache with a stream for each sequence takes.

        Args:
            n_ubatch: The most tokens, all together (one more where there are more sequences than that).

        Raises:
            ParamsError: When sequences share tokens.
        """
        return self._split("equal", n_ubatch)

    def split_seq(self, n_ubatch: int) -> UBatch:
        """The next tokens of one set of sequences.

        Args:
            n_ubatch: The most tokens.

        Raises:
            ParamsError: For a batch that can not be split like this.
        """
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
        c_ubatch = sized("struct llama_kv_mixed_ubatch *")
        with self._handle as pointer, error_lines() as errors:
            n = lib.llama_kv_mixed_sbatch_split(pointer, _SPLITS[split], n_ubatch, c_ubatch)
            if n < 0:
                raise ParamsError(f"The batch can not be split: {errors.reason() or last_error()}.")
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
