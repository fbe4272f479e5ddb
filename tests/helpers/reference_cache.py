"""What a mixed KV cache that is driven by hand has to hold after each call, in plain Python: tokens, tiers and policy.

A token carries the rows that were written for it, which follow it wherever it goes. The model knows nothing of ggml:
the rows of a tier are compared elsewhere. It shares no code with the library.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(eq=False)
class Token:
    """A token in a cell. ``shift`` is what its position has moved by since its rows were written.

    ``opened``: the tokens that came first to its page of cold, of which there is one here, itself perhaps among them.
    """

    id: int
    pos: int
    seqs: set[int]
    cell: int
    rows: Any = None
    shift: int = 0
    opened: list[Token] = field(default_factory=list)


@dataclass
class Stream:
    hot: list[Token] = field(default_factory=list)
    cold: list[Token] = field(default_factory=list)
    opened: list[Token] = field(default_factory=list)

    @property
    def tokens(self) -> list[Token]:
        return self.hot + self.cold

    def drop_unowned(self) -> None:
        self.hot = [t for t in self.hot if t.seqs]
        self.cold = [t for t in self.cold if t.seqs]


@dataclass(frozen=True)
class Share:
    """The part of a ubatch that goes to one stream: ids, positions and sequences of its tokens."""

    stream: int
    tokens: list[tuple[int, int, tuple[int, ...]]]


class NoRoom(Exception):
    """A state does not fit, and nothing has changed."""


class ReferenceCache:
    """``hot`` and ``cold`` are cells per stream."""

    def __init__(
        self, *, hot: int, cold: int, group: int, sink: int, threshold: float, n_seq_max: int, unified: bool
    ) -> None:
        self.n_hot, self.n_cold = hot, cold
        self.n_sink = sink
        self.n_move_max = max(1, min(hot // 4, group))
        self.n_pin_max = min(hot - 1, max(hot // 2, sink))
        self.most = float(np.float32(threshold)) * hot  # more use than this is over the threshold
        self.n_seq_max = n_seq_max
        self.streams = [Stream() for _ in range(1 if unified else n_seq_max)]
        self.n_migrations = 0
        self.n_tokens_moved = 0
        self.n_refused = 0
        self.n_fail = 0  # so many migrations will fail

    def stream(self, seq: int) -> Stream:
        return self.streams[seq if len(self.streams) > 1 else 0]

    def seqs_of(self, seq: int) -> range:
        """A sequence, or all of them for -1."""
        return range(self.n_seq_max) if seq == -1 else range(seq, seq + 1)

    def positions(self, seq: int) -> list[int]:
        return sorted(t.pos for t in self.stream(seq).tokens if seq in t.seqs)

    def pos_max(self, seq: int) -> int:
        return max(self.positions(seq), default=-1)

    def pos_min(self, seq: int) -> int:
        return min(self.positions(seq), default=-1)

    def pinned(self, tokens: Iterable[Token]) -> list[Token]:
        """Those of hot tokens that are pinned: so many sinks of each sequence and of all, the first by position."""
        res: list[Token] = []
        count: Counter[int] = Counter()
        sinks = (t for t in tokens if t.pos < self.n_sink)
        for t in sorted(sinks, key=lambda t: (t.pos, sorted(t.seqs), t.cell)):
            if len(res) < self.n_pin_max and count[min(t.seqs)] < self.n_sink:
                count[min(t.seqs)] += 1
                res.append(t)
        return res

    def is_ordered(self, seq: int) -> bool:
        """Everything cold is older than everything hot, but for sinks."""
        s = self.stream(seq)
        cold = [t.pos for t in s.cold if seq in t.seqs]
        hot = [t.pos for t in s.hot if seq in t.seqs and t.pos >= self.n_sink]
        return not cold or max(cold) <= min(hot, default=max(cold))

    def movable(self, s: Stream, in_flight: Iterable[Token] = ()) -> list[Token]:
        """Hot tokens that may leave: not those whose rows are yet to be computed, and of the others no pinned one."""
        settled = [t for t in s.hot if t not in in_flight]
        pinned = self.pinned(settled)
        return [t for t in settled if t not in pinned]

    #
    # tokens
    #

    def shares(self, token: Sequence[int], pos: Sequence[int], seqs: Sequence[tuple[int, ...]]) -> list[Share]:
        shares: dict[int, Share] = {}
        for t in zip(token, pos, seqs, strict=True):
            stream = min(t[2]) if len(self.streams) > 1 else 0
            shares.setdefault(stream, Share(stream, [])).tokens.append(t)
        return list(shares.values())

    def find_slot(self, shares: Iterable[Share]) -> bool:
        """Make room; False and nothing else when there is none."""
        for share in shares:
            s = self.streams[share.stream]
            n_free = self.n_hot - len(s.hot)
            n_movable = min(len(self.movable(s)), self.n_cold - len(s.cold))
            if len(share.tokens) > n_free + n_movable:
                self.n_refused += 1
                return False
        return all(self._make_room(self.streams[share.stream], len(share.tokens)) for share in shares)

    def commit(self, shares: Iterable[Share], cells: Iterable[int]) -> list[Token]:
        """Put the tokens in cells, then move others when that passed the threshold."""
        cells = iter(cells)
        new = [[Token(i, pos, set(seqs), next(cells)) for i, pos, seqs in share.tokens] for share in shares]
        for share, tokens in zip(shares, new, strict=True):
            self.streams[share.stream].hot += tokens
        for share, tokens in zip(shares, new, strict=True):
            s = self.streams[share.stream]
            if len(s.hot) > self.most:
                self._migrate(s, self.n_move_max, tokens)
        return [t for tokens in new for t in tokens]

    def move(self, stream: int, n: int) -> int:
        """Move the n oldest, in groups. Returns how many."""
        moved = 0
        while moved < n:
            now = self._migrate(self.streams[stream], n - moved, [])
            if now == 0:
                break
            moved += now
        return moved

    def _make_room(self, s: Stream, n: int) -> bool:
        while self.n_hot - len(s.hot) < n:
            if self._migrate(s, self.n_move_max, []) == 0:
                return False
        return True

    def _migrate(self, s: Stream, n: int, in_flight: list[Token]) -> int:
        newest: dict[int, int] = {}
        for t in s.hot:
            newest.update({seq: max(newest.get(seq, t.pos), t.pos) for seq in t.seqs})

        def age(t: Token) -> int:
            return max(newest[seq] - t.pos for seq in t.seqs)

        left = self.movable(s, in_flight)
        n = min(n, self.n_move_max, len(left), self.n_cold - len(s.cold))
        if n == 0:
            return 0
        if self.n_fail > 0:
            self.n_fail -= 1
            return 0

        # those furthest behind the end of their sequence, unless one would keep a token that is older than one it gives
        left.sort(key=lambda t: (-age(t), t.pos, sorted(t.seqs), t.cell))
        if any(a.seqs & b.seqs and b.pos < a.pos for a in left[:n] for b in left[n:]):
            left.sort(key=lambda t: (t.pos, sorted(t.seqs), t.cell))

        if not s.cold:
            s.opened = left[:n]
        for t in left[:n]:
            s.hot.remove(t)
            s.cold.append(t)
            t.opened = s.opened
        self.n_migrations += 1
        self.n_tokens_moved += n
        return n

    #
    # sequences
    #

    def clear(self) -> None:
        self.streams = [Stream() for _ in self.streams]

    def rm(self, seq: int, p0: int, p1: int) -> None:
        for i in self.seqs_of(seq):
            for t in self._within(i, p0, p1):
                t.seqs.discard(i)
        self._drop_unowned()

    def cp(self, src: int, dst: int, p0: int, p1: int) -> None:
        if len(self.streams) == 1:
            for t in self._within(src, p0, p1):
                t.seqs.add(dst)
            return
        self.streams[dst] = copy.deepcopy(self.streams[src])
        for t in self.streams[dst].tokens:
            t.seqs = {dst}

    def keep(self, seq: int) -> None:
        for s in self.streams:
            for t in s.tokens:
                t.seqs &= {seq}
        self._drop_unowned()

    def add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        for t in self._within(seq, p0, p1):
            t.pos += delta
            t.shift += delta
            if t.pos < 0:
                t.seqs.clear()
        self._drop_unowned()

    def div(self, seq: int, p0: int, p1: int, d: int) -> None:
        for t in self._within(seq, p0, p1):
            t.shift += t.pos - t.pos // d  # libllama counts a division forwards
            t.pos //= d

    def _within(self, seq: int, p0: int, p1: int) -> list[Token]:
        return [t for t in self.stream(seq).tokens if seq in t.seqs and p0 <= t.pos and (p1 < 0 or t.pos < p1)]

    def _drop_unowned(self) -> None:
        for s in self.streams:
            s.drop_unowned()

    #
    # state
    #

    def save(self, seq: int = -1) -> list[Stream]:
        """What a state has: tokens of one sequence or of all."""
        streams = copy.deepcopy(self.streams)
        for s in streams:
            for t in s.tokens:
                if seq != -1:
                    t.seqs &= {seq}
            s.drop_unowned()
        return streams

    def load(self, state: list[Stream], seq: int = -1) -> None:
        """Replace a sequence, or all. Raises NoRoom."""
        state = copy.deepcopy(state)
        if seq == -1:
            self.streams = state
            return
        before = copy.deepcopy(self.streams), self.n_migrations, self.n_tokens_moved
        self.rm(seq, 0, -1)
        s = self.stream(seq)
        hot = [t for part in state for t in part.hot]
        cold = [t for part in state for t in part.cold]
        for t in hot + cold:
            t.seqs = {seq}

        # what others and their sinks leave no room for in hot goes to cold: the oldest, sinks last of all
        n_free = self.n_cold - len(s.cold) - len(cold)
        n_movable = len(self.movable(s))
        n_over = max(0, len(hot) - (self.n_hot - len(s.hot) + min(n_movable, n_free)))
        if n_free < 0 or (n_over > 0 and n_over + n_movable > n_free):
            self.streams, self.n_migrations, self.n_tokens_moved = before
            raise NoRoom
        while self.n_hot - len(s.hot) < len(hot) - n_over:
            n = min(self.n_move_max, self.n_cold - len(s.cold) - len(cold) - n_over)
            assert self._migrate(s, n, []) > 0
        pinned = self.pinned(hot)
        pinned.sort(key=lambda t: (t.pos, t.cell), reverse=True)
        others = sorted((t for t in hot if t not in pinned), key=lambda t: (t.pos, t.cell))
        over = (others + pinned)[:n_over]
        s.hot += [t for t in hot if t not in over]
        s.cold += cold + over
