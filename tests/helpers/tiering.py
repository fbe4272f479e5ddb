"""Which tokens are cold when: a twin of the library's policy.

It knows positions, sequences and sizes, and no data, and shares no code with the library
(vendor/overlay/src/cache/policy.cpp and what calls it).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


PAGE = 128  # cells of cold whose rows of K are stored less one mean


class Full(Exception):
    """Hot and cold have no room for a batch."""


@dataclass(eq=False)
class Token:
    index: int  # counts all tokens that were ever decoded
    pos: int
    seqs: set[int]
    cell: int = -1  # of cold


@dataclass(eq=False)
class Stream:
    hot: list[Token] = field(default_factory=list)
    cold: list[Token] = field(default_factory=list)
    pages: dict[int, tuple[int, ...]] = field(default_factory=dict)  # indices of the tokens that came first

    @property
    def tokens(self) -> list[Token]:
        return self.hot + self.cold


@dataclass(frozen=True)
class View:
    """What a token could see when it was computed: indices of tokens, itself included."""

    index: int
    pos: int
    hot: list[int]
    cold: list[int]


class Tiering:
    """Tokens in the two tiers of every stream, and how they move. ``cold`` and ``hot`` are cells per stream."""

    def __init__(
        self, *, hot: int, cold: int, group: int = 128, sink: int = 4, threshold: float = 0.8, n_stream: int = 1
    ) -> None:
        self.n_hot, self.n_cold = hot, cold
        self.group, self.sink = group, sink
        self.threshold = float(np.float32(threshold))
        self.streams = [Stream() for _ in range(n_stream)]
        self.views: list[View] = []
        self.opened: dict[int, tuple[int, ...]] = {}  # by index: the tokens that came first to its page of cold
        self.n_migrations = 0
        self.n_tokens_moved = 0
        self.n_decoded = 0

    @property
    def n_move_max(self) -> int:
        return max(1, min(self.n_hot // 4, self.group))

    @property
    def counts(self) -> dict[str, int]:
        """The fields of CacheStats that follow from the policy."""
        return {
            "hot_used": sum(len(s.hot) for s in self.streams),
            "cold_used": sum(len(s.cold) for s in self.streams),
            "n_migrations": self.n_migrations,
            "n_tokens_moved": self.n_tokens_moved,
        }

    def positions(self, seq: int) -> tuple[list[int], list[int]]:
        """Hot and cold positions of a sequence, ascending."""
        stream = self._stream(seq)
        hot, cold = (sorted(t.pos for t in tier if seq in t.seqs) for tier in (stream.hot, stream.cold))
        return hot, cold

    def is_shared(self, seq: int) -> bool:
        """True when a token of this sequence is another one's too."""
        return any(seq in t.seqs and len(t.seqs) > 1 for t in self._stream(seq).tokens)

    def _stream(self, seq: int) -> Stream:
        return self.streams[seq if len(self.streams) > 1 else 0]

    def _movable(self, s: Stream, in_flight: Sequence[Token] = ()) -> list[Token]:
        """Hot tokens but those in flight and the pinned sinks: so many of a sequence, no more than half of hot in all."""
        settled = _without(s.hot, in_flight)
        n_pin_max = min(self.n_hot - 1, max(self.n_hot // 2, self.sink))
        pinned: list[Token] = []
        count: Counter[int] = Counter()
        sinks = (t for t in settled if t.pos < self.sink)
        for t in sorted(sinks, key=lambda t: (t.pos, sorted(t.seqs), t.index)):
            if len(pinned) < n_pin_max and count[min(t.seqs)] < self.sink:
                count[min(t.seqs)] += 1
                pinned.append(t)
        return _without(settled, pinned)

    #
    # decode
    #

    def decode(self, pos: Sequence[int], seqs: Sequence[int | Iterable[int]], n_ubatch: int) -> list[list[int]]:
        """One call of llama_decode(); returns the tokens of each ubatch. Raises Full, and nothing has changed then."""
        before = [copy.copy(s) for s in self.streams], len(self.views), self.n_migrations, self.n_tokens_moved
        sets = [{s} if isinstance(s, int) else set(s) for s in seqs]
        left = [Token(self.n_decoded + i, int(p), s) for i, (p, s) in enumerate(zip(pos, sets, strict=True))]
        ubatches = []
        try:
            while left:
                n_left = Counter(self.streams.index(self._stream(min(t.seqs))) for t in left)
                rooms = {i: self._room(self.streams[i]) for i in n_left}
                n_max = min([n_ubatch, *(rooms[i] for i, n in n_left.items() if n > rooms[i])])
                if n_max == 0:
                    raise Full
                ubatch = left[:n_max] if len(self.streams) == 1 else _split_equal(left, n_max)
                left = _without(left, ubatch)
                self._place(ubatch)
                ubatches.append([t.index for t in ubatch])
        except Full:
            self.streams, n_views, self.n_migrations, self.n_tokens_moved = before
            del self.views[n_views:]
            raise
        self.n_decoded += len(sets)
        return ubatches

    def _room(self, s: Stream) -> int:
        return self.n_hot - len(s.hot) + min(len(self._movable(s)), self.n_cold - len(s.cold))

    def _place(self, ubatch: list[Token]) -> None:
        shares: dict[int, list[Token]] = {}
        for t in ubatch:
            shares.setdefault(self.streams.index(self._stream(min(t.seqs))), []).append(t)

        for i, tokens in shares.items():
            while self.n_hot - len(self.streams[i].hot) < len(tokens):
                if self._migrate(self.streams[i], []) == 0:
                    raise Full

        for i, tokens in shares.items():
            self.streams[i].hot = self.streams[i].hot + tokens
        for i, tokens in shares.items():
            if len(self.streams[i].hot) > self.threshold * self.n_hot:
                self._migrate(self.streams[i], tokens)

        # rows are computed after all that
        for i, tokens in shares.items():
            for t in tokens:
                hot, cold = (
                    [o.index for o in tier if o.seqs & t.seqs and o.pos <= t.pos]
                    for tier in (self.streams[i].hot, self.streams[i].cold)
                )
                self.views.append(View(t.index, t.pos, hot, cold))

    def _migrate(self, s: Stream, in_flight: list[Token]) -> int:
        candidates = self._movable(s, in_flight)
        n = min(self.n_move_max, len(candidates), self.n_cold - len(s.cold))
        if n == 0:
            return 0

        newest: dict[int, int] = {}
        for t in s.hot:
            for seq in t.seqs:
                newest[seq] = max(newest.get(seq, t.pos), t.pos)

        def age(t: Token) -> int:
            return max(newest[seq] - t.pos for seq in t.seqs)

        # the furthest behind the end of their sequence, unless a sequence would keep an older token than it gives
        candidates.sort(key=lambda t: (-age(t), t.pos, sorted(t.seqs)))
        if any(a.seqs & b.seqs and b.pos < a.pos for a in candidates[:n] for b in candidates[n:]):
            candidates.sort(key=lambda t: (t.pos, sorted(t.seqs)))

        moved = candidates[:n]
        self._to_cells(s, moved)
        s.hot = _without(s.hot, moved)
        s.cold = s.cold + moved
        self.n_migrations += 1
        self.n_tokens_moved += n
        return n

    def _to_cells(self, s: Stream, moved: list[Token]) -> None:
        """The first free cells of cold. Pages of 128 cells that are empty are opened by these tokens."""
        used = {t.cell for t in s.cold}
        free = [i for i in range(self.n_cold) if i not in used][: len(moved)]
        came: dict[int, list[int]] = {}
        for t, cell in zip(moved, free, strict=True):
            t.cell = cell
            came.setdefault(cell // PAGE, []).append(t.index)
        new = {page: tuple(tokens) for page, tokens in came.items() if page not in {i // PAGE for i in used}}
        s.pages = s.pages | new
        self.opened.update({t.index: s.pages[t.cell // PAGE] for t in moved})

    #
    # sequences
    #

    def clear(self) -> None:
        for s in self.streams:
            s.hot, s.cold = [], []

    def rm(self, seq: int, p0: int = 0, p1: int = -1) -> None:
        for t in self._stream(seq).tokens:
            if _within(t.pos, p0, p1):
                t.seqs.discard(seq)
        self._drop_unowned()

    def keep(self, seq: int) -> None:
        for s in self.streams:
            for t in s.tokens:
                t.seqs &= {seq}
        self._drop_unowned()

    def cp(self, src: int, dst: int, p0: int = 0, p1: int = -1) -> None:
        if len(self.streams) == 1:
            for t in self.streams[0].tokens:
                if src in t.seqs and _within(t.pos, p0, p1):
                    t.seqs.add(dst)
            return
        for tier in ("hot", "cold"):
            copies = [Token(t.index, t.pos, {dst}, t.cell) for t in getattr(self.streams[src], tier)]
            setattr(self.streams[dst], tier, copies)
        self.streams[dst].pages = self.streams[src].pages

    def add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        for t in self._stream(seq).tokens:
            if seq in t.seqs and _within(t.pos, p0, p1):
                t.pos += delta
                if t.pos < 0:
                    t.seqs.clear()
        self._drop_unowned()

    def div(self, seq: int, p0: int, p1: int, d: int) -> None:
        for t in self._stream(seq).tokens:
            if seq in t.seqs and _within(t.pos, p0, p1):
                t.pos //= d

    def _drop_unowned(self) -> None:
        for s in self.streams:
            s.hot, s.cold = ([t for t in tier if t.seqs] for tier in (s.hot, s.cold))


def _within(pos: int, p0: int, p1: int) -> bool:
    return p0 <= pos and (p1 < 0 or pos < p1)


def _without(tokens: list[Token], others: Sequence[Token]) -> list[Token]:
    gone = {t.index for t in others}
    return [t for t in tokens if t.index not in gone]


def _split_equal(left: list[Token], n_max: int) -> list[Token]:
    """As many tokens of each of several sequences as n_max allows, neighbouring sequence ids only."""
    seqs: list[int] = []
    for t in left:
        (seq,) = t.seqs
        if seq not in seqs and (not seqs or seq == seqs[-1] + 1):
            seqs.append(seq)
            if len(seqs) > n_max:
                break
    by_seq = [[t for t in left if seq in t.seqs] for seq in seqs]
    n_each = min(max(1, n_max // len(seqs)), *(len(tokens) for tokens in by_seq))
    return [t for tokens in by_seq for t in tokens[:n_each]]


def attention_of(views: Sequence[View]) -> tuple[np.ndarray, np.ndarray]:
    """Two matrices, bool of shape [n, n]: what token i (a row) saw of token j, and whether j was cold then."""
    n = len(views)
    visible, cold = np.zeros((n, n), bool), np.zeros((n, n), bool)
    for v in views:
        visible[v.index, v.hot + v.cold] = True
        cold[v.index, v.cold] = True
    return visible, cold
