"""A long real prompt and its continuation through the mixed KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .context import Context
from .errors import ContextError
from .model import Model
from .params import KVMixedParams, SamplingParams
from .stats import CacheStats, PerfData


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demo run did.

    n_prompt, n_generated  tokens
    stats                  the cache at the end
    perf                   times of prefill and decode
    """

    n_prompt: int
    n_generated: int
    stats: CacheStats
    perf: PerfData


def run(
    model_path: Path,
    text_path: Path,
    emit: Callable[[str], None],
    *,
    n_prompt: int = 3000,
    n_predict: int = 128,
    n_ctx: int = 8192,
    kv_mixed: KVMixedParams | None = None,
    n_threads: int | None = None,
) -> DemoResult:
    """Continue the first ``n_prompt`` tokens of a text, giving each new piece to ``emit``.

    Raises what Model, Context and Context.generate() raise.
    """
    with Model(model_path) as model:
        tokens = model.tokenize(text_path.read_text(encoding="utf-8"))[:n_prompt]
        with Context(model, n_ctx=n_ctx, n_threads=n_threads, kv_mixed=kv_mixed or KVMixedParams()) as context:
            for piece in context.generate(tokens, n_predict, SamplingParams(temperature=0, repeat_penalty=1.1)):
                emit(piece)
            stats = context.stats
            if stats is None:
                raise ContextError("The context has no mixed KV cache.")
            n_held = context.memory.seq_pos_max() + 1
            return DemoResult(len(tokens), n_held - len(tokens), stats, context.perf)
