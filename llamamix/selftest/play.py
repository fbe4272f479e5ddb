"""What the scenarios share: checks, lines of the log, and tokens whose rows tell where they belong."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import Batch, MixedKVCache, SBatch, UnifiedKVCache
from .._ffi import lib, log

_TRACE_LOG = 1  # LLAMA_KV_MIXED_TRACE_LOG
N_LAYER, N_HEAD_KV, HEAD = 2, 2, 64


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    what: str
    expected: str
    found: str

    @property
    def ok(self) -> bool:
        return self.expected == self.found


@dataclass(slots=True)
class Play:
    """A scenario that runs: what it has checked, and what was logged."""

    lines: list[str]
    checks: list[Check] = field(default_factory=list)
    n_read: int = 0

    def check(self, what: str, expected: Any, found: Any) -> None:
        self.checks.append(Check(what, str(expected), str(found)))

    def read_log(self) -> list[str]:
        """The lines since it was last called."""
        lines = self.lines[self.n_read :]
        self.n_read = len(self.lines)
        return lines

    def check_log(self, what: str, expected: Sequence[str]) -> None:
        """That these lines were logged, and no others, since the log was last read."""
        found = self.read_log()
        right = f"the {len(expected)} lines that are documented"
        self.check(what, right, right if found == list(expected) else found)

    def check_refused(self, what: str, reason: str, error: type[Exception], action: Callable[[], Any]) -> None:
        """That an action raises an error, and that its message has these words."""
        try:
            action()
        except error as e:
            self.check(what, f"refused: {reason}", f"refused: {reason if reason in str(e) else e}")
        else:
            self.check(what, f"refused: {reason}", "taken")


@contextlib.contextmanager
def log_lines() -> Iterator[list[str]]:
    """Collect the lines about mixed caches."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = record.getMessage()
            if line.startswith(("[MIXED_CACHE", "llama_kv_cache_mixed: ")):
                lines.append(line)

    collector = Collector()
    level = log.level
    log.addHandler(collector)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.setLevel(level)
        log.removeHandler(collector)


EXCEEDED = "[MIXED_CACHE_DEBUG] should_quantize: hot cache threshold exceeded"


def migration_lines(n: int) -> list[str]:
    """What is logged when n tokens move."""
    return [
        "[MIXED_CACHE_DEBUG] trigger_quantization: starting quantization process",
        "[MIXED_CACHE_DEBUG] trigger_quantization: moving tokens to cold cache",
        f"[MIXED_CACHE] Moving {n} tokens to cold cache (Q4_0 quantization)",
        *(f"[MIXED_CACHE] Quantizing token {i}: FP16 -> Q4_0" for i in range(n)),
        f"[MIXED_CACHE] Quantization batch completed: {n} tokens processed",
        "[MIXED_CACHE_DEBUG] trigger_quantization: quantization completed",
    ]


def log_events(cache: MixedKVCache, on: bool) -> None:
    """Let a cache log what it does; begins with a line about what it holds."""
    with cache.use() as (_, memory):
        lib.llama_kv_mixed_trace_start(memory, int(on), _TRACE_LOG)


#
# tokens
#


def make_cache(hot: int, cold: int, group: int, n_pad: int, n_seq_max: int = 1, **options: Any) -> MixedKVCache:
    shape: dict[str, Any] = {"n_layer": N_LAYER, "n_head_kv": N_HEAD_KV, "head_size_k": HEAD}
    shape |= {"sink": 0, "cold": "q4_0", "mean": False}
    return MixedKVCache(hot=hot, cold_size=cold, group=group, n_pad=n_pad, n_seq_max=n_seq_max, **(shape | options))


def find(cache: MixedKVCache | UnifiedKVCache, pos: Sequence[int], seq: int = 0) -> tuple[int, ...]:
    """Cells for new tokens; none when they do not fit."""
    batch = Batch()
    for p in pos:
        batch.add(1000 + p, p, seq)
    with SBatch(batch, memory=cache) as sbatch:
        return cache.find_slot(sbatch.split_simple(len(pos)))


def row(pos: int, layer: int, v: bool, head_size: int = HEAD) -> np.ndarray:
    """K or V of a token that tells where it belongs, float16 [n_head_kv, head_size]."""
    x = np.sin(0.1 * np.arange(N_HEAD_KV * head_size) + pos) * (1 + pos) + 10 * layer + 100 * v
    return np.asarray(x.reshape(N_HEAD_KV, head_size), np.float16)


def q4_0(rows: np.ndarray) -> np.ndarray:
    """Their bytes as the gguf package has them."""
    import gguf

    return gguf.quants.quantize(rows.astype(np.float32), gguf.GGMLQuantizationType.Q4_0)


def add(cache: MixedKVCache, n: int, seq: int = 0) -> int:
    """Add n tokens one by one, with their rows. Returns how many of them there was room for."""
    for i in range(n):
        pos = cache.seq_pos_max(seq) + 1
        cells = find(cache, [pos], seq)
        if not cells:
            return i
        cache.commit()
        for layer in range(N_LAYER):
            cache.hot.set_k(layer, cells[0], row(pos, layer, False))
            cache.hot.set_v(layer, cells[0], row(pos, layer, True))
    return n


def tokens(cache: MixedKVCache, seq: int = 0) -> str:
    """Where the positions of a sequence are."""
    hot, cold = (sorted(c.pos for c in tier.cells() if seq in c.seq_ids) for tier in (cache.hot, cache.cold))
    return where(hot, cold)


def where(hot: Sequence[int], cold: Sequence[int]) -> str:
    return f"hot {_ranges(hot)}, cold {_ranges(cold)}"


def _ranges(numbers: Sequence[int]) -> str:
    """Such as "0-3 7"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return " ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in parts) or "none"


def right_rows(cache: MixedKVCache, original: Callable[[int], int] = lambda pos: pos) -> str:
    """How many rows are what was written for the position that their token had then: F16 in hot, its Q4_0 in cold."""
    good = total = 0
    for layer in range(N_LAYER):
        for v in (False, True):
            for tier, stored in ((cache.hot, lambda x: x), (cache.cold, q4_0)):
                data = (tier.get_v(layer) if v else tier.get_k(layer)).data
                for cell in tier.cells():
                    good += np.array_equal(data[0, cell.index], stored(row(original(cell.pos), layer, v)))
                    total += 1
    return f"{good} of {total}"
