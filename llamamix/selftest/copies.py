"""Scenarios of copies: tensors of a plain cache, what is stored in them, and ggml's way from type to type."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import Batch, CacheError, ParamsError, SBatch, UnifiedKVCache, ggml
from .play import HEAD, N_HEAD_KV, N_LAYER, Play, find, q4_0, row


def basic_access(play: Play) -> None:
    shape: dict[str, Any] = {"n_layer": 3, "n_head_kv": 2, "head_size_k": 8, "head_size_v": 16, "n_pad": 4}
    with UnifiedKVCache(64, **shape) as cache:
        tier = cache.tier
        play.check("cells", "64 of f16/f16", f"{tier.size} of {tier.type_k}/{tier.type_v}")
        for n in (0, 64):
            if n:
                find(cache, range(n))
                cache.commit()
            for layer in range(3):
                for name, head, tensor in (("K", 8, tier.get_k(layer)), ("V", 16, tier.get_v(layer))):
                    found = f"{tensor.type} {list(tensor.ne)}, numpy {tensor.data.dtype} {list(tensor.data.shape)}"
                    expected = f"f16 {[head, 2, n, 1]}, numpy float16 {[1, n, 2, head]}"
                    play.check(f"{name} of layer {layer} with {n} tokens", expected, found)
        play.check_refused("layer 3 of 3", "no such layer", ParamsError, lambda: tier.get_k(3))


def data_storage_and_retrieval(play: Play) -> None:
    with UnifiedKVCache(64, n_layer=N_LAYER, n_head_kv=2, head_size_k=8, n_pad=4) as cache:
        batch = Batch()
        for pos, token in enumerate((101, 1, 102)):
            batch.add(token, pos, 0)
        play.check("tokens of the batch", 3, batch.n_tokens)
        with SBatch(batch, memory=cache) as sbatch:
            ubatch = sbatch.split_simple(4)
            play.check("tokens of the ubatch", [101, 1, 102], ubatch.token.tolist())
            play.check("their positions", [0, 1, 2], ubatch.pos.tolist())
            play.check("find_slot", (0, 1, 2), cache.find_slot(ubatch))
        play.check("before commit: cells used, end", (0, -1), (cache.tier.used, cache.seq_pos_max()))
        cache.commit()
        play.check("after commit: cells used, end", (3, 2), (cache.tier.used, cache.seq_pos_max()))
        play.check("cells in view, a multiple of 4", 4, cache.tier.n())
        cells = [(c.index, c.pos, c.seq_ids) for c in cache.tier.cells()]
        play.check("cell, position, sequences", [(0, 0, (0,)), (1, 1, (0,)), (2, 2, (0,))], cells)
        for layer in range(N_LAYER):
            play.check(f"K of layer {layer}", [8, 2, 4, 1], list(cache.tier.get_k(layer).ne))
            play.check(f"V of layer {layer}", [8, 2, 4, 1], list(cache.tier.get_v(layer).ne))


def _within_a_level(values: np.ndarray, stored: np.ndarray) -> bool:
    """Whether what was stored as Q4_0 differs, and by no more than it may, in blocks of 32 of the last dimension.

    A block has 16 levels, from -8 to 7 times an eighth of its largest number: at most one level is lost, where 8 is
    wanted, and the level itself is rounded to F16, which up to eight of them add up.
    """
    blocks = values.astype(np.float64).reshape(-1, 32)
    level = np.abs(blocks).max(axis=1, keepdims=True) / 8
    error = np.abs(stored.astype(np.float64).reshape(-1, 32) - blocks)
    return bool((error <= level * (1 + 8 * 2.0**-11)).all() and error.max() > 0)


def simple_ggml_cpy(play: Play) -> None:
    x = np.sin(0.05 * np.arange(128)).astype(np.float16)
    f16 = ggml.quantize(x, "f16")
    q = ggml.cpy(f16, "q4_0")
    saved = f"{f16.nbytes} -> {q.nbytes} (-{1 - q.nbytes / f16.nbytes:.0%})"
    play.check("bytes of F16 -> Q4_0", "256 -> 72 (-72%)", saved)
    play.check("the bytes are those of the gguf package", True, np.array_equal(q.data, q4_0(x)))
    play.check("the error is within a level of Q4_0", True, _within_a_level(x, ggml.cpy(q, "f32").data))


def copy_between_caches(play: Play) -> None:
    shape: dict[str, Any] = {"n_layer": N_LAYER, "n_head_kv": N_HEAD_KV, "head_size_k": HEAD, "n_pad": 4}
    n = 8
    tensors = [(layer, v) for layer in range(N_LAYER) for v in (False, True)]
    written = {(layer, v): np.stack([row(pos, layer, v) for pos in range(n)]) for layer, v in tensors}
    with UnifiedKVCache(64, **shape) as source, UnifiedKVCache(64, type_k="q4_0", type_v="q4_0", **shape) as target:
        for cache in (source, target):
            play.check("cells", tuple(range(n)), find(cache, range(n)))
            cache.commit()
        for (layer, v), rows in written.items():
            set_rows, get_rows = (source.tier.set_v, source.tier.get_v) if v else (source.tier.set_k, source.tier.get_k)
            set_rows(layer, 0, rows)
            q = ggml.cpy(get_rows(layer), "q4_0")
            (target.tier.set_v if v else target.tier.set_k)(layer, 0, ggml.Tensor("q4_0", q.ne[:3], q.data[0]))
        kept = arrived = within = 0
        for (layer, v), rows in written.items():  # after all were written: none has overwritten another
            before, after = (t.tier.get_v(layer) if v else t.tier.get_k(layer) for t in (source, target))
            kept += np.array_equal(before.data[0], rows)
            arrived += (after.type, after.ne) == ("q4_0", (HEAD, N_HEAD_KV, n, 1)) and np.array_equal(
                after.data[0], q4_0(rows)
            )
            within += _within_a_level(rows, after.dequantize()[0])
        play.check("tensors whose rows are there still", "4 of 4", f"{kept} of {len(written)}")
        play.check("tensors whose rows arrived as Q4_0", "4 of 4", f"{arrived} of {len(written)}")
        play.check("those within a level of Q4_0", "4 of 4", f"{within} of {len(written)}")
        stored, reason = target.tier.get_k(0), "ggml copies q4_0 to f32 only"
        play.check_refused("Q4_0 -> F16 in one step", reason, ParamsError, lambda: ggml.cpy(stored, "f16"))
        play.check_refused("commit", "commit without find_slot", CacheError, source.commit)
