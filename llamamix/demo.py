"""A long real prompt and its continuation, through the mixed KV cache and through a plain one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .context import Context
from .held import common_prefix
from .params import SamplingParams
from .stats import CacheStats, PerfData


@dataclass(frozen=True, slots=True)
class DemoRun:
    """What one cache did.

    n_prompt  tokens of the prompt
    tokens    what was generated, token ids
    perf      times of prefill and decode
    stats     the cache at the end, None: it is a plain one
    """

    n_prompt: int
    tokens: tuple[int, ...]
    perf: PerfData
    stats: CacheStats | None

    def n_same(self, other: DemoRun) -> int:
        """How many tokens the two begin with that are the same."""
        return common_prefix(np.array(self.tokens), np.array(other.tokens))


def run(context: Context, prompt: Sequence[int], n_predict: int, emit: Callable[[str], None]) -> DemoRun:
    """Continue a prompt with what is most likely, giving each new piece of text to ``emit``.

    Raises what Context.generate() raises.
    """
    for piece in context.generate(list(prompt), n_predict, SamplingParams(temperature=0, repeat_penalty=1.1)):
        emit(piece)
    held = context.memory.held.tokens(0)
    new = () if held is None else tuple(int(token) for token in held[len(prompt) :])
    return DemoRun(len(prompt), new, context.perf, context.stats)
