"""Text out of a context, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .errors import ContextFullError
from .model import Model
from .sampling import Sampler
from .text import TextStream


def generate(
    model: Model,
    decode: Callable[[np.ndarray], np.ndarray],
    prompt: np.ndarray,
    max_tokens: int,
    sampler: Sampler,
    stream: TextStream,
) -> Iterator[str]:
    """Go on after a prompt, and yield the text piece by piece.

    decode   adds tokens, int32 [n], to the sequence, and gives the last one's logits, float32 [n_vocab]
    prompt   token ids, int32 [n]
    sampler  draws the tokens, and is closed at the end
    stream   makes text of them

    What was drawn is decoded before its text is yielded. Raises what ``decode`` raises, ContextFullError after all
    text.
    """
    try:
        logits = decode(prompt)
        for _ in range(max_tokens):
            token = sampler.sample(logits)
            if model.is_eog(token):
                break
            text = stream.feed(model.token_to_piece(token))
            try:
                logits = decode(np.array([token], np.int32))
            except ContextFullError:
                text += stream.finish()
                if text:
                    yield text
                raise
            if text:
                yield text
            if stream.stopped:
                break
        if text := stream.finish():
            yield text
    finally:
        sampler.close()
