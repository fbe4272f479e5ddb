"""KV caches that are driven by hand: no model file and no decode, or inside a context.

    cache = MixedKVCache(n_layer=2, n_head_kv=2, head_size_k=64, hot=32, cold_size=128, sink=0)
    batch = Batch()
    batch.add(101, 0, 0)
    cells = cache.find_slot(SBatch(batch, memory=cache).split_simple(4))
    cache.commit()
    cache.hot.set_k(0, cells[0], rows)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import ggml
from ._ffi import error_lines, ffi, lib
from ._handle import ExclusiveHandle
from .errors import LlamamixError, ParamsError
from .memory import check_int
from .params import KV_TYPES, KVMixedParams, from_options, kv_type_name
from .sbatch import UBatch
from .stats import CacheStats

if TYPE_CHECKING:
    from .context import Context
    from .model import Model

_POS_MAX = 2**31 - 1
_N_SEQ_MAX = 256  # LLAMA_MAX_SEQ
_N_LAYER_MAX = 512  # LLAMA_MAX_LAYERS
_HEADS_MAX = 2**16  # heads of a layer, and elements of a head
_CELLS_MAX = 10**9 - 1
_SPARE_MAX = 1024  # bytes that a backend adds to a tensor

_HOT, _COLD = 0, 1
_K, _V = 0, 1

_CELL = np.dtype([("pos", np.int32), ("shift", np.int32), ("seqs", np.uint64, 4)])


class CacheError(LlamamixError):
    """A KV cache can not do what it is asked for, or is closed."""


#
# tiers
#


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell in use.

    index    its number
    pos      position of its token
    seq_ids  the sequences that have the token, ascending
    shift    what seq_add() and seq_div() did to the position and the K row does not show yet
    """

    index: int
    pos: int
    seq_ids: tuple[int, ...]
    shift: int = 0


