"""Caches without a model, driven by hand: tokens go in, and what is there comes out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llamamix import Batch, MixedKVCache, SBatch
from llamamix.cache import KVCache

SHAPE = {"n_layer": 2, "n_head_kv": 2, "head_size_k": 32}


def find(cache: KVCache, tokens: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Look for places for (position, sequence) pairs."""
    batch = Batch()
    for pos, seq in tokens:
        batch.add(1, pos, seq)
    with SBatch(batch, memory=cache) as sbatch:
        return cache.find_slot(sbatch.split_equal(len(tokens)))


def add(cache: KVCache, n: int, seq: int = 0) -> None:
    """Add n tokens one by one, and rows that tell which sequence and position they are of."""
    tier = cache.hot if isinstance(cache, MixedKVCache) else cache.tier
    for _ in range(n):
        pos = cache.seq_pos_max(seq) + 1
        (cell,) = find(cache, [(pos, seq)])
        cache.commit()
        stream = seq if cache.n_stream > 1 else 0
        for layer in range(tier.n_layer):
            for set_rows, head in ((tier.set_k, tier.head_size_k), (tier.set_v, tier.head_size_v)):
                set_rows(layer, cell, np.full((1, tier.n_head_kv, head), 16 * seq + pos), stream)


def positions(cache: MixedKVCache, seq: int = 0) -> tuple[list[int], list[int]]:
    """Hot and cold."""
    stream = seq if cache.n_stream > 1 else 0
    hot, cold = (sorted(c.pos for c in t.cells(stream) if seq in c.seq_ids) for t in (cache.hot, cache.cold))
    return hot, cold


def snapshot(cache: MixedKVCache) -> tuple:
    """All there is to see."""
    cells = [tier.cells(s) for tier in (cache.hot, cache.cold) for s in range(cache.n_stream)]
    return cells, cache.state_save(), cache.params
