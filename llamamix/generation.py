"""A generation under way: tokens or text out of a context, one after the other, until it ends or is cancelled."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np

from .errors import ContextFullError, DecodeAborted
from .model import Model
from .sampling import Sampler
from .text import TextStream

FinishReason = Literal["end", "stop", "length", "cancelled"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that could have been next.

    Attributes:
        id: Its id.
        piece: The bytes that it adds to the text.
        text: The same as text; bytes that are no character become U+FFFD.
        logprob: Natural logarithm of the probability that the model gives it.
    """

    id: int
    piece: bytes
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """A token that was drawn and decoded: it is in the cache.

    Attributes:
        id: Its id.
        piece: The bytes that it adds to the text.
        text: The characters that it completes: one that several tokens make up is the last one's.
        logprob: Natural logarithm of the probability that the model gives it (the softmax of the logits), before any
            sampler changed that.
        top: The tokens that were most likely, best first.
    """

    id: int
    piece: bytes
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class GenerationState:
    """How far a generation is: shared by who computes it and who has it."""

    n_tokens: int = 0
    finish_reason: FinishReason | None = None
    cancelled: bool = False

    def is_cancelled(self) -> bool:
        """Whether somebody asked for its end."""
        return self.cancelled


class Generation(Iterator[_T], AsyncIterator[_T], Generic[_T]):
    """What Context.generate() and its like give: an iterator over pieces of text, or tokens.

    It works in ``for``, and in ``async for``, where each step is computed by another thread and the event loop goes on;
    when the task is cancelled, so is the generation. What it raises is said where it was made.
    """

    def __init__(self, run: Callable[[GenerationState], Iterator[_T]]) -> None:
        self._state = GenerationState()
        self._items = run(self._state)  # which does not know this object, and so ends with it

    def __iter__(self) -> Generation[_T]:
        return self

    def __next__(self) -> _T:
        return next(self._items)

    def __aiter__(self) -> Generation[_T]:
        return self

    async def __anext__(self) -> _T:
        import asyncio

        step = asyncio.get_running_loop().run_in_executor(None, self._next_or_none)
        try:
            item = await asyncio.shield(step)
        except asyncio.CancelledError:
            self.cancel()
            await asyncio.wait([step])  # else the context would be in use for some time
            step.exception()
            raise
        if item is None:
            raise StopAsyncIteration
        return item[0]

    def __repr__(self) -> str:
        return f"<Generation {self.n_tokens} tokens, {self.finish_reason or 'not ended'}>"

    @property
    def n_tokens(self) -> int:
        """Tokens that were drawn so far, but for one that ended the generation."""
        return self._state.n_tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None before that, and when an exception ended it.

        - "end": a token that ends generation was drawn
        - "stop": a stop text is complete
        - "length": ``max_tokens`` were drawn
        - "cancelled": cancel() was called
        """
        return self._state.finish_reason

    def cancel(self) -> None:
        """End it soon, from any thread: the iteration ends without an exception.

        A long prompt that is being computed on the CPU is given up; what of it was finished stays in the cache.
        """
        self._state.cancelled = True

    def close(self) -> None:
        """End it at once; not while another thread computes. The cache keeps what was decoded."""
        close = getattr(self._items, "close", None)
        if close is not None:
            close()

    async def aclose(self) -> None:
        """The same as close(), for ``async`` code."""
        self.close()

    def _next_or_none(self) -> tuple[_T] | None:
        try:
            return (next(self._items),)
        except StopIteration:
            return None


@dataclass(frozen=True, slots=True)
class Source:
    """Where tokens come from.

    Args:
        model: Whose they are.
        start: Puts the prompt into the cache, and gives its last token's logits, float32 [n_vocab].
        decode: Adds a token to the cache, and gives its logits.
        max_tokens: The most to draw.
        sampler: Draws them.
        owns: Whether the sampler is closed at the end.
    """

    model: Model
    start: Callable[[Callable[[], bool]], np.ndarray]
    decode: Callable[[int], np.ndarray]
    max_tokens: int
    sampler: Sampler
    owns: bool

    def draw(self, state: GenerationState) -> Generator[tuple[int, np.ndarray], None, None]:
        """Tokens, each with the logits that it was drawn from, when it was decoded.

        When the cache is full the last token comes all the same, then ContextFullError. Raises what ``start`` and
        ``decode`` raise.
        """
        try:
            logits = self._begin(state)
            for _ in range(self.max_tokens):
                if logits is None or state.is_cancelled():
                    state.finish_reason = "cancelled"
                    return
                token = self.sampler.sample(logits)
                if self.model.is_eog(token):
                    state.finish_reason = "end"
                    return
                state.n_tokens += 1
                full: ContextFullError | None = None
                before = logits
                try:
                    logits = self.decode(token)
                except ContextFullError as error:
                    full = error
                yield token, before
                if full is not None:
                    raise full
            state.finish_reason = "length"
        finally:
            if self.owns:
                self.sampler.close()

    def _begin(self, state: GenerationState) -> np.ndarray | None:
        """The logits behind the prompt, None: it was cancelled."""
        if state.is_cancelled():
            return None
        try:
            return self.start(state.is_cancelled)
        except DecodeAborted:
            if state.is_cancelled():
                return None
            raise

    def pieces(self, state: GenerationState, stream: TextStream) -> Iterator[str]:
        """Text, piece by piece, without stop texts and what follows."""
        drawn = self.draw(state)
        try:
            for token, _ in drawn:
                text = stream.feed(self.model.token_to_piece(token))
                if stream.stopped:
                    drawn.close()
                    state.finish_reason = "stop"
                if text:
                    yield text
        except ContextFullError:
            if text := stream.finish():
                yield text
            raise
        if text := stream.finish():
            yield text

    def tokens(self, state: GenerationState, stream: TextStream, top: int) -> Iterator[GeneratedToken]:
        """Tokens with their probabilities; the one that completes a stop text is the last."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token, logits in self.draw(state):
            piece = self.model.token_to_piece(token)
            logprobs = log_softmax(logits)
            best = [self._logprob(int(i), logprobs) for i in most_likely(logits, top)]
            stream.feed(piece)
            if stream.stopped:
                state.finish_reason = "stop"
            yield GeneratedToken(token, piece, decoder.decode(piece), float(logprobs[token]), tuple(best))
            if stream.stopped:
                return

    def _logprob(self, token: int, logprobs: np.ndarray) -> TokenLogprob:
        piece = self.model.token_to_piece(token)
        return TokenLogprob(token, piece, piece.decode("utf-8", "replace"), float(logprobs[token]))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities that logits [n] stand for, float64 [n]."""
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def most_likely(logits: np.ndarray, k: int) -> np.ndarray:
    """The k largest of logits [n], their indices [k], best first; the lower index first of those that are equal."""
    k = min(k, len(logits))
    if k == 0:
        return np.empty(0, np.intp)
    least = np.partition(logits, -k)[-k]
    found = np.flatnonzero(logits >= least)
    return np.asarray(found[np.argsort(-logits[found], kind="stable")][:k])
