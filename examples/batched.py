"""Several prompts that begin alike, answered at the same time.

What they have in common is computed once, and its cells are shared; then every step of all answers is one batch.

    python examples/batched.py model.gguf --prefix "Once upon a time" " there was a king" " a dog" " nobody"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from llamamix import Context, Model, Sampler, SamplingParams


def answer(
    context: Context, prefix: str, prompts: Sequence[str], max_tokens: int, sampling: SamplingParams
) -> list[str]:
    """The texts that follow on ``prefix`` and each of the prompts; the context has a sequence for every prompt."""
    model = context.model
    everyone = range(len(prompts))

    # the prefix once, in sequence 0, and then in all of them: no row is copied
    context.decode(model.tokenize(prefix))
    for seq_id in everyone[1:]:
        context.memory.seq_cp(0, seq_id)

    # all prompts in one batch; it keeps the logits of the last token of each sequence
    tokens: list[int] = []
    seq_ids: list[int] = []
    for seq_id, prompt in enumerate(prompts):
        own = model.tokenize(prompt, add_special=False)
        tokens += own
        seq_ids += [seq_id] * len(own)
    context.decode_batch(tokens, seq_ids)

    samplers = [Sampler(model, sampling) for _ in everyone]
    pieces: list[list[bytes]] = [[] for _ in everyone]
    going = list(everyone)
    for _ in range(max_tokens):
        # a row of logits for each sequence that goes on, in the order of the batch
        drawn = {seq_id: samplers[seq_id].sample(row) for seq_id, row in zip(going, context.logits, strict=True)}
        going = [seq_id for seq_id in going if not model.is_eog(drawn[seq_id])]
        for seq_id in going:
            pieces[seq_id].append(model.token_to_piece(drawn[seq_id]))
        if not going:
            break
        context.decode_batch([drawn[seq_id] for seq_id in going], going)
    for sampler in samplers:
        sampler.close()
    return [b"".join(each).decode("utf-8", "replace") for each in pieces]


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--prefix", required=True, help="what all prompts begin with")
    parser.add_argument("-n", type=int, default=32, help="tokens for each (default: 32)")
    parser.add_argument("-c", type=int, default=4096, help="cells for all of them (default: 4096)")
    given = parser.parse_args(args)

    # unified: the sequences share one cache, and the cells of the prefix in it
    options: dict[str, Any] = {"n_ctx": given.c, "n_seq_max": len(given.prompts), "kv_unified": True}
    with Model(given.model) as model, Context(model, **options) as context:
        texts = answer(context, given.prefix, given.prompts, given.n, SamplingParams(temperature=0))
        for prompt, text in zip(given.prompts, texts, strict=True):
            print(f"{given.prefix}{prompt} ->{text}\n")
        print(context.stats)


if __name__ == "__main__":
    main()
