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
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ._ffi import error_lines, ffi, last_error, lib, sized
from ._fork import check_threads, note_threads
from ._handle import ExclusiveHandle
from .errors import CacheError, ParamsError
from .formats import FORMATS
from .held import Held
from .params import N_LAYER_MAX, N_SEQ_MAX, KVMixedParams, check_int, from_options
from .sbatch import UBatch
from .sequences import Sequences
from .stats import CacheStats
from .tier import Tier, checked

if TYPE_CHECKING:
    from typing_extensions import Self

    from .context import Context
    from .model import Model

_HEADS_MAX = 2**16  # heads of a layer, and elements of a head
_CELLS_MAX = 10**9 - 1
_SPARE_MAX = 1024  # bytes that a backend adds to a tensor

# that move rows where there is no context: the processors, at most GGML_DEFAULT_N_THREADS
_N_THREADS = min(os.cpu_count() or 1, 4)

_HOT, _COLD = 0, 1


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

    @contextlib.contextmanager
    def glance(self) -> Iterator[Any]:
        with self._context.glance() as context, super().glance() as pointer:
            yield None if context is None else pointer


class KVCache(Sequences):
    """What MixedKVCache and UnifiedKVCache have in common.

    Tokens are added in two steps: find_slot() looks for places and commit() puts the tokens there. Ranges of positions
    are [p0, p1), a ``p1`` of -1 means to the end. One thread uses a cache at a time, others wait. close() (or the end
    of a ``with`` block) frees it. After that everything raises CacheError.

    Attributes:
        n_seq_max (int): Sequences; their ids are 0 to ``n_seq_max - 1``.
        n_stream (int): 1 when they share all cells (unified), else one per sequence.
    """

    _error = CacheError

    def __init__(self, handle: ExclusiveHandle, n_seq_max: int, n_pad: int, context: Context | None = None) -> None:
        self._handle = handle
        self._context = context
        self._first = Tier(handle, _HOT, n_pad)  # the only one, unless the cache is mixed
        known = None if context is None else context.memory
        held = known.held if known else Held()
        super().__init__(n_seq_max, self._first.n_stream, known is not None and known.has_multi_pos, held)

    @classmethod
    def from_model(cls, model: Model, *args: Any, **options: Any) -> Self:
        """A cache of its own that has the layers, the heads and the head sizes of a model.

        Rows are not rotated, whatever the types.

        Args:
            model: The model.
            *args: As for the constructor.
            **options: As for the constructor, but for the shape.

        Raises:
            ParamsError: For a model whose layers are not alike, or have no KV cache, and like the constructor.
        """
        arch = model.metadata.get("general.architecture", "")
        # the file has a list in place of a number when layers differ
        alike = model.n_head_kv == model.n_head or f"{arch}.attention.head_count_kv" in model.metadata
        if model.is_recurrent or not alike or 0 in (model.n_layer, model.n_head_kv):
            raise ParamsError(f"The layers of this model ({arch}) have no KV cache, or not all the same.")
        head_size_k, head_size_v = model.head_sizes()
        shape = {"n_layer": model.n_layer, "n_head_kv": model.n_head_kv}
        make: Any = cls  # the constructors of the subclasses
        cache: Self = make(*args, **shape, head_size_k=head_size_k, head_size_v=head_size_v, **options)
        return cache

    def __enter__(self) -> Self:
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

    @contextlib.contextmanager
    def use_memory(self) -> Iterator[Any]:
        """The ``llama_memory_t``, while no other thread has it."""
        with self.use() as (_, memory):
            yield memory

    #
    # tokens
    #

    def find_slot(self, ubatch: UBatch) -> tuple[int, ...]:
        """Look for places for the tokens of a ubatch, and remember them for commit().

        No token is added and no position changes, but a mixed cache may move tokens from hot to cold to make room.

        Args:
            ubatch: What an SBatch was split into.

        Returns:
            A cell (of hot) for each token; ``()`` when there are not enough, and nothing has changed then.

        Raises:
            ParamsError: For a ubatch that this cache can not take.
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
                raise ParamsError(f"The ubatch can not be placed: {last_error()}.")
        return tuple(cells) if code == 0 else ()

    def commit(self) -> None:
        """Add the tokens that find_slot() found places for.

        A mixed cache then moves older tokens to cold when hot use has passed the threshold. Rows are written
        afterwards, with [set_k()][llamamix.Tier.set_k] and [set_v()][llamamix.Tier.set_v].

        Raises:
            CacheError: When there is nothing to commit, or the places have been taken since.
        """
        with self._handle as cache:
            checked(lib.llama_kv_mixed_cache_commit(cache))
            self.note_loaded(None)  # the positions were anybody's choice

    def rollback(self) -> None:
        """Forget what find_slot() found.

        Raises:
            CacheError: When that is nothing.
        """
        with self._handle as cache:
            checked(lib.llama_kv_mixed_cache_rollback(cache))

    #
    # state
    #

    def state_save(self, seq_id: int | None = None) -> bytes:
        """The tokens and rows as bytes, in the library's own format, which belongs to its version.

        Args:
            seq_id: One sequence; None: all.

        Raises:
            ParamsError: For a sequence that there is not.
            CacheError: When it can not be saved.
        """
        seq_id = -1 if seq_id is None else self._seq(seq_id, "seq_id")
        with self._handle as cache:
            state = bytearray(checked(lib.llama_kv_mixed_cache_state_get(cache, seq_id, ffi.NULL, 0)))
            with ffi.from_buffer(state) as target:
                checked(lib.llama_kv_mixed_cache_state_get(cache, seq_id, target, len(state)))
        return bytes(state)

    def state_load(self, state: bytes, seq_id: int | None = None) -> None:
        """Bring back what state_save() gave, in place of what the cache holds.

        For one sequence a mixed cache may have to move tokens of others to cold.

        Args:
            state: The bytes.
            seq_id: The sequence that takes the state of one sequence; None: the state is that of all.

        Raises:
            ParamsError: For what are no bytes, and for a sequence that there is not.
            CacheError: For a state that this cache can not hold or that is damaged. A mixed cache is as it was then, a
                plain one may have lost what was to be replaced.
        """
        seq_id = -1 if seq_id is None else self._seq(seq_id, "seq_id")
        try:
            source = ffi.from_buffer(state)
        except TypeError:
            raise ParamsError(f"state must be bytes, not {type(state).__name__}.") from None
        # source is released before an exception: its traceback may be kept, and freed in any order
        with source, self._handle as cache, error_lines() as errors:
            self.note_loaded(None if seq_id < 0 else seq_id)
            if lib.llama_kv_mixed_cache_state_set(cache, seq_id, source, len(source)) < 0:
                raise CacheError(f"The state can not be loaded: {errors.reason() or last_error()}.")

    def state_write(self, seq_id: int | None = None) -> bytes:
        """The old name of state_save(), which goes with the next release."""
        warnings.warn("state_write() is called state_save() now.", DeprecationWarning, stacklevel=2)
        return self.state_save(seq_id)

    def state_read(self, state: bytes, seq_id: int | None = None) -> None:
        """The old name of state_load(), which goes with the next release."""
        warnings.warn("state_read() is called state_load() now.", DeprecationWarning, stacklevel=2)
        self.state_load(state, seq_id)


class MixedKVCache(KVCache):
    """A cache whose newest tokens are hot and whose older ones are cold, of a bare shape: there are no weights.

    See [the cache, in words](../cache.md).

    Args:
        params: How hot and cold are made; None: by ``options``.
        n_layer: Layers, 1 to 512.
        n_head_kv: K/V heads of a layer.
        head_size_k: Elements of a K head.
        head_size_v: Elements of a V head; None: as many as ``head_size_k``.
        n_ctx: Tokens that a stream must be able to hold; 0: as many as ``hot`` and ``cold_size`` are.
        n_seq_max: Sequences, 1 to 256.
        n_pad: ``hot`` and ``cold_size`` must be multiples of this.
        unified: True: one stream for all sequences; False: one for each.
        type_k: ggml type of hot rows of K: "f16", "bf16" or "f32".
        type_v: The same of V.
        **options: Fields of [KVMixedParams][llamamix.KVMixedParams], such as ``hot=32, cold="q4_0"``, in place of
            ``params``.

    Attributes:
        hot (Tier): The newest tokens.
        cold (Tier): The older ones.
        n_stream (int): 1 when all sequences share all cells, else one per sequence.

    Raises:
        ParamsError: For what can not be made, with the reason.
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

        Args:
            context: A context whose cache is a mixed one.

        Raises:
            ParamsError: When the context's cache is a plain one.
            CacheError: When the rows of its layers are of different size.
        """
        with context._handle as c_context:
            pointer = lib.llama_kv_mixed_cache_from_context(c_context)
        if pointer == ffi.NULL:
            raise ParamsError(f"The cache can not be used: {last_error()}.")
        cache = cls.__new__(cls)
        cache._open(_ContextCacheHandle(pointer, context._handle), context.n_seq_max, 1, context)
        cache._check_layers()
        return cache

    def _check_layers(self) -> None:
        """A tier describes the rows of the first layer: the others must be like it."""
        stats = self.stats
        for tier, n_bytes in ((self.hot, stats.bytes_hot), (self.cold, stats.bytes_cold)):
            rows = tier.n_layer * tier.n_stream * tier.size * (tier.row_size_k + tier.row_size_v)
            rows += tier.n_layer * tier.n_stream * tier.n_page * 2 * tier.n_head_kv * tier.head_size_k
            if not rows <= n_bytes < rows + 3 * tier.n_layer * _SPARE_MAX:
                raise CacheError("The layers of this model have rows of different size.")

    def _open(self, handle: ExclusiveHandle, n_seq_max: int, n_pad: int, context: Context | None = None) -> None:
        KVCache.__init__(self, handle, n_seq_max, n_pad, context)
        self.hot = self._first
        self.cold = Tier(handle, _COLD, n_pad)

    def _repr_html_(self) -> str:
        """The cells in use and the memory, for notebooks."""
        return f"<pre>{self!r}</pre>" if self._handle.closed else self.stats._repr_html_()

    def __repr__(self) -> str:
        return f"<MixedKVCache hot {self.hot!r} cold {self.cold!r}{' (closed)' if self._handle.closed else ''}>"

    def move_tokens_to_cold_cache(self, n: int, stream: int = 0) -> int:
        """Move the oldest tokens of a stream that are not pinned.

        Args:
            n: How many.
            stream: The stream.

        Returns:
            How many were moved: fewer when cold is full, or there are no more.

        Raises:
            ParamsError: For an argument out of bounds.
            CacheError: When they can not be copied; nothing has changed then.
        """
        check_int(n, "n", 0, _CELLS_MAX)
        check_int(stream, "stream", 0, self.n_stream - 1)
        with self._handle as cache:
            return checked(lib.llama_kv_mixed_cache_move_to_cold(cache, stream, n))

    @property
    def params(self) -> KVMixedParams:
        """The parameters in force."""
        c_params = sized("struct llama_kv_mixed_params *")
        with self.use_memory() as memory:
            checked(lib.llama_kv_mixed_get_params(memory, c_params))
        return KVMixedParams.from_c(c_params)

    @property
    def stats(self) -> CacheStats:
        """What the cache holds and has done."""
        c_stats = sized("struct llama_kv_mixed_stats *")
        with self.use_memory() as memory:
            checked(lib.llama_kv_mixed_get_stats(memory, c_stats))
        return CacheStats.from_c(c_stats)


class UnifiedKVCache(KVCache):
    """A plain cache of libllama, of a bare shape and of one type for all tokens.

    Args:
        kv_size: Cells of a stream.
        n_layer: Layers, 1 to 512.
        n_head_kv: K/V heads of a layer.
        head_size_k: Elements of a K head.
        head_size_v: Elements of a V head; None: as many as ``head_size_k``.
        n_seq_max: Sequences, 1 to 256.
        n_pad: ``kv_size`` must be a multiple of this.
        unified: True: one stream for all sequences; False: one for each.
        type_k: ggml type of rows of K, see [FORMATS][llamamix.formats.FORMATS].
        type_v: The same of V.

    Attributes:
        tier (Tier): Its tokens.
        n_stream (int): 1 when all sequences share all cells, else one per sequence.

    Raises:
        ParamsError: For what can not be made, with the reason.
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

    def _copy_rows(self, src: int, dst: int) -> None:
        self.tier.copy_stream(self._handle.pointer, src, dst)

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
    shape = sized("struct llama_kv_mixed_shape *")
    shape.n_layer = check_int(n_layer, "n_layer", 1, N_LAYER_MAX)
    shape.n_head_kv = check_int(n_head_kv, "n_head_kv", 1, _HEADS_MAX)
    shape.n_embd_head_k = check_int(head_size_k, "head_size_k", 1, _HEADS_MAX // n_head_kv)
    shape.n_embd_head_v = check_int(head_size_v, "head_size_v", 1, _HEADS_MAX // n_head_kv)
    shape.n_ctx = check_int(n_ctx, "n_ctx", 0, _CELLS_MAX)
    shape.n_seq_max = check_int(n_seq_max, "n_seq_max", 1, N_SEQ_MAX)
    shape.n_pad = check_int(n_pad, "n_pad", 1, _CELLS_MAX)
    if not isinstance(unified, bool):
        raise ParamsError(f"unified must be True or False, not {unified!r}.")
    shape.unified = unified
    for name, kv_type in (("type_k", type_k), ("type_v", type_v)):
        if not isinstance(kv_type, str) or kv_type not in FORMATS:
            raise ParamsError(f"{name} must be one of {', '.join(FORMATS)}, not {kv_type!r}.")
    shape.type_k = FORMATS[type_k].type
    shape.type_v = FORMATS[type_v].type
    return shape


def _init(shape: Any, c_params: Any) -> ExclusiveHandle:
    if c_params != ffi.NULL:  # it will move rows
        check_threads(_N_THREADS, CacheError)
        note_threads(_N_THREADS)
    pointer = lib.llama_kv_mixed_cache_init(shape, c_params)
    if pointer == ffi.NULL:
        raise ParamsError(f"The cache can not be made: {last_error()}.")
    return ExclusiveHandle(pointer, lib.llama_kv_mixed_cache_free, None, "cache", CacheError)
