"""A mixed cache that is driven at random, against its reference: every token once, in the right tier, with its rows.

LLAMAMIX_TEST_PROFILE=long runs it for longer, with examples that are new each time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from helpers import raw
from helpers.reference_cache import NoRoom, ReferenceCache, Token
from helpers.rows import GRIDS, migrated
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llamamix import Batch, CacheError, KVMixedParams, MixedKVCache, SBatch, UBatch, ggml

_PROFILES = {
    "ci": settings(max_examples=400, stateful_step_count=40, derandomize=True, database=None, print_blob=True),
    "long": settings(max_examples=4000, stateful_step_count=100, print_blob=True),
}

N_SEQ = 5
N_LAYER = 2
HEAD_K, HEAD_V = 32, 64

seqs = st.integers(0, N_SEQ - 1)
# [p0, p1), short enough to leave something
ranges = st.builds(lambda p0, n: (p0, p0 + n if n < 13 else -1), st.integers(0, 24), st.integers(0, 13))


@dataclass(frozen=True)
class Config:
    hot: int
    cold: int
    group: int
    sink: int
    threshold: float
    n_pad: int
    unified: bool
    cold_k: str
    cold_v: str
    mean: bool

    def cache(self) -> MixedKVCache:
        params = KVMixedParams(
            hot=self.hot,
            cold_size=self.cold,
            cold_k=self.cold_k,
            cold_v=self.cold_v,
            group=self.group,
            sink=self.sink,
            threshold=self.threshold,
            mean=self.mean,
        )
        return MixedKVCache(
            params, n_layer=N_LAYER, head_size_k=HEAD_K, head_size_v=HEAD_V, n_seq_max=N_SEQ, n_pad=self.n_pad,
            unified=self.unified,
        )  # fmt: skip

    def reference(self) -> ReferenceCache:
        return ReferenceCache(
            hot=self.hot, cold=self.cold, group=self.group, sink=self.sink, threshold=self.threshold, n_seq_max=N_SEQ,
            unified=self.unified,
        )  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> Config:
    n_pad = draw(st.sampled_from([1, 2, 3, 4]))
    unified = draw(st.booleans())
    hot = n_pad * draw(st.integers(1, 16 // n_pad))
    return Config(
        hot=hot,
        cold=n_pad * draw(st.integers(1, 32 // n_pad)),
        group=draw(st.sampled_from([1, 2, 3, 8])),
        sink=draw(st.integers(0, min(4, hot - 1))),
        threshold=draw(st.sampled_from([0.5, 0.8, 1.0])),
        n_pad=n_pad,
        unified=unified,
        cold_k=draw(st.sampled_from(["q4_0", "q4_0", "q8_0", "f16"])),
        cold_v=draw(st.sampled_from(["q4_0", "q4_0", "q5_1", "iq4_nl"])),
        mean=draw(st.booleans()),
    )


def rows_of(token: int, seq: int, pos: int) -> tuple[np.ndarray, np.ndarray]:
    """K and V rows of all layers, float16 [N_LAYER, 1, head size], different for every token."""
    layer = np.arange(N_LAYER)[:, None, None]

    def wave(n: int, phase: float) -> np.ndarray:
        x = np.sin(0.37 * token + 1.7 * layer + 0.61 * np.arange(n) + phase)
        return (x * (1 + 0.5 * seq) + 0.01 * pos).astype(np.float16)

    return wave(HEAD_K, 0.0), wave(HEAD_V, 2.0)


def mean_of(rows: list[np.ndarray]) -> np.ndarray:
    """As the library sums them: in float32, one after the other."""
    total = np.zeros_like(rows[0], np.float32)
    for row in rows:
        total = total + row.astype(np.float32)
    return (total / np.float32(len(rows))).astype(np.float16)


def row_bytes(k: list[np.ndarray], v: list[np.ndarray]) -> bytes:
    return b"".join(row.tobytes() for row in [*k, *v])


def stored(x: np.ndarray, kv_type: str) -> np.ndarray:
    """A row as a migration stores it."""
    return migrated(x, kv_type, 0) if kv_type in GRIDS else ggml.quantize(x, kv_type).data


def cells_of(cache: MixedKVCache, cold: bool, stream: int) -> list[tuple]:
    """(rows, position, sequence ids, shift, cell) of a tier's tokens."""
    tier = cache.cold if cold else cache.hot
    cells = tier.cells(stream)
    if not cells:
        return []
    k, v = ([get(layer, stream).data[0] for layer in range(N_LAYER)] for get in (tier.get_k, tier.get_v))
    return [
        (row_bytes([x[c.index] for x in k], [x[c.index] for x in v]), c.pos, c.seq_ids, c.shift, c.index) for c in cells
    ]


