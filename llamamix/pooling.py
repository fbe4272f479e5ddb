"""What libllama has to compute in one piece, and whether it would.

A ubatch is what it computes at once. What it pools is a ubatch's share of a sequence, and the last ubatch's result is
what stays; without a causal mask tokens see those of their own ubatch and of earlier ones. So where either matters, all
tokens that a sequence has in a batch must be in the same ubatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import ParamsError
from .model import Model
from .tokens import Tokens

UNSPECIFIED, NONE, MEAN, CLS, LAST, RANK = range(-1, 5)  # enum llama_pooling_type


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a context pools embeddings and divides batches.

    type        of enum llama_pooling_type; NONE when there are no embeddings
    causal      tokens do not see later ones
    has_memory  False: what there is to decode is encoded, in one ubatch
    n_stream    streams of the KV cache; with several a ubatch has as many tokens of each of its sequences
    by_sequence a ubatch has the tokens of one set of sequences (recurrent layers, when there are embeddings)
    """

    type: int
    causal: bool
    has_memory: bool
    n_stream: int
    by_sequence: bool

    @property
    def one_ubatch(self) -> bool:
        """True when a sequence's tokens must be in one ubatch; the last token's embedding is right in any case."""
        return not self.causal or not self.has_memory or self.type not in (NONE, LAST)

    def check(self, batch: Tokens, n_batch: int, n_ubatch: int) -> None:
        """Raise ParamsError for a batch whose results would not be those of its sequences."""
        n = len(batch)
        what = "for their embeddings to be pooled" if self.type != NONE else "as they see each other"
        if self.type != NONE and n > n_batch:
            raise ParamsError(f"{n} tokens must be one batch {what}, and n_batch is {n_batch}: {_more(n)}.")
        if not self.one_ubatch:
            return
        if n > n_ubatch:
            raise ParamsError(f"{n} tokens must be one ubatch {what}, and n_ubatch is {n_ubatch}: {_more(n)}.")
        if not self.has_memory:
            return
        if self.by_sequence:
            _check_sets(batch, what)
        elif self.n_stream > 1:
            lengths = np.unique(batch.seq_ids, return_counts=True)[1]
            if lengths.min() != lengths.max():
                raise ParamsError(
                    f"Sequences of {lengths.min()} to {lengths.max()} tokens can not be one ubatch {what}, where each"
                    " has a stream of its own: make the context with kv_unified=True, or decode one at a time."
                )


def pooling_of(model: Model, type: int, *, causal: bool, has_memory: bool, n_stream: int) -> Pooling:
    """How a context of a model pools; ``type`` is NONE when it keeps no embeddings."""
    if type == RANK and causal and not pools_mean(model, type):
        type = LAST  # the score is the last token's
    by_sequence = type != NONE and (model.is_recurrent or model.is_hybrid)
    return Pooling(type, causal, has_memory, n_stream, by_sequence)


def pools_mean(model: Model, type: int) -> bool:
    """Whether a context of a model, that is asked for a type of pooling, computes means over sequences."""
    arch = model.metadata.get("general.architecture", "")
    if type == UNSPECIFIED:
        type = int(model.metadata.get(f"{arch}.pooling_type", NONE))
    classifier = model.metadata.get(f"{arch}.classifier.pooling_type", str(MEAN if arch == "modern-bert" else CLS))
    return type == MEAN or (type == RANK and classifier == str(MEAN))


def _check_sets(batch: Tokens, what: str) -> None:
    """Of sequences that share tokens, only one has the others in the same ubatch."""
    ends = np.cumsum(batch.n_seq)
    sets = {tuple(batch.seq_ids[end - n : end].tolist()) for end, n in zip(ends, batch.n_seq, strict=True)}
    if sum(map(len, sets)) > len(set(batch.seq_ids.tolist())):
        raise ParamsError(
            f"Sequences that share a part of their tokens can not be one ubatch each {what}: decode one at a time."
        )


def _more(n: int) -> str:
    return f"make the context with n_batch and n_ubatch of {n} or more, or decode less at a time"
