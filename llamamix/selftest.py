"""Shows that the cache does what it says: ten scenarios on caches of a bare shape, in a second and without a model.

Each compares what it expects with what the library does, and keeps the lines that the library logs about it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import ggml
from ._ffi import lib, log
from .cache import CacheError, KVCache, MixedKVCache, UnifiedKVCache
from .errors import LibraryError, ParamsError
from .sbatch import Batch, SBatch

_TRACE_LOG = 1  # LLAMA_KV_MIXED_TRACE_LOG
_N_LAYER, _N_HEAD_KV, _HEAD = 2, 2, 64


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    what: str
    expected: str
    found: str

    @property
    def ok(self) -> bool:
        return self.expected == self.found


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a scenario: its checks, and the lines that the library logged about the cache."""

    name: str
    title: str
    log: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


_Check = Callable[[str, Any, Any], None]  # what, expected, found


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    title: str
    play: Callable[[_Check], None]

    def run(self) -> Result:
        """Play it. An error ends it and is a check that failed. Raises LibraryError when there is no library."""
        checks: list[Check] = []

        def check(what: str, expected: Any, found: Any) -> None:
            checks.append(Check(what, str(expected), str(found)))

        with _log_lines() as lines:
            try:
                self.play(check)
            except LibraryError:
                raise
            except Exception as error:  # whatever it is, it must not end the other scenarios
                check("goes to its end", "no error", f"{type(error).__name__}: {error}")
        return Result(self.name, self.title, tuple(lines), tuple(checks))


def choose(names: Sequence[str]) -> list[Scenario]:
    """Scenarios by name, all when there is none. Raises ParamsError for an unknown name."""
    known = {scenario.name: scenario for scenario in SCENARIOS}
    for name in names:
        if name not in known:
            raise ParamsError(f"{name} is not a scenario; there are {', '.join(known)}.")
    return [known[name] for name in names or known]


@contextlib.contextmanager
def _log_lines() -> Iterator[list[str]]:
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


#
# what the scenarios share
#


def _cache(hot: int, cold: int, group: int, n_pad: int, n_seq_max: int = 1) -> MixedKVCache:
    return MixedKVCache(
        hot=hot, cold_size=cold, group=group, sink=0, n_pad=n_pad, n_seq_max=n_seq_max, n_layer=_N_LAYER,
        n_head_kv=_N_HEAD_KV, head_size_k=_HEAD,
    )  # fmt: skip


def _log_events(cache: MixedKVCache, on: bool) -> None:
    with cache.use() as (_, memory):
        lib.llama_kv_mixed_trace_start(memory, int(on), _TRACE_LOG)


def _find(cache: KVCache, pos: Sequence[int], seq: int = 0) -> tuple[int, ...]:
    batch = Batch()
    for p in pos:
        batch.add(p, p, seq)
    with SBatch(batch, memory=cache) as sbatch:
        return cache.find_slot(sbatch.split_simple(len(pos)))


def _row(pos: int, layer: int, v: bool) -> np.ndarray:
    """A row that tells where it belongs, float16 [n_head_kv, head_size]."""
    x = np.sin(0.1 * np.arange(_N_HEAD_KV * _HEAD) + pos) * (1 + pos) + 10 * layer + 100 * v
    return x.reshape(_N_HEAD_KV, _HEAD).astype(np.float16)


def _q4_0(row: np.ndarray) -> np.ndarray:
    """Its bytes as the gguf package has them."""
    import gguf

    return gguf.quants.quantize(row.astype(np.float32), gguf.GGMLQuantizationType.Q4_0)


def _add(cache: MixedKVCache, n: int, seq: int = 0) -> None:
    """Add n tokens one by one, with their rows."""
    for _ in range(n):
        pos = cache.seq_pos_max(seq) + 1
        (cell,) = _find(cache, [pos], seq)
        cache.commit()
        for layer in range(_N_LAYER):
            cache.hot.set_k(layer, cell, _row(pos, layer, False))
            cache.hot.set_v(layer, cell, _row(pos, layer, True))


def _tokens(cache: MixedKVCache, seq: int = 0) -> str:
    """Where the positions of a sequence are."""
    hot, cold = (sorted(c.pos for c in tier.cells() if seq in c.seq_ids) for tier in (cache.hot, cache.cold))
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


def _cold_rows(cache: MixedKVCache) -> str:
    """How many cold rows have the bytes of what was written for their position."""
    good = total = 0
    for layer in range(_N_LAYER):
        for v, rows in enumerate((cache.cold.get_k(layer), cache.cold.get_v(layer))):
            for cell in cache.cold.cells():
                good += np.array_equal(rows.data[0, cell.index], _q4_0(_row(cell.pos, layer, bool(v))))
                total += 1
    return f"{good} of {total}"


#
# the cache
#


def _constructor(check: _Check) -> None:
    with _cache(32, 128, 8, 8, n_seq_max=10) as cache:
        _log_events(cache, True)
        check("hot", "32 cells of f16/f16", f"{cache.hot.size} cells of {cache.hot.type_k}/{cache.hot.type_v}")
        check("cold", "128 cells of q4_0/q4_0", f"{cache.cold.size} cells of {cache.cold.type_k}/{cache.cold.type_v}")
        check("tokens", "hot none, cold none", _tokens(cache))


