"""What is done with a context whose cache is to be compared with another one."""

from __future__ import annotations

import numpy as np

from llamamix import Context

from .tiny_model import random_tokens


def decode(context: Context, n_prompt: int = 200, n_tokens: int = 240) -> np.ndarray:
    """Logits of a prompt and then of single tokens."""
    tokens = random_tokens(n_tokens)
    context.decode(tokens[:n_prompt], logits="all")
    rows = [context.logits]
    for token in tokens[n_prompt:]:
        context.decode([token])
        rows.append(context.logits)
    return np.concatenate(rows)


def operate(context: Context, unified: bool) -> np.ndarray:
    """Everything that can be done to sequences, and the logits of what is decoded after each."""
    memory, rows = context.memory, []

    def more(seq_id: int, n: int, seed: int) -> None:
        context.decode(random_tokens(n, seed), seq_id=seq_id, logits="all")
        rows.append(context.logits)

    more(0, 90, 0)
    more(1, 50, 1)
    if unified:
        memory.seq_cp(0, 2, 0, 70)  # shared cells
    else:
        memory.seq_cp(0, 2)  # a stream's rows, copied within the device
    more(2, 20, 2)
    memory.seq_rm(0, 60, -1)
    more(0, 30, 3)
    memory.seq_rm(1, 10, 30)  # hot and cold
    memory.seq_add(1, 30, -1, -20)
    more(1, 40, 4)
    memory.seq_div(1, 20, 60, 2)
    memory.seq_rm(1, 20, -1)
    more(1, 40, 5)
    if unified:
        memory.seq_keep(1)
        more(1, 40, 6)
    return np.concatenate(rows)
