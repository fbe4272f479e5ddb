"""Caches that are traced: the tiny model's, and one of its shape, and what their traces hold."""

from __future__ import annotations

from typing import Any

from llamamix import MixedKVCache
from llamamix.trace import Event, EventKind

N_LAYER, N_HEAD_KV, HEAD_SIZE = 2, 2, 64  # of the tiny model
ROW_F16 = 2 * N_HEAD_KV * HEAD_SIZE  # bytes of a K row in a layer
ROW_Q4_0 = N_HEAD_KV * HEAD_SIZE // 32 * 18

SPEC = "hot=10,cold=q4_0,group=4,sink=0"  # passes the threshold with the 9th cell, and moves 2 tokens

THRESHOLD_LINES = [
    "[MIXED_CACHE_DEBUG] should_quantize: hot cache threshold exceeded",
    "[MIXED_CACHE_DEBUG] trigger_quantization: starting quantization process",
    "[MIXED_CACHE_DEBUG] trigger_quantization: moving tokens to cold cache",
    "[MIXED_CACHE] Moving 2 tokens to cold cache (Q4_0 quantization)",
    "[MIXED_CACHE] Quantizing token 0: FP16 -> Q4_0",
    "[MIXED_CACHE] Quantizing token 1: FP16 -> Q4_0",
    "[MIXED_CACHE] Quantization batch completed: 2 tokens processed",
    "[MIXED_CACHE_DEBUG] trigger_quantization: quantization completed",
]


def migrations(events: list[Event]) -> list[Event]:
    return [event for event in events if event.kind is EventKind.MIGRATE]


def cache_of(n_seq_max: int = 1, **options: Any) -> MixedKVCache:
    shape = {"n_layer": N_LAYER, "n_head_kv": N_HEAD_KV, "head_size_k": HEAD_SIZE, "n_seq_max": n_seq_max}
    return MixedKVCache(**shape, **{"hot": 8, "cold": "q4_0", "cold_size": 8, "group": 2, "sink": 0} | options)