class Tier:
    """Cells of one type and their K and V rows; a part of a cache that keeps it open.

    size                      cells per stream
    n_stream                  streams: 1 when unified, else one per sequence
    n_layer                   layers that have rows
    type_k, type_v            ggml types
    n_head_kv                 heads of a row
    head_size_k, head_size_v  elements of a head
    row_size_k, row_size_v    bytes of a row
    n_pad                     what cell counts are rounded up to
    """

    def __init__(self, handle: ExclusiveHandle, number: int, n_pad: int) -> None:
        info = _sized("struct llama_kv_mixed_tier *")
        with handle as cache:
            _check(lib.llama_kv_mixed_cache_get_tier(cache, number, info))
        self._handle = handle
        self._number = number
        self.n_pad = n_pad
        self.size = int(info.size)
        self.n_stream = int(info.n_stream)
        self.n_layer = int(info.n_layer)
        self.type_k = kv_type_name(info.type_k)
        self.type_v = kv_type_name(info.type_v)
        self.n_head_kv = int(info.n_head_kv)
        self.head_size_k = int(info.n_embd_head_k)
        self.head_size_v = int(info.n_embd_head_v)
        self.row_size_k = int(info.row_size_k)
        self.row_size_v = int(info.row_size_v)

    def __repr__(self) -> str:
        return f"<Tier {self.n_stream} x {self.size} cells, K {self.type_k}, V {self.type_v}>"

    @property
    def used(self) -> int:
        """Cells in use, all streams together."""
        with self._handle as cache:
            return sum(int(np.count_nonzero(self._cells(cache, s)["pos"] >= 0)) for s in range(self.n_stream))

    def n(self, stream: int = 0) -> int:
        """Cells in view: up to the last one in use, rounded up to a multiple of n_pad; 0 when the stream is empty."""
        self._stream(stream)
        with self._handle as cache:
            return self._n(cache, stream)

    def cells(self, stream: int = 0) -> list[Cell]:
        """The cells in use, by index."""
        self._stream(stream)
        with self._handle as cache:
            cells = self._cells(cache, stream)
        return [
            Cell(int(i), int(cells["pos"][i]), _seq_ids(cells["seqs"][i]), int(cells["shift"][i]))
            for i in np.flatnonzero(cells["pos"] >= 0)
        ]

    def get_k(self, layer: int, stream: int | None = None) -> ggml.Tensor:
        """A copy of a layer's K rows in view, of one stream or of all (None).

        Its dimensions are ggml's: ``ne`` is (head_size_k, n_head_kv, n, n_stream), n the largest n() of them. numpy
        counts them from the other end, so ``data[s, i, h]`` is what cell i of stream s has for head h; float16 for f16,
        block bytes for quantised types, see ggml.Tensor. ``dequantize()`` gives float32.
        """
        return self._get(_K, layer, stream)

    def get_v(self, layer: int, stream: int | None = None) -> ggml.Tensor:
        """A copy of a layer's V rows in view, like get_k(), of head_size_v."""
        return self._get(_V, layer, stream)

    def set_k(self, layer: int, cell: int, rows: Any, stream: int = 0) -> None:
        """Write K rows of a layer to cells from ``cell`` on.

        rows  numbers of shape [n, n_head_kv, head_size_k], or [n_head_kv, head_size_k] for one row, which ggml converts
              to the tier's type; or a ggml.Tensor of that type and ``ne`` (head_size_k, n_head_kv, n)

        Raises ParamsError, and nothing is written then.
        """
        self._set(_K, layer, cell, rows, stream)

    def set_v(self, layer: int, cell: int, rows: Any, stream: int = 0) -> None:
        """Write V rows, like set_k()."""
        self._set(_V, layer, cell, rows, stream)

    def _stream(self, stream: Any) -> int:
        return check_int(stream, "stream", 0, self.n_stream - 1)

    def _cells(self, cache: Any, stream: int) -> np.ndarray:
        cells = np.empty(self.size, _CELL)
        c_cells = ffi.from_buffer("struct llama_kv_mixed_cell[]", cells)
        _check(lib.llama_kv_mixed_cache_get_cells(cache, self._number, stream, c_cells))
        return cells

    def _n(self, cache: Any, stream: int) -> int:
        used = np.flatnonzero(self._cells(cache, stream)["pos"] >= 0)
        return -(-int(used[-1] + 1) // self.n_pad) * self.n_pad if len(used) else 0

    def _rows(self, v: int) -> tuple[str, int, int]:
        """Type, head size and bytes of a row."""
        if v:
            return self.type_v, self.head_size_v, self.row_size_v
        return self.type_k, self.head_size_k, self.row_size_k

    def _get(self, v: int, layer: int, stream: int | None) -> ggml.Tensor:
        type, head_size, row_size = self._rows(v)
        check_int(layer, "layer", 0, _N_LAYER_MAX - 1)
        streams = range(self.n_stream) if stream is None else [self._stream(stream)]
        with self._handle as cache:
            n = max(self._n(cache, s) for s in streams)
            rows = np.empty((len(streams), n, self.n_head_kv, row_size // self.n_head_kv), np.uint8)
            for part, s in zip(rows, streams, strict=True):
                dst = ffi.from_buffer(part)
                _check(lib.llama_kv_mixed_cache_get_rows(cache, self._number, layer, v, s, 0, n, dst), ParamsError)
        data = rows.view(ggml.dtype(type))
        return ggml.Tensor(type, (head_size, self.n_head_kv, n, len(streams)), data)

    def _set(self, v: int, layer: int, cell: int, rows: Any, stream: int) -> None:
        type, head_size, _ = self._rows(v)
        check_int(layer, "layer", 0, _N_LAYER_MAX - 1)
        check_int(cell, "cell", 0, self.size - 1)
        self._stream(stream)
        if isinstance(rows, ggml.Tensor):
            wanted = f"{type} [{head_size}, {self.n_head_kv}, n]"
            if rows.type != type or len(rows.ne) != 3 or rows.ne[:2] != (head_size, self.n_head_kv):
                raise ParamsError(f"rows must be {wanted}, not {rows.type} {list(rows.ne)}.")
        else:
            rows = np.asarray(rows)
            if rows.ndim == 2:
                rows = rows[np.newaxis]
            if rows.ndim != 3 or rows.shape[1:] != (self.n_head_kv, head_size) or len(rows) == 0:
                raise ParamsError(f"rows must be of shape [n, {self.n_head_kv}, {head_size}], not {list(rows.shape)}.")
            rows = ggml.quantize(rows, type)
        n = rows.ne[2]
        if cell + n > self.size:
            raise ParamsError(f"rows must end within the {self.size} cells: there are {n}, from cell {cell} on.")
        with self._handle as cache:
            src = ffi.from_buffer(rows.data)
            _check(lib.llama_kv_mixed_cache_set_rows(cache, self._number, layer, v, stream, cell, n, src), ParamsError)

    def copy_stream(self, cache: Any, src: int, dst: int) -> None:
        """Copy all rows of a stream to another one."""
        for v in (_K, _V):
            rows = ffi.new("uint8_t[]", self.size * self._rows(v)[2])
            for layer in range(self.n_layer):
                _check(lib.llama_kv_mixed_cache_get_rows(cache, self._number, layer, v, src, 0, self.size, rows))
                _check(lib.llama_kv_mixed_cache_set_rows(cache, self._number, layer, v, dst, 0, self.size, rows))


def _seq_ids(words: np.ndarray) -> tuple[int, ...]:
    return tuple(64 * i + bit for i, word in enumerate(words.tolist()) if word for bit in range(64) if word >> bit & 1)


#
# caches
#


class _ContextCacheHandle(ExclusiveHandle):
    """The cache of a context, which is used under the context's lock and only while that is open."""

    def __init__(self, pointer: Any, context: ExclusiveHandle) -> None:
        super().__init__(pointer, lib.llama_kv_mixed_cache_free, context, "cache", CacheError)
        self._context = context

    def __enter__(self) -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._context)
            pointer = super().__enter__()
            stack.pop_all()
        return pointer

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._context.__exit__(*exc)


class KVCache:
    """What MixedKVCache and UnifiedKVCache have in common.

    Tokens are added in two steps: find_slot() looks for places and commit() puts the tokens there. Ranges of positions
    are [p0, p1), a p1 of -1 means to the end. One thread uses a cache at a time, others wait. close() (or the end of a
    ``with`` block) frees it. After that everything raises CacheError.

    n_seq_max  sequences; their ids are 0 to n_seq_max - 1
    n_stream   1 when they share all cells (unified), else one per sequence
    """

    def __init__(self, handle: ExclusiveHandle, n_seq_max: int, n_pad: int, context: Context | None = None) -> None:
        self._handle = handle
        self._context = context
        self._first = Tier(handle, _HOT, n_pad)  # the only one, unless the cache is mixed
        self.n_seq_max = n_seq_max
        self.n_stream = self._first.n_stream

    @classmethod
    def from_model(cls, model: Model, *args: Any, **options: Any) -> Any:
        """A cache of its own that has the layers, the heads and the head sizes of a model.

        The rest is as for the constructor. Rows are not rotated, whatever the types.

        Raises ParamsError for a model whose layers are not alike, or have no KV cache.
        """
        arch = model.metadata.get("general.architecture", "")
        # the file has a list in place of a number when layers differ
        alike = model.n_head_kv == model.n_head or f"{arch}.attention.head_count_kv" in model.metadata
        if model.is_recurrent or not alike or 0 in (model.n_layer, model.n_head_kv):
            raise ParamsError(f"The layers of this model ({arch}) have no KV cache, or not all the same.")
        head_size_k, head_size_v = model.head_sizes()
        shape = {"n_layer": model.n_layer, "n_head_kv": model.n_head_kv}
        return cls(*args, **shape, head_size_k=head_size_k, head_size_v=head_size_v, **options)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache. Closing twice is fine."""
        self._handle.close()

    @contextlib.contextmanager
    def use(self) -> Iterator[tuple[Any, Any]]:
        """The C objects, ``struct llama_kv_mixed_cache *`` and ``llama_memory_t``, while no other thread has them."""
        with self._handle as cache:
            yield cache, lib.llama_kv_mixed_cache_get_memory(cache)

    #
    # tokens
    #

    def find_slot(self, ubatch: UBatch) -> tuple[int, ...]:
        """Look for places for the tokens of a ubatch, and remember them for commit().

        Returns a cell for each token; () when there are not enough, and nothing has changed then. No token is added and
        no position changes, but a mixed cache may move tokens from hot to cold to make room.

        Raises ParamsError for a ubatch that this cache can not take.
        """
        for ids in ubatch.seq_id:
            if ids[-1] >= self.n_seq_max:
                raise ParamsError(f"Sequence ids of the ubatch must be from 0 to {self.n_seq_max - 1}, not {ids[-1]}.")
            if self.n_stream > 1 and len(ids) > 1:
                raise ParamsError(f"The sequences {ids} share a token of the ubatch, and each has a stream of its own.")
        cells = ffi.new("uint32_t[]", max(1, ubatch.n_tokens))
        with self._handle as cache, ubatch.source.use(ubatch) as sbatch:
            code = lib.llama_kv_mixed_cache_find_slot(cache, sbatch, ubatch.index, cells)
            if code < 0:
                raise ParamsError(f"The ubatch can not be placed: {_reason()}.")
        return tuple(cells) if code == 0 else ()

    def commit(self) -> None:
        """Add the tokens that find_slot() found places for.

        A mixed cache then moves older tokens to cold when hot use has passed the threshold. Rows are written
        afterwards, with set_k() and set_v().

        Raises CacheError when there is nothing to commit, or the places have been taken since.
        """
        with self._handle as cache:
            _check(lib.llama_kv_mixed_cache_commit(cache))

    def rollback(self) -> None:
        """Forget what find_slot() found. Raises CacheError when that is nothing."""
        with self._handle as cache:
            _check(lib.llama_kv_mixed_cache_rollback(cache))

    #
    # sequences
    #

    def clear(self) -> None:
        """Remove all tokens and zero the rows."""
        with self._changing() as (_, memory):
            lib.llama_memory_clear(memory, True)

    def seq_rm(self, seq_id: int = -1, p0: int = 0, p1: int = -1) -> None:
        """Remove positions of one sequence, or of all (-1)."""
        check_int(seq_id, "seq_id", -1, self.n_seq_max - 1)
        p0, p1 = _range(p0, p1)
        with self._changing() as (_, memory):
            lib.llama_memory_seq_rm(memory, seq_id, p0, p1)

    def seq_cp(self, seq_id_src: int, seq_id_dst: int, p0: int = 0, p1: int = -1) -> None:
        """Make positions of one sequence positions of another too, which must not have any in that range.

        Unified, the two share the cells then. When every sequence has its own stream, only whole sequences can be
        copied, and to an empty one.
        """
        self._seq(seq_id_src, "seq_id_src")
        self._seq(seq_id_dst, "seq_id_dst")
        p0, p1 = _range(p0, p1)
        if seq_id_src == seq_id_dst:
            return
        with self._changing() as (cache, memory):
            dst_min = lib.llama_memory_seq_pos_min(memory, seq_id_dst)
            dst_max = lib.llama_memory_seq_pos_max(memory, seq_id_dst)
            if self.n_stream == 1:
                if dst_max >= p0 and (p1 < 0 or dst_min < p1):
                    raise ParamsError(f"seq_id_dst {seq_id_dst} has positions in that range; remove them first.")
                lib.llama_memory_seq_cp(memory, seq_id_src, seq_id_dst, p0, p1)
                return
            if p0 > 0 or 0 <= p1 <= lib.llama_memory_seq_pos_max(memory, seq_id_src):
                raise ParamsError("p0 and p1 must be all of the sequence: a part can not be copied to another stream.")
            if dst_max >= 0:
                raise ParamsError(f"seq_id_dst {seq_id_dst} must be empty to be copied to; remove it first.")
            lib.llama_memory_seq_cp(memory, seq_id_src, seq_id_dst, -1, -1)
            if isinstance(self, UnifiedKVCache):  # a plain cache leaves the rows to the next decode, and there is none
                self.tier.copy_stream(cache, seq_id_src, seq_id_dst)

    def seq_keep(self, seq_id: int) -> None:
        """Remove all other sequences."""
        self._seq(seq_id, "seq_id")
        with self._changing() as (_, memory):
            lib.llama_memory_seq_keep(memory, seq_id)
            if self.n_stream > 1:  # that was this sequence's stream only
                for other in set(range(self.n_seq_max)) - {seq_id}:
                    lib.llama_memory_seq_rm(memory, other, -1, -1)

    def seq_add(self, seq_id: int, p0: int, p1: int, delta: int) -> None:
        """Move positions by ``delta``; those that come out below 0 are removed.

        Cells that sequences share move in all of them.
        """
        self._seq(seq_id, "seq_id")
        p0, p1 = _range(p0, p1)
        check_int(delta, "delta", -_POS_MAX, _POS_MAX)
        with self._changing() as (_, memory):
            if lib.llama_memory_seq_pos_max(memory, seq_id) + delta >= _POS_MAX:
                raise ParamsError(f"delta moves positions of sequence {seq_id} beyond {_POS_MAX}.")
            lib.llama_memory_seq_add(memory, seq_id, p0, p1, delta)

    def seq_div(self, seq_id: int, p0: int, p1: int, d: int) -> None:
        """Divide positions by ``d``, rounding down. Cells that sequences share move in all of them."""
        self._seq(seq_id, "seq_id")
        p0, p1 = _range(p0, p1)
        check_int(d, "d", 1, _POS_MAX)
        with self._changing() as (_, memory):
            lib.llama_memory_seq_div(memory, seq_id, p0, p1, d)

    def seq_pos_min(self, seq_id: int = 0) -> int:
        """The smallest position of a sequence, -1: it is empty."""
        self._seq(seq_id, "seq_id")
        with self.use() as (_, memory):
            return int(lib.llama_memory_seq_pos_min(memory, seq_id))

    def seq_pos_max(self, seq_id: int = 0) -> int:
        """The largest position of a sequence, -1: it is empty."""
        self._seq(seq_id, "seq_id")
        with self.use() as (_, memory):
            return int(lib.llama_memory_seq_pos_max(memory, seq_id))

    #
    # state
    #

    def state_write(self, seq_id: int | None = None) -> bytes:
        """The tokens and rows as bytes, of one sequence or of all (None), in the library's own format."""
        seq_id = -1 if seq_id is None else self._seq(seq_id, "seq_id")
        with self._handle as cache:
            state = bytearray(_check(lib.llama_kv_mixed_cache_state_get(cache, seq_id, ffi.NULL, 0)))
            with ffi.from_buffer(state) as target:
                _check(lib.llama_kv_mixed_cache_state_get(cache, seq_id, target, len(state)))
        return bytes(state)

    def state_read(self, state: bytes, seq_id: int | None = None) -> None:
        """Bring back what state_write() gave, into one sequence or all of the cache (None), replacing what it holds.

        For one sequence a mixed cache may have to move tokens of others to cold.

        Raises CacheError for a state that this cache can not hold or that is damaged, before anything changes; where
        its rows are damaged or missing, what it was to replace is gone, and nothing of it is there.
        """
        seq_id = -1 if seq_id is None else self._seq(seq_id, "seq_id")
        try:
            source = ffi.from_buffer(state)
        except TypeError:
            raise ParamsError(f"state must be bytes, not {type(state).__name__}.") from None
        # source is released before an exception: its traceback may be kept, and freed in any order
        with source, self._changing() as (cache, _), error_lines() as errors:
            if lib.llama_kv_mixed_cache_state_set(cache, seq_id, source, len(source)) < 0:
                raise CacheError(f"The state can not be read: {errors.reason() or _reason()}.")

    def _seq(self, seq_id: Any, name: str) -> int:
        return check_int(seq_id, name, 0, self.n_seq_max - 1)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[tuple[Any, Any]]:
        with self.use() as objects:
            if self._context is not None:
                self._context.memory.note_loaded(None)  # it keeps track of sequences that may have gaps
            yield objects


class MixedKVCache(KVCache):
    """A cache whose newest tokens are hot and whose older ones are cold, of a bare shape: there are no weights.

    params                    how hot and cold are made; or its fields, such as ``hot=32, cold="q4_0"``
    n_layer                   layers
    n_head_kv                 K/V heads of a layer
    head_size_k, head_size_v  elements of a head, head_size_v=None: as many as head_size_k
    n_ctx                     tokens that a stream must be able to hold, 0: as many as hot and cold_size are
    n_seq_max                 sequences
    n_pad                     hot and cold_size must be multiples of this
    unified                   True: one stream for all sequences, False: one for each
    type_k, type_v            ggml types of hot rows: f16, bf16 or f32

    hot   the Tier of the newest tokens
    cold  the Tier of the older ones

    Raises ParamsError for what can not be made, with the reason.
    """

    hot: Tier
    cold: Tier

    def __init__(
        self,
        params: KVMixedParams | None = None,
        *,
        n_layer: int = 1,
        n_head_kv: int = 1,
        head_size_k: int = 64,
        head_size_v: int | None = None,
        n_ctx: int = 0,
        n_seq_max: int = 1,
        n_pad: int = 1,
        unified: bool = True,
        type_k: str = "f16",
        type_v: str = "f16",
        **options: Any,
    ) -> None:
        if params is not None and options:
            raise ParamsError(f"params and {', '.join(options)} can not be given together.")
        params = params or from_options(KVMixedParams, options)
        shape = _shape(n_layer, n_head_kv, head_size_k, head_size_v, n_ctx, n_seq_max, n_pad, unified, type_k, type_v)
        if n_ctx == 0 and params.cold_size == 0:
            raise ParamsError("n_ctx or cold_size must be at least 1.")
        self._open(_init(shape, params.to_c()), n_seq_max, n_pad)

    @classmethod
    def from_context(cls, context: Context) -> MixedKVCache:
        """The mixed cache of a context, which stays open as long as the context does.

        Rows are as the library keeps them: when the cold type is quantised and the head size is a multiple of 64, cold
        rows are rotated by a Hadamard matrix (K in blocks of the largest power of 2 that divides the head, V in blocks
        of 64). Tokens that are committed by hand have no rows until these are written.

        Raises ParamsError when the context's cache is a plain one.
        """
        with context._handle as c_context:
            pointer = lib.llama_kv_mixed_cache_from_context(c_context)
        if pointer == ffi.NULL:
            raise ParamsError(f"The cache can not be used: {_reason()}.")
        cache = cls.__new__(cls)
        cache._open(_ContextCacheHandle(pointer, context._handle), context.n_seq_max, 1, context)
        cache._check_layers()
        return cache

    def _check_layers(self) -> None:
        """A tier describes the rows of the first layer: the others must be like it."""
        stats = self.stats
        for tier, n_bytes in ((self.hot, stats.bytes_hot), (self.cold, stats.bytes_cold)):
            rows = tier.n_layer * tier.n_stream * tier.size * (tier.row_size_k + tier.row_size_v)
            if not rows <= n_bytes < rows + 2 * tier.n_layer * _SPARE_MAX:
                raise CacheError("The layers of this model have rows of different size.")

    def _open(self, handle: ExclusiveHandle, n_seq_max: int, n_pad: int, context: Context | None = None) -> None:
        KVCache.__init__(self, handle, n_seq_max, n_pad, context)
        self.hot = self._first
        self.cold = Tier(handle, _COLD, n_pad)

    def __repr__(self) -> str:
        return f"<MixedKVCache hot {self.hot!r} cold {self.cold!r}{' (closed)' if self._handle.closed else ''}>"

    def move_tokens_to_cold_cache(self, n: int, stream: int = 0) -> int:
        """Move the n oldest tokens of a stream that are not pinned.

        Returns how many were moved: fewer when cold is full, or there are no more.
        """
        check_int(n, "n", 0, _CELLS_MAX)
        check_int(stream, "stream", 0, self.n_stream - 1)
        with self._handle as cache:
            return _check(lib.llama_kv_mixed_cache_move_to_cold(cache, stream, n))

    @property
    def params(self) -> KVMixedParams:
        """The parameters in force."""
        c_params = _sized("struct llama_kv_mixed_params *")
        with self.use() as (_, memory):
            _check(lib.llama_kv_mixed_get_params(memory, c_params))
        return KVMixedParams.from_c(c_params)

    @property
    def stats(self) -> CacheStats:
        """What the cache holds and has done."""
        c_stats = _sized("struct llama_kv_mixed_stats *")
        with self.use() as (_, memory):
            _check(lib.llama_kv_mixed_get_stats(memory, c_stats))
        return CacheStats.from_c(c_stats)


class UnifiedKVCache(KVCache):
    """A plain cache of libllama, of a bare shape and of one type for all tokens.

    kv_size                   cells of a stream
    n_layer                   layers
    n_head_kv                 K/V heads of a layer
    head_size_k, head_size_v  elements of a head, head_size_v=None: as many as head_size_k
    n_seq_max                 sequences
    n_pad                     kv_size must be a multiple of this
    unified                   True: one stream for all sequences, False: one for each
    type_k, type_v            ggml types

    tier  the Tier of its tokens

    Raises ParamsError for what can not be made, with the reason.
    """

    tier: Tier

    def __init__(
        self,
        kv_size: int,
        *,
        n_layer: int = 1,
        n_head_kv: int = 1,
        head_size_k: int = 64,
        head_size_v: int | None = None,
        n_seq_max: int = 1,
        n_pad: int = 1,
        unified: bool = True,
        type_k: str = "f16",
        type_v: str = "f16",
    ) -> None:
        check_int(kv_size, "kv_size", 1, _CELLS_MAX)
        shape = _shape(n_layer, n_head_kv, head_size_k, head_size_v, kv_size, n_seq_max, n_pad, unified, type_k, type_v)
        if kv_size % n_pad != 0:
            raise ParamsError(f"kv_size must be a multiple of n_pad ({n_pad}), not {kv_size}.")
        super().__init__(_init(shape, ffi.NULL), n_seq_max, n_pad)
        self.tier = self._first

    def __repr__(self) -> str:
        return f"<UnifiedKVCache {self.tier!r}{' (closed)' if self._handle.closed else ''}>"


#
# helpers
#


def _shape(
    n_layer: int,
    n_head_kv: int,
    head_size_k: int,
    head_size_v: int | None,
    n_ctx: int,
    n_seq_max: int,
    n_pad: int,
    unified: bool,
    type_k: str,
    type_v: str,
) -> Any:
    """A ``struct llama_kv_mixed_shape *``. Raises ParamsError."""
    head_size_v = head_size_k if head_size_v is None else head_size_v
    shape = _sized("struct llama_kv_mixed_shape *")
    shape.n_layer = check_int(n_layer, "n_layer", 1, _N_LAYER_MAX)
    shape.n_head_kv = check_int(n_head_kv, "n_head_kv", 1, _HEADS_MAX)
    shape.n_embd_head_k = check_int(head_size_k, "head_size_k", 1, _HEADS_MAX // n_head_kv)
    shape.n_embd_head_v = check_int(head_size_v, "head_size_v", 1, _HEADS_MAX // n_head_kv)
    shape.n_ctx = check_int(n_ctx, "n_ctx", 0, _CELLS_MAX)
    shape.n_seq_max = check_int(n_seq_max, "n_seq_max", 1, _N_SEQ_MAX)
    shape.n_pad = check_int(n_pad, "n_pad", 1, _CELLS_MAX)
    if not isinstance(unified, bool):
        raise ParamsError(f"unified must be True or False, not {unified!r}.")
    shape.unified = unified
    for name, kv_type in (("type_k", type_k), ("type_v", type_v)):
        if not isinstance(kv_type, str) or kv_type not in KV_TYPES:
            raise ParamsError(f"{name} must be one of {', '.join(KV_TYPES)}, not {kv_type!r}.")
    shape.type_k = KV_TYPES[type_k]
    shape.type_v = KV_TYPES[type_v]
    return shape


def _init(shape: Any, c_params: Any) -> ExclusiveHandle:
    pointer = lib.llama_kv_mixed_cache_init(shape, c_params)
    if pointer == ffi.NULL:
        raise ParamsError(f"The cache can not be made: {_reason()}.")
    return ExclusiveHandle(pointer, lib.llama_kv_mixed_cache_free, None, "cache", CacheError)


def _sized(c_type: str) -> Any:
    """A new struct that carries its size."""
    struct = ffi.new(c_type)
    struct.struct_size = ffi.sizeof(struct[0])
    return struct


def _range(p0: Any, p1: Any) -> tuple[int, int]:
    return max(check_int(p0, "p0", -1, _POS_MAX), 0), check_int(p1, "p1", -1, _POS_MAX)


def _check(result: int, error: type[LlamamixError] = CacheError) -> int:
    if result < 0:
        raise error(f"The cache can not be used like this: {_reason()}.", result)
    return int(result)


def _reason() -> str:
    return ffi.string(lib.llama_kv_mixed_last_error()).decode("utf-8", "replace").rstrip(".")