def _basic_ops(check: _Check) -> None:
    with _cache(16, 64, 4, 8, n_seq_max=5) as cache:
        check("parameters in force", "hot=16,cold=q4_0,group=4,threshold=0.8,sink=0,cold_size=64", cache.params.spec())
        _add(cache, 10)
        check("ten tokens", "hot 0-9, cold none", _tokens(cache))
        cache.clear()
        check("after clear()", "hot none, cold none", _tokens(cache))


def _quantization_trigger(check: _Check) -> None:
    with _cache(10, 40, 4, 2, n_seq_max=3) as cache:
        _log_events(cache, True)
        moved = {}
        for i in range(1, 16):
            before = cache.cold.used
            _add(cache, 1)
            if cache.cold.used > before:
                moved[i] = cache.cold.used - before
        check("commits that pass 80 %, and the tokens they move", {9: 2, 11: 2, 13: 2, 15: 2}, moved)
        check("the oldest are cold", "hot 8-14, cold 0-7", _tokens(cache))
        check("cold rows that are ggml's F16 -> Q4_0", "32 of 32", _cold_rows(cache))
    with _cache(16, 64, 4, 8) as cache:
        _add(cache, 12)
        _log_events(cache, True)
        _add(cache, 1)
        check("four at a time, when the group and a quarter of hot are that", "hot 4-12, cold 0-3", _tokens(cache))


def _find_slot_trigger(check: _Check) -> None:
    with _cache(8, 32, 3, 4, n_seq_max=2) as cache:
        _log_events(cache, True)
        for _ in range(10):
            _find(cache, range(8))
        check("ten searches in an empty cache", "0 migrations", f"{cache.stats.n_migrations} migrations")
        _add(cache, 6)
        check("six tokens, and a search for four cells", 4, len(_find(cache, range(6, 10))))
        check("what made room", "hot 2-5, cold 0-1", _tokens(cache))
        cache.commit()
        _log_events(cache, False)
        _add(cache, 30)
        _log_events(cache, True)
        check("all cells are used", "hot 32-39, cold 0-31", _tokens(cache))
        before = cache.state_save()
        check("cells for one more", (), _find(cache, [40]))
        check("nothing has changed", True, cache.state_save() == before)


def _sequence_ops(check: _Check) -> None:
    def filled() -> MixedKVCache:
        cache = _cache(16, 64, 8, 4, n_seq_max=43)
        _add(cache, 20, seq=42)
        return cache

    with filled() as cache:
        check("sequence 42", "hot 8-19, cold 0-7", _tokens(cache, 42))
        check("its ends", (0, 19), (cache.seq_pos_min(42), cache.seq_pos_max(42)))
        state = cache.state_save()
        cache.seq_cp(42, 7, 6, 11)
        check("seq_cp to 7 across the border", "hot 8-10, cold 6-7", _tokens(cache, 7))
        cache.seq_rm(42, 6, 11)
        check("seq_rm across the border", "hot 11-19, cold 0-5", _tokens(cache, 42))
        cache.seq_keep(7)
        check("seq_keep of 7", "hot 8-10, cold 6-7", _tokens(cache, 7))
        check("what is left of 42", "hot none, cold none", _tokens(cache, 42))
    with filled() as cache:
        cache.seq_add(42, 6, 11, 100)
        check("seq_add across the border", "hot 11-19 108-110, cold 0-5 106-107", _tokens(cache, 42))
    with filled() as cache:
        cache.seq_div(42, 0, -1, 2)
        check("seq_div of everything", (0, 9), (cache.seq_pos_min(42), cache.seq_pos_max(42)))
        cache.state_load(state)
        check("state, read back", "hot 8-19, cold 0-7", _tokens(cache, 42))
        check("bit for bit", True, cache.state_save() == state)
        check("cold rows that are as they were", "32 of 32", _cold_rows(cache))


def _config_variations(check: _Check) -> None:
    for hot, cold, group, n_pad in ((8, 32, 4, 4), (16, 64, 8, 8), (32, 128, 16, 8), (64, 256, 32, 16)):
        with _cache(hot, cold, group, n_pad) as cache:
            n = 0
            while n <= hot + cold and _find(cache, [n]):
                cache.commit()
                n += 1
            check(f"tokens in hot={hot}, cold={cold}, group={group}, n_pad={n_pad}", hot + cold, n)
    for what, refused in (
        ("hot=10, n_pad=4", lambda: MixedKVCache(hot=10, n_pad=4, cold_size=40, sink=0)),
        ("hot=0", lambda: MixedKVCache(hot=0, cold_size=40)),
        ("threshold=1.5", lambda: MixedKVCache(hot=8, cold_size=32, sink=0, threshold=1.5)),
        ("heads of 48 in Q4_0", lambda: MixedKVCache(hot=8, cold_size=32, sink=0, head_size_k=48)),
    ):
        try:
            refused().close()
            found = "taken"
        except ParamsError:
            found = "refused"
        check(what, "refused", found)


#
# copies
#


