"""Speculative decoding: several tokens are guessed, and one decode tells how many of them are right.

What was wrong is removed from the mixed cache again. The text is that of decoding token by token; where guesses are
good it takes fewer steps, each hardly slower than that of one token.

Guesses come from a smaller model with the same vocabulary, or from the text itself: what followed when the last tokens
were there before (prompt lookup), which is good at repetitions such as code or quotations.

    python examples/speculative.py model.gguf -p "1 2 3 4 1 2 3 4 1 2"
    python examples/speculative.py model.gguf --draft smaller.gguf -p "Once upon a time"
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

from llamamix import Context, Model, Sampler, SamplingParams

Draft = Callable[[list[int], int], list[int]]  # guesses up to n tokens that follow on others


def lookup(tokens: list[int], n: int, n_match: int = 3) -> list[int]:
    """What followed the last time that the last ``n_match`` tokens were there; nothing when they never were."""
    last = tokens[-n_match:]
    for start in range(len(tokens) - n_match - 1, -1, -1):
        if tokens[start : start + n_match] == last:
            return tokens[start + n_match : start + n_match + n]
    return []


class DraftModel:
    """A smaller model that guesses greedily, in a cache of its own."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._held: list[int] = []

    def __call__(self, tokens: list[int], n: int) -> list[int]:
        pairs = zip(self._held, tokens, strict=False)
        n_common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._held), len(tokens)))
        n_common = min(n_common, len(tokens) - 1)  # its logits are wanted
        self._context.memory.seq_rm(0, n_common)
        self._context.decode(tokens[n_common:])
        guesses = [int(self._context.logits[-1].argmax())]
        while len(guesses) < n:
            self._context.decode(guesses[-1:])
            guesses.append(int(self._context.logits[-1].argmax()))
        self._held = tokens + guesses[:-1]
        return guesses


class Speculation:
    """A generation by guesses.

    n_steps     decodes of the model
    n_guessed   tokens that were guessed
    n_accepted  guesses that were right
    """

    def __init__(self, context: Context, draft: Draft, n_draft: int = 8) -> None:
        self._context, self._draft, self._n_draft = context, draft, n_draft
        self.n_steps = self.n_guessed = self.n_accepted = 0

    def run(self, prompt: Sequence[int], max_tokens: int, sampler: Sampler) -> Iterator[int]:
        """The tokens that follow on a prompt, in an empty sequence."""
        context, model = self._context, self._context.model
        tokens = list(prompt)
        if len(tokens) > 1:
            context.decode(tokens[:-1])
        n_end = len(tokens) + max_tokens
        while len(tokens) < n_end:
            # the last token is not in the cache yet: it comes with the guesses
            guesses = self._draft(tokens, min(self._n_draft, n_end - len(tokens) - 1))
            context.decode([tokens[-1], *guesses], logits="all")
            self.n_steps += 1
            self.n_guessed += len(guesses)
            n_held = len(tokens)
            for i, row in enumerate(context.logits):
                token = sampler.sample(row)
                if model.is_eog(token):
                    return
                tokens.append(token)
                yield token
                if i == len(guesses) or token != guesses[i]:
                    break
                self.n_accepted += 1
                n_held += 1
            context.memory.seq_rm(0, n_held)  # guesses that were wrong


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--draft", help="a smaller model that guesses (default: look in the text)")
    parser.add_argument("-p", "--prompt", required=True)
    parser.add_argument("-n", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("-c", type=int, default=4096, help="cells (default: 4096)")
    given = parser.parse_args(args)

    with Model(given.model) as model, Context(model, n_ctx=given.c) as context:
        draft: Draft = lookup
        if given.draft:
            small = Model(given.draft)
            if small.n_vocab != model.n_vocab:
                parser.error("the two models have different vocabularies")
            draft = DraftModel(Context(small, n_ctx=given.c))
        speculation = Speculation(context, draft)
        with Sampler(model, SamplingParams(temperature=0)) as sampler:
            tokens = speculation.run(model.tokenize(given.prompt), given.n, sampler)
            text = b"".join(map(model.token_to_piece, tokens)).decode("utf-8", "replace")
        print(f"{given.prompt}{text}\n")
        print(f"{speculation.n_accepted} of {speculation.n_guessed} guesses were right, {speculation.n_steps} steps")
        print(context.stats)


if __name__ == "__main__":
    main()
