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
    start: Callable[[], np.ndarray],
    decode: Callable[[int], np.ndarray],
    max_tokens: int,
    sampler: Sampler,
    stream: TextStream,
) -> Iterator[str]:
    """Go on after a prompt, and yield the text piece by piece.

    start    puts the prompt into the sequence, and gives its last token's logits, float32 [n_vocab]
    decode   adds a token to the sequence, and gives its logits
    sampler  draws the tokens, and is closed at the end
    stream   makes text of them

    What was drawn is decoded before its text is yielded. Raises what ``start`` and ``decode`` raise, ContextFullError
    after all text.
    """
    try:
        logits = start()
        for _ in range(max_tokens):
            token = sampler.sample(logits)
            if model.is_eog(token):
                break
            text = stream.feed(model.token_to_piece(token))
            try:
                logits = decode(token)
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