def _basic_access(check: _Check) -> None:
    with UnifiedKVCache(64, n_layer=_N_LAYER, n_head_kv=2, head_size_k=8, n_pad=4) as cache:
        check("cells", 64, cache.tier.size)
        for layer in range(_N_LAYER):
            for name, tensor in (("K", cache.tier.get_k(layer)), ("V", cache.tier.get_v(layer))):
                check(f"{name} of layer {layer}", "f16 [8, 2, 0, 1]", f"{tensor.type} {list(tensor.ne)}")


def _data_storage_and_retrieval(check: _Check) -> None:
    with UnifiedKVCache(64, n_layer=_N_LAYER, n_head_kv=2, head_size_k=8, n_pad=4) as cache:
        batch = Batch()
        for pos, token in enumerate((101, 1, 102)):
            batch.add(token, pos, 0)
        with SBatch(batch, memory=cache) as sbatch:
            ubatch = sbatch.split_simple(4)
            check("tokens of the ubatch", [101, 1, 102], ubatch.token.tolist())
            check("find_slot", (0, 1, 2), cache.find_slot(ubatch))
        check("tokens before commit", 0, cache.tier.used)
        cache.commit()
        check("tokens after commit", 3, cache.tier.used)
        check("K", [8, 2, 4, 1], list(cache.tier.get_k(0).ne))
        check("V", [8, 2, 4, 1], list(cache.tier.get_v(0).ne))


def _simple_ggml_cpy(check: _Check) -> None:
    x = np.sin(0.05 * np.arange(128)).astype(np.float16)
    f16 = ggml.quantize(x, "f16")
    q = ggml.cpy(f16, "q4_0")
    y = ggml.cpy(q, "f32").data
    check("bytes of F16 -> Q4_0", "256 -> 72 (-72%)", f"{f16.nbytes} -> {q.nbytes} (-{1 - q.nbytes / f16.nbytes:.0%})")
    check("the bytes are those of the gguf package", True, np.array_equal(q.data, _q4_0(x)))
    level = np.abs(x.reshape(4, 32).astype(np.float64)).max(axis=1) / 8
    error = np.abs(y - x).reshape(4, 32).max(axis=1)
    # a level is rounded to F16, which up to eight of them add up
    check("error is within a level of Q4_0", True, bool((error <= level * (1 + 8 * 2.0**-11)).all()))


def _copy_between_caches(check: _Check) -> None:
    shape: dict[str, Any] = {"n_layer": _N_LAYER, "n_head_kv": _N_HEAD_KV, "head_size_k": _HEAD, "n_pad": 4}
    with UnifiedKVCache(64, **shape) as source, UnifiedKVCache(64, type_k="q4_0", type_v="q4_0", **shape) as target:
        for cache in (source, target):
            _find(cache, range(8))
            cache.commit()
        for layer in range(_N_LAYER):
            source.tier.set_k(layer, 0, np.stack([_row(pos, layer, False) for pos in range(8)]))
        for layer in range(_N_LAYER):
            q = ggml.cpy(source.tier.get_k(layer), "q4_0")
            target.tier.set_k(layer, 0, ggml.Tensor("q4_0", q.ne[:3], q.data[0]))
        good = sum(
            np.array_equal(target.tier.get_k(layer).data[0, pos], _q4_0(_row(pos, layer, False)))
            for layer in range(_N_LAYER)
            for pos in range(8)
        )
        check("rows that arrived", "16 of 16", f"{good} of {8 * _N_LAYER}")
        error = np.abs(target.tier.get_k(0).dequantize() - source.tier.get_k(0).dequantize()).max()
        # no number of layer 0 is larger than 8, so a level is at most 1
        check("the error is that of Q4_0", True, bool(0 < error <= 1 + 8 * 2.0**-11))
        try:
            ggml.cpy(target.tier.get_k(0), "f16")
            found = "copied"
        except ParamsError:
            found = "refused"
        check("Q4_0 -> F16 in one step", "refused", found)
        try:
            source.commit()
            found = "taken"
        except CacheError:
            found = "refused"
        check("commit() without find_slot()", "refused", found)


SCENARIOS = (
    Scenario("constructor", "both caches are there, as asked for", _constructor),
    Scenario("basic_ops", "tokens go in, and out", _basic_ops),
    Scenario("quantization_trigger", "commit() moves the oldest tokens when hot passes 80 %", _quantization_trigger),
    Scenario("find_slot_trigger", "find_slot() makes room, and refuses when there is none", _find_slot_trigger),
    Scenario("sequence_ops", "operations on sequences act on both caches", _sequence_ops),
    Scenario("config_variations", "other sizes work, and what can not work is refused", _config_variations),
    Scenario("basic_access", "K and V of every layer can be reached", _basic_access),
    Scenario("data_storage_and_retrieval", "batch, sbatch, ubatch, find_slot, commit", _data_storage_and_retrieval),
    Scenario("simple_ggml_cpy", "F16 to Q4_0 to F32 with ggml_cpy", _simple_ggml_cpy),
    Scenario("copy_between_caches", "rows go from an F16 cache to a Q4_0 cache", _copy_between_caches),
)
