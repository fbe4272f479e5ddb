"""Texts that can only be foretold by who remembers: a passage that comes again, and values to look up by their keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import ParamsError
from ..model import Model
from .texts import Chunk, Lookup, Text, check_length

_N_LOOKUPS = 16
_N_CTX_LOOKUP = 128  # tokens of context for each of them, where that makes fewer

# A line "The word of Oliver: pencil." is one that a small model can look up again: the value follows its key at once,
# and no two lines have the same. Names and words are one token or two in most vocabularies.
_LINE = "\nThe word of {key}:"
_KEYS = (
    "Oliver", "Amelia", "Harry", "Emily", "George", "Sophia", "Noah", "Grace", "Jack", "Alice", "Jacob", "Florence",
    "Leo", "Daisy", "Oscar", "Charlotte", "Charlie", "Evelyn", "William", "Jessica", "Henry", "Rosie", "Thomas", "Lily",
)  # fmt: skip
_VALUES = (
    "pencil", "garden", "silver", "window", "rocket", "bottle", "castle", "butter", "dragon", "forest", "hammer",
    "island", "mirror", "orange", "planet", "rabbit", "market", "winter", "doctor", "engine", "coffee", "camera",
    "dinner", "flower", "jacket", "kitten", "bridge", "desert", "guitar",
)  # fmt: skip


class Recall:
    """A text of which a quarter comes again.

    A chunk of n tokens is, in the order of its tokens:

    n/8   text
    n/4   a passage
          text, as much as it takes
    n/4   the passage again, to the token
          lines with a key and a value, one for each 128 tokens of the chunk and 16 at most; they are spread over what
          is no passage, and come again in another order

    The passage is scored where it comes again, 5/8 of n less the lines behind its first time, and so are the values. A
    lookup counts as found where every token of the value is the most likely one behind what is before it: so it is what
    greedy decoding goes on with behind the key.
    """

    def __init__(self, base: Text) -> None:
        self.name: str = "recall"
        self.source: str = f"made of {base.source}"
        self.sha256: str = base.sha256
        self._base = base

    def chunks(self, model: Model, n_ctx: int, n: int) -> list[Chunk]:
        begin = model.tokenize("")
        tokens = model.tokenize(self._base.text, add_special=False)
        n_used = n_ctx - n_ctx // 4  # of the text, at most
        check_length(f"The text for {self.name}", len(tokens), n_ctx, n, n * n_used)
        return [_chunk(model, begin, tokens[i * n_used : (i + 1) * n_used], n_ctx, i) for i in range(n)]


def _chunk(model: Model, begin: list[int], text: list[int], n_ctx: int, number: int) -> Chunk:
    lines, spans = _lines(model, min(_N_LOOKUPS, n_ctx // _N_CTX_LOOKUP), number)
    n_passage = n_ctx // 4
    n_before = n_ctx // 8
    n_lines = sum(map(len, lines))
    n_between = n_ctx - len(begin) - n_before - 2 * n_passage - n_lines
    # lines among the text before the passage and behind it, in proportion
    n_first = round(len(lines) * n_before / (n_before + n_between))
    fill_before = n_before - sum(map(len, lines[:n_first]))
    fill_between = n_between - sum(map(len, lines[n_first:]))
    if min(fill_before, fill_between) < 0:
        raise ParamsError(f"recall needs a longer context than {n_ctx} tokens: its lines have {n_lines}.")

    tokens = list(begin)
    places: list[int] = []  # of the lines
    _add(tokens, places, text[:fill_before], lines[:n_first])
    passage = text[fill_before : fill_before + n_passage]
    tokens += passage
    rest = text[fill_before + n_passage : fill_before + n_passage + fill_between]
    _add(tokens, places, rest, lines[n_first:])
    n_again = len(tokens)
    tokens += passage

    scored = np.zeros(n_ctx, np.bool_)
    scored[n_again : n_again + n_passage - 1] = True
    lookups = []
    for i in _order(len(lines)):
        start, end = (len(tokens) + offset for offset in spans[i])
        lookups.append(Lookup(start, end, len(tokens) - places[i]))
        scored[start - 1 : end - 1] = True
        tokens += lines[i]
    return Chunk(np.array(tokens, np.int32), scored, tuple(lookups))


def _add(tokens: list[int], places: list[int], text: Sequence[int], lines: Sequence[Sequence[int]]) -> None:
    """Text with the lines spread over it; a part of the text is before each."""
    ends = [len(text) * (i + 1) // (len(lines) + 1) for i in range(len(lines))]
    for start, end, line in zip([0, *ends], ends, lines, strict=False):
        tokens += text[start:end]
        places.append(len(tokens))
        tokens += line
    tokens += text[ends[-1] if ends else 0 :]


def _order(n: int) -> list[int]:
    """0 to n - 1, not in that order: seven steps on, round and round."""
    order: list[int] = []
    i = n // 2
    while len(order) < n:
        while i % n in order:
            i += 1
        order.append(i % n)
        i += 7
    return order


def _lines(model: Model, n: int, number: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Token ids of n lines, and in each from where to where the value goes; another chunk has other pairs."""

    def tokenize(text: str) -> list[int]:
        return model.tokenize(text, add_special=False)

    lines, spans = [], []
    for i in range(n):
        head = _LINE.format(key=_KEYS[(i + 5 * number) % len(_KEYS)])
        value = f"{head} {_VALUES[(i + 7 * number) % len(_VALUES)]}"
        line = tokenize(f"{value}.\n")
        lines.append(line)
        spans.append((_n_common(tokenize, head, line), _n_common(tokenize, value, line)))
    return lines, spans


def _n_common(tokenize: Callable[[str], list[int]], text: str, line: list[int]) -> int:
    """How many tokens at the beginning of a line are those of a text that it begins with."""
    n = 0
    for a, b in zip(tokenize(text), line, strict=False):
        if a != b:
            break
        n += 1
    return n