class CacheMachine(RuleBasedStateMachine):
    cache: MixedKVCache
    ref: ReferenceCache

    @initialize(config=configs())
    def create(self, config: Config) -> None:
        self.config = config
        self.cache = config.cache()
        self.ref = config.reference()
        self.n_tokens = 0
        self.known: dict[tuple, bytes] = {}
        self.n_migrations = 0  # of caches before this one
        self.ordered = set(range(N_SEQ))
        event(f"unified={config.unified}")

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            n = self.n_migrations + self.ref.n_migrations
            event("migrations: " + ("0" if n == 0 else "1 to 9" if n < 10 else "10 or more"))
            self.cache.close()

    #
    # tokens
    #

    def batch(self, lengths: dict[int, int], starts: int, round_robin: bool) -> Batch:
        """So many tokens of each sequence, at the positions that follow."""
        tokens = []
        for seq, n in lengths.items():
            first = self.ref.pos_max(seq) + 1 or starts
            tokens += [(i if round_robin else 0, seq, first + i) for i in range(n)]
        batch = Batch()
        for _, seq, pos in sorted(tokens) if round_robin else tokens:
            batch.add(self.n_tokens, pos, seq)
            self.n_tokens += 1
        return batch

    def place(self, ubatch: UBatch, commit: bool) -> bool:
        """find_slot() and commit() or rollback(), and the rows of what was committed."""
        shares = self.ref.shares(ubatch.token.tolist(), ubatch.pos.tolist(), ubatch.seq_id)
        cells = self.cache.find_slot(ubatch)
        fits = self.ref.find_slot(shares)
        assert bool(cells) == fits
        if not fits:
            event("refused")
            return False
        if not commit:
            self.cache.rollback()
            return True

        self.cache.commit()
        for t in self.ref.commit(shares, cells):
            k, v = rows_of(t.id, min(t.seqs), t.pos)
            t.rows = (k, v)
            stream = min(t.seqs) if not self.config.unified else 0
            for layer in range(N_LAYER):
                self.cache.hot.set_k(layer, t.cell, k[layer], stream)
                self.cache.hot.set_v(layer, t.cell, v[layer], stream)
        return True

    def run(self, batch: Batch, n_ubatch: int, commit: bool = True) -> None:
        with SBatch(batch, memory=self.cache) as sbatch:
            split = sbatch.split_simple if self.config.unified else sbatch.split_equal
            while (ubatch := split(n_ubatch)).n_tokens > 0:
                if not self.place(ubatch, commit) or not commit:
                    break

    @rule(
        lengths=st.dictionaries(seqs, st.integers(1, 7), min_size=1),
        starts=st.integers(0, 6),
        round_robin=st.booleans(),
        n_ubatch=st.integers(1, 8),
    )
    def commit(self, lengths: dict[int, int], starts: int, round_robin: bool, n_ubatch: int) -> None:
        self.run(self.batch(lengths, starts, round_robin), n_ubatch)

    @rule(seq=seqs, n=st.integers(1, 12), first=st.integers(0, 5), n_ubatch=st.integers(1, 12))
    def commit_image(self, seq: int, n: int, first: int, n_ubatch: int) -> None:
        """Tokens that all have the same position."""
        pos = self.ref.pos_max(seq) + 1 or first
        batch = Batch()
        for _ in range(n):
            batch.add(self.n_tokens, pos, seq)
            self.n_tokens += 1
        event("image" + (" at a sink's position" if pos < self.config.sink else ""))
        self.run(batch, n_ubatch)

    @rule(seq=seqs, n=st.integers(1, 16))
    def commit_one_by_one(self, seq: int, n: int) -> None:
        for _ in range(n):
            self.run(self.batch({seq: 1}, 0, False), 1)

    @rule(n=st.integers(1, 4), n_ubatch=st.integers(1, 8), group=st.sets(seqs, min_size=2))
    def commit_shared(self, n: int, n_ubatch: int, group: set[int]) -> None:
        """Tokens that belong to several sequences, which must span the same positions."""
        if not self.config.unified or len({(self.ref.pos_min(seq), self.ref.pos_max(seq)) for seq in group}) > 1:
            return
        first = self.ref.pos_max(min(group)) + 1
        batch = Batch()
        for i in range(n):
            batch.add(self.n_tokens, first + i, group)
            self.n_tokens += 1
        event("shared tokens")
        self.run(batch, n_ubatch)

    @rule(lengths=st.dictionaries(seqs, st.integers(1, 9), min_size=1), starts=st.integers(0, 6))
    def find_without_commit(self, lengths: dict[int, int], starts: int) -> None:
        self.run(self.batch(lengths, starts, False), 12, commit=False)

    @rule(n=st.integers(0, 12), stream=seqs)
    def move(self, n: int, stream: int) -> None:
        stream = 0 if self.config.unified else stream
        assert self.cache.move_tokens_to_cold_cache(n, stream) == self.ref.move(stream, n)

    @rule(n=st.integers(0, 3))
    def copies_fail(self, n: int) -> None:
        """The next migrations can not copy their rows."""
        self.ref.n_fail = n
        raw.fail_moves(self.cache, n)

    #
    # sequences
    #

    @rule(seq=st.integers(-1, N_SEQ - 1), within=ranges)
    def seq_rm(self, seq: int, within: tuple[int, int]) -> None:
        self.cache.seq_rm(seq, *within)
        self.ref.rm(seq, *within)

    @rule(src=seqs, dst=seqs, within=ranges, whole=st.booleans())
    def seq_cp(self, src: int, dst: int, within: tuple[int, int], whole: bool) -> None:
        p0, p1 = (0, -1) if whole or not self.config.unified else within
        low, high = self.ref.pos_min(dst), self.ref.pos_max(dst)
        if src == dst or (high >= 0 and not self.config.unified) or (high >= p0 and (p1 < 0 or low < p1)):
            return
        event("seq_cp")
        self.cache.seq_cp(src, dst, p0, p1)
        self.ref.cp(src, dst, p0, p1)
        self.reorder()

    @rule(src=seqs, dst=seqs, n_src=st.integers(1, 6), n_shared=st.integers(1, 4), n_dst=st.integers(0, 12))
    def fork(self, src: int, dst: int, n_src: int, n_shared: int, n_dst: int) -> None:
        """A sequence that shares the last tokens of another one, and goes on by itself."""
        if src == dst or not self.config.unified:
            return
        self.seq_rm(dst, (0, -1))
        self.commit_one_by_one(src, n_src)
        self.seq_cp(src, dst, (max(0, self.ref.pos_max(src) + 1 - n_shared), -1), False)
        self.commit_one_by_one(dst, n_dst)

    @rule(seq=seqs, within=ranges, delta=st.integers(-12, 12))
    def seq_add(self, seq: int, within: tuple[int, int], delta: int) -> None:
        self.cache.seq_add(seq, *within, delta)
        self.ref.add(seq, *within, delta)
        self.reorder()

    @rule(seq=seqs, within=ranges, d=st.sampled_from([1, 2, 3, 16]))
    def seq_div(self, seq: int, within: tuple[int, int], d: int) -> None:
        self.cache.seq_div(seq, *within, d)
        self.ref.div(seq, *within, d)
        self.reorder()

    @rule(what=st.sampled_from(["keep", "clear"]), seq=seqs)
    def empty(self, what: str, seq: int) -> None:
        if what == "keep":
            self.cache.seq_keep(seq)
            self.ref.keep(seq)
        else:
            self.cache.clear()
            self.ref.clear()

    def reorder(self) -> None:
        """Tokens were given other positions: what is cold need not be older any more."""
        self.ordered = {seq for seq in range(N_SEQ) if self.ref.is_ordered(seq)}

    #
    # state
    #

    @rule()
    def save_and_load(self) -> None:
        state, saved = self.cache.state_save(), self.ref.save()
        self.n_migrations += self.ref.n_migrations
        self.cache.close()
        self.cache, self.ref = self.config.cache(), self.config.reference()
        self.cache.state_load(state)
        self.ref.load(saved)
        event("state loaded")
        assert self.cache.state_save() == state

    @rule(src=seqs, dst=seqs)
    def copy_by_state(self, src: int, dst: int) -> None:
        if self.config.mean:
            return  # rows that come to a page with another mean are rounded again: see test_means.py
        self.copies_fail(0)
        state, saved = self.cache.state_save(src), self.ref.save(src)
        try:
            self.ref.load(saved, dst)
        except NoRoom:
            event("no room for a sequence's state")
            try:
                self.cache.state_load(state, dst)
            except CacheError:
                return
            raise AssertionError("the state was read, and there is no room for it") from None
        self.cache.state_load(state, dst)
        self.reorder()

    #
    # what must hold
    #

    def rows_of(self, t: Token, cold: bool) -> bytes:
        """The bytes of a token's rows in a tier."""
        key = t.id, cold, tuple(other.id for other in t.opened)
        if key not in self.known:
            self.known[key] = self.compute_rows(t, cold)
        return self.known[key]

    def compute_rows(self, t: Token, cold: bool) -> bytes:
        k, v = t.rows
        if not cold:
            return row_bytes(list(k), list(v))
        if self.config.mean and self.config.cold_k != "f16":
            k = k.astype(np.float32) - mean_of([other.rows[0] for other in t.opened]).astype(np.float32)
        return row_bytes(
            [stored(x, self.config.cold_k) for x in k],
            [stored(x, self.config.cold_v) for x in v],
        )

    @invariant()
    def every_token_is_once_where_it_belongs(self) -> None:
        for stream, s in enumerate(self.ref.streams):
            for cold, tokens in enumerate((s.hot, s.cold)):
                found = sorted(cells_of(self.cache, bool(cold), stream))
                expected = sorted(
                    ((self.rows_of(t, bool(cold)), t.pos, tuple(sorted(t.seqs)), t.shift, t) for t in tokens), key=lambda x: x[:4]
                )
                assert [f[:4] for f in found] == [e[:4] for e in expected]
                for (*_, cell), (*_, token) in zip(found, expected, strict=True):
                    token.cell = cell

    @invariant()
    def age_order_and_sinks_are_kept(self) -> None:
        for seq in self.ordered:
            assert self.ref.is_ordered(seq)
        self.reorder()

    @invariant()
    def hot_can_always_move(self) -> None:
        """It is never full of what is pinned: a token is refused only when cold is full as well."""
        for s in self.ref.streams:
            assert len(self.ref.pinned(s.hot)) < self.config.hot

    @invariant()
    def counts_are_right(self) -> None:
        stats = self.cache.stats
        n_hot, n_cold = (sum(len(getattr(s, tier)) for s in self.ref.streams) for tier in ("hot", "cold"))
        assert (stats.hot_used, stats.cold_used) == (n_hot, n_cold) == (self.cache.hot.used, self.cache.cold.used)
        assert stats.hot_used <= stats.hot_size and stats.cold_used <= stats.cold_size
        assert stats.n_migrations == self.ref.n_migrations
        assert stats.n_tokens_moved == self.ref.n_tokens_moved
        assert stats.n_refused == self.ref.n_refused

    @invariant()
    def ends_of_sequences_are_right(self) -> None:
        for seq in range(N_SEQ):
            assert self.cache.seq_pos_min(seq) == self.ref.pos_min(seq)
            assert self.cache.seq_pos_max(seq) == self.ref.pos_max(seq)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    _PROFILES[os.environ.get("LLAMAMIX_TEST_PROFILE", "ci")], deadline=None, suppress_health_check=list(HealthCheck)
)
