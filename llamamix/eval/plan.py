"""What an evaluation computes: contexts, legs, and which positions count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..bench.plan import N_BATCH, N_UBATCH
from ..errors import ParamsError
from ..params import N_THREADS_MAX, check_int
from .texts import Chunk

PROMPT, DECODE = "prompt", "decode"
LEGS = (PROMPT, DECODE)
REFERENCES = ("f16", "f32")

_N_CTX_STEP = (
    256  # libllama rounds up to a multiple of this, and a cache larger than what is asked for would be counted
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What every cache computes.

    Args:
        n_ctx: Tokens of a context, multiples of 256.
        n_chunks: Contexts of every text: one number, or one for each of ``n_ctx``.
        legs: "prompt": all of a context in batches, scored in its second half, as llama-perplexity does it; "decode":
            the last tokens of a context one by one behind the others.
        n_decode: How many tokens are decoded one by one.
        stride: Of the positions of a prompt every so many-th is scored.
        n_batch: The most tokens that one call of llama_decode() gets.
        n_ubatch: The most tokens that one graph computes.
        n_threads: Threads; None: as many as this process may use.
        reference: Type of the plain cache that all others are compared with, "f16" or "f32".

    Raises:
        ParamsError: For a value that can not be used.
    """

    n_ctx: tuple[int, ...] = (2048,)
    n_chunks: tuple[int, ...] = (1,)
    legs: tuple[str, ...] = LEGS
    n_decode: int = 256
    stride: int = 1
    n_batch: int = N_BATCH
    n_ubatch: int = N_UBATCH
    n_threads: int | None = None
    reference: str = "f16"

    def __post_init__(self) -> None:
        for n_ctx in self.n_ctx:
            check_int(n_ctx, "n_ctx", _N_CTX_STEP, 2**30)
            if n_ctx % _N_CTX_STEP != 0:
                raise ParamsError(f"A context must be a multiple of {_N_CTX_STEP} tokens, not {n_ctx}.")
        for n in self.n_chunks:
            check_int(n, "chunks", 1, 10**6)
        if len(self.n_chunks) not in (1, len(self.n_ctx)):
            raise ParamsError(
                f"--chunks has {len(self.n_chunks)} numbers and -c has {len(self.n_ctx)}; give one, or one for each."
            )
        for leg in self.legs:
            if leg not in LEGS:
                raise ParamsError(f"A leg must be one of {', '.join(LEGS)}, not {leg!r}.")
        if not self.legs:
            raise ParamsError("There is no leg to compute.")
        check_int(self.n_decode, "n_decode", 2, 2**30)
        if DECODE in self.legs and self.n_decode > min(self.n_ctx) // 2:
            raise ParamsError(
                f"n_decode must be no more than half of a context ({min(self.n_ctx) // 2}), not {self.n_decode}."
            )
        check_int(self.stride, "stride", 1, 2**30)
        check_int(self.n_batch, "n_batch", 1, 2**31 - 1)
        check_int(self.n_ubatch, "n_ubatch", 1, 2**31 - 1)
        if self.n_threads is not None:
            check_int(self.n_threads, "n_threads", 1, N_THREADS_MAX)
        if self.reference not in REFERENCES:
            raise ParamsError(f"The reference must be one of {', '.join(REFERENCES)}, not {self.reference!r}.")

    def contexts(self) -> Iterator[tuple[int, int]]:
        """Each n_ctx with its number of chunks."""
        n_chunks = self.n_chunks * len(self.n_ctx) if len(self.n_chunks) == 1 else self.n_chunks
        yield from zip(self.n_ctx, n_chunks, strict=True)

    def settings(self, leg: str) -> dict[str, int]:
        """What decides, with the tokens and the cache, what a leg gives.

        Args:
            leg: "prompt" or "decode".
        """
        own = {"stride": self.stride} if leg == PROMPT else {"n_decode": self.n_decode}
        return {"n_batch": self.n_batch, **own}

    def positions(self, chunk: Chunk, leg: str) -> np.ndarray:
        """Which positions of a chunk are scored: the token behind each is what is predicted.

        Args:
            chunk: Tokens, and which of them are of interest.
            leg: "prompt" or "decode".

        Returns:
            int of shape [n], rising.
        """
        n_ctx = len(chunk.tokens)
        wanted = chunk.scored.copy()
        if leg == PROMPT:
            wanted[np.arange(n_ctx) % self.stride != 0] = False
            for lookup in chunk.lookups:  # which are found or not as a whole
                wanted[lookup.start - 1 : lookup.end - 1] = True
            wanted[: n_ctx // 2] = False
        else:
            wanted[: n_ctx - self.n_decode] = False
        return np.flatnonzero(wanted)
