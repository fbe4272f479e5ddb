"""What a mixed KV cache has to do, in numpy: which tokens are cold when, and the logits that follow from it.

Tiering is a twin of the library's policy (vendor/overlay/src/cache/policy.cpp and what calls it): it knows
positions, sequences and sizes, and no data. Llama is a forward pass in float64 whose K and V rows are hot or cold as
Tiering says. Neither shares code with the library.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llamamix import _ffi

#
# which tokens are where
#


class Full(Exception):
    """Hot and cold have no room for a batch."""


@dataclass(eq=False)
class Token:
    index: int  # counts all tokens that were ever decoded
    pos: int
    seqs: set[int]


@dataclass(eq=False)
class Stream:
    hot: list[Token] = field(default_factory=list)
    cold: list[Token] = field(default_factory=list)

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
        s.hot = _without(s.hot, moved)
        s.cold = s.cold + moved
        self.n_migrations += 1
        self.n_tokens_moved += n
        return n

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
            copies = [Token(t.index, t.pos, {dst}) for t in getattr(self.streams[src], tier)]
            setattr(self.streams[dst], tier, copies)

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


#
# rows of K and V
#


def hadamard(n: int) -> np.ndarray:
    """The orthonormal Walsh-Hadamard matrix, its own inverse."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def rotation(n: int, head_size: int) -> np.ndarray:
    """Head-sized, with blocks of n."""
    return np.kron(np.eye(head_size // n), hadamard(n))


def fwht(x: np.ndarray, n: int) -> np.ndarray:
    """Float32 rows times hadamard(n) in blocks of n, by ggml's operations in ggml's order (ggml_compute_forward_fwht)."""
    res = x.reshape(-1, n) * (np.float32(1) / np.sqrt(np.float32(n)))
    for h in (2**i for i in range(n.bit_length() - 1)):
        a, b = np.moveaxis(res.reshape(-1, n // (2 * h), 2, h), 2, 0)
        res = np.stack([a + b, a - b], axis=2).reshape(-1, n)
    return res.reshape(x.shape)


def q4_0(x: np.ndarray) -> np.ndarray:
    """ggml's quantize_row_q4_0_ref(), in float32."""
    x = x.reshape(-1, 32)
    most = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)  # the first of several
    d = np.where(most == 0, np.float32(0), most) / np.float32(-8)
    with np.errstate(divide="ignore"):
        factor = np.where(d == 0, np.float32(0), np.float32(1) / d)
    q = np.minimum(np.trunc(x * factor + np.float32(8.5)), 15).astype(np.uint8)
    return np.hstack([d.astype(np.float16).view(np.uint8), q[:, :16] | q[:, 16:] << 4])


def q8_0(x: np.ndarray) -> np.ndarray:
    """ggml's quantize_row_q8_0() for x86, in float32."""
    x = x.reshape(-1, 32)
    most = np.abs(x).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        factor = np.where(most == 0, np.float32(0), np.float32(127) / most)
    d = (most / np.float32(127)).astype(np.float16)
    return np.hstack([d.view(np.uint8), np.rint(x * factor).astype(np.int8).view(np.uint8)])


def migrated(rows: np.ndarray, kv_type: str, n_rot: int) -> np.ndarray:
    """The bytes that a migration on the CPU makes of hot rows, every bit of them; n_rot 0: they are not rotated."""
    x = np.asarray(rows, np.float32)
    x = fwht(x, n_rot) if n_rot else x
    return {"q4_0": q4_0, "q8_0": q8_0}[kv_type](x).reshape(*rows.shape[:-1], -1)


def quantise(rows: np.ndarray, kv_type: str) -> np.ndarray:
    """What is left of rows, in float64, after they were stored in a ggml type. The last dimension holds the blocks."""
    rows = np.ascontiguousarray(rows, np.float32)
    if kv_type == "f32":
        return rows.astype(np.float64)
    if kv_type == "f16":
        return rows.astype(np.float16).astype(np.float64)
    number = gguf.GGMLQuantizationType[kv_type.upper()]
    return gguf.quants.dequantize(gguf.quants.quantize(rows, number), number).astype(np.float64)


@dataclass(frozen=True)
class Storage:
    """The types that rows are stored in, and whether cold ones are rotated first (None: as the library does)."""

    hot: str = "f32"
    cold_k: str = "q4_0"
    cold_v: str = "q4_0"
    rotate: bool | None = None

    def rotations(self, head_size: int) -> tuple[np.ndarray, np.ndarray]:
        """For K the largest power of two that divides the head, for V blocks of 64; none for types with no blocks."""

        def one(kv_type: str, n: int) -> np.ndarray:
            wanted = kv_type not in ("f32", "f16", "bf16") and head_size % 64 == 0
            wanted = wanted if self.rotate is None else self.rotate
            return rotation(n, head_size) if wanted else np.eye(head_size)

        return one(self.cold_k, head_size & -head_size), one(self.cold_v, 64)


#
# the forward pass
#

# called for each layer with K before and after it is quantised, then V, float64 [n_tokens, n_head_kv, head_size]; may
# change what is cold
Tamper = Callable[[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


class Llama:
    """A model of the llama architecture from a GGUF file with F32 weights."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)

        def get(key: str) -> float:
            return reader.get_field(f"llama.{key}").contents()

        self.n_layer = get("block_count")
        self.n_head = get("attention.head_count")
        self.n_head_kv = get("attention.head_count_kv")
        self.head_size = get("attention.key_length")
        self.eps = get("attention.layer_norm_rms_epsilon")
        self.freq_base = get("rope.freq_base")
        self.weights = {t.name.removesuffix(".weight"): t.data.astype(np.float64) for t in reader.tensors}

    def logits(
        self,
        tokens: Sequence[int],
        views: Sequence[View],
        storage: Storage,
        tamper: Tamper | None = None,
    ) -> np.ndarray:
        """Logits of all tokens, float64 of shape [n, n_vocab], in the order in which they were decoded."""
        w = self.weights
        visible, cold = attention_of(views)
        pos = np.empty(len(views), np.int64)
        pos[[v.index for v in views]] = [v.pos for v in views]
        cos, sin = self._angles(pos)
        rot_k, rot_v = storage.rotations(self.head_size)

        x = w["token_embd"][np.asarray(tokens)]
        for i in range(self.n_layer):
            h = self._norm(x) * w[f"blk.{i}.attn_norm"]
            q, k, v = (self._heads(h @ w[f"blk.{i}.attn_{name}"].T) for name in "qkv")
            q, k = _rope(q, cos, sin), _rope(k, cos, sin)
            k, v = quantise(k, storage.hot), quantise(v, storage.hot)
            k_rot, v_rot = k @ rot_k, v @ rot_v
            k_cold, v_cold = quantise(k_rot, storage.cold_k), quantise(v_rot, storage.cold_v)
            if tamper:
                tamper(i, k_rot, k_cold, v_rot, v_cold)
            heads = []
            for head in range(self.n_head):
                kv = head // (self.n_head // self.n_head_kv)
                score = np.where(cold, q[:, head] @ rot_k @ k_cold[:, kv].T, q[:, head] @ k[:, kv].T)
                p = _softmax(np.where(visible, score / np.sqrt(self.head_size), -np.inf))
                heads.append((p * ~cold) @ v[:, kv] + (p * cold) @ v_cold[:, kv] @ rot_v)
            x = x + np.concatenate(heads, axis=1) @ w[f"blk.{i}.attn_output"].T
            h = self._norm(x) * w[f"blk.{i}.ffn_norm"]
            gate, up = h @ w[f"blk.{i}.ffn_gate"].T, h @ w[f"blk.{i}.ffn_up"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"blk.{i}.ffn_down"].T
        return (self._norm(x) * w["output_norm"]) @ w["output"].T

    def _norm(self, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps)

    def _heads(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1, self.head_size)

    def _angles(self, pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # ggml multiplies the angle from pair to pair in float32; at position 1,000 that is 1e-4 off, too much to ignore
        scale = np.float32(self.freq_base) ** np.float32(-2 / self.head_size)
        theta = np.empty((len(pos), self.head_size // 2), np.float32)
        theta[:, 0] = pos
        for j in range(1, theta.shape[1]):
            theta[:, j] = theta[:, j - 1] * scale
        return np.cos(theta.astype(np.float64)), np.sin(theta.astype(np.float64))


def _rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate the pairs (0, 1), (2, 3), ... of every head."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


#
# models made from others
#


def rewrite_gguf(
    source: Path,
    target: Path,
    *,
    arch: str | None = None,
    n_layer: int | None = None,
    drop: Sequence[str] = (),
    extra: dict[str, float | int | bool | list[int]] | None = None,
) -> Path:
    """Copy a GGUF file with all weights as F32, and return the path of the copy.

    arch     under another architecture
    n_layer  the first layers only
    drop     without tensors whose name one of these regular expressions matches
    extra    more metadata; keys without the architecture
    """
    reader = gguf.GGUFReader(source)
    old = reader.get_field("general.architecture").contents()
    arch = arch or old
    n_layer = n_layer or reader.get_field(f"{old}.block_count").contents()
    writer = gguf.GGUFWriter(target, arch)

    for key, part in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        array = part.types[0] == gguf.GGUFValueType.ARRAY
        value = n_layer if key == f"{old}.block_count" else part.contents()
        name = key.replace(f"{old}.", f"{arch}.", 1) if key.startswith(f"{old}.") else key
        writer.add_key_value(name, value, part.types[0], part.types[-1] if array else None)
    for key, value in (extra or {}).items():
        add: Any = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
        }[type(value)]
        add(f"{arch}.{key}", value)

    for tensor in reader.tensors:
        layer = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else "0"
        if int(layer) < n_layer and not any(re.match(d, tensor.name) for d in drop):
            data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, data.reshape(tensor.shape[::-1]))

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


#
# other processes
#


def library_dir() -> Path:
    """The folder of the libllama that these tests use."""
    return next(folder.resolve() for folder in _ffi._lib_dirs() if (folder / _ffi._file_name("llama")).is_file())


def find_program(name: str) -> Path:
    """One of llama.cpp's programs: beside libllama, or in this checkout's build; the test is skipped where there is none."""
    places = (library_dir(), Path(__file__).parent.parent / "build" / "cpu" / "bin")
    for path in (place / name for place in places):
        if path.is_file():
            return path
    pytest.skip(f"no {name}: cmake --build --preset cpu --target {name}")


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment variables without llama.cpp's own, and with changes; None leaves one out."""
    own = ("LLAMA_", "GGML_")
    kept = {name: value for name, value in os.environ.items() if name not in changes and not name.startswith(own)}
    return kept | {name: value for name, value in changes.items() if value is not None}
