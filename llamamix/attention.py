"""Attention over the rows of a mixed KV cache on the CPU: the library's own kernel, and ggml's to compare it with.

    out = attention(q, cold=(k4, v4), hot=(k16, v16), types=("q4_0", "f16"))

What arrays look like is written at attention().
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import ggml
from ._ffi import ffi, last_error, lib, sized
from ._fork import check_process, check_threads, note_threads
from .errors import LlamamixError, ParamsError
from .formats import FORMATS
from .params import N_THREADS_MAX, PAGE, check_float, check_int

Rows = tuple[np.ndarray, np.ndarray]
"""Rows of K and of V."""

Type = str | tuple[str, str]
"""Name of a ggml type, or of one for K and one for V."""


def isas() -> tuple[str, ...]:
    """The instruction sets that the kernel can use on this machine, best first."""
    return tuple(ffi.string(lib.llama_kv_mixed_attn_isas()).decode().split())


def attention(
    q: np.ndarray,
    cold: Rows | None = None,
    hot: Rows | None = None,
    *,
    types: tuple[Type, Type],
    mask: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    scale: float | None = None,
    logit_softcap: float = 0.0,
    max_bias: float = 0.0,
    n_rot: tuple[int, int] = (0, 0),
    means: np.ndarray | None = None,
    v_skip: float = 0.0,
    n_threads: int = 1,
    isa: str | None = None,
) -> np.ndarray:
    """softmax(scale Q K^T + mask) V over cold and hot rows, by the library's own kernel.

    Arrays have the contiguous dimension last; all others may have any stride.

    Args:
        q: Queries, float32 of shape [n_stream, n_tokens, n_head, n_embd_k].
        cold: Rows of K and of V, each of shape [n_stream, n_kv, n_head_kv, n_embd]: float32 for f32, float16 for f16,
            the bits as uint16 for bf16. The rows of quantised types are their bytes, uint8, with ``row_size(type,
            n_embd)`` in place of n_embd. None: there are no cold rows.
        hot: The same of hot rows. Not both can be None.
        types: ggml types of the cold and of the hot rows, each one name or one for K and one for V.
        mask: float32 or float16 of shape [n_stream, n_tokens, n_kv], cold cells before hot ones; None: every token sees
            every cell.
        sinks: float32 of shape [n_head]: a logit of every head that only adds to the softmax's denominator; None: none.
        scale: Multiplies the scores; None: 1 / sqrt(n_embd_k).
        logit_softcap: Scores are capped to softcap * tanh(score / softcap); 0: they are not.
        max_bias: ALiBi: heads multiply the mask by slopes up to 2**-(max_bias / n_head) ([Press et al.
            2021](https://arxiv.org/abs/2108.12409)); 0: by 1.
        n_rot: Cold rows of K and of V are rotated by the orthonormal Walsh-Hadamard matrix, in blocks of so many
            values: a power of 2 from 16 that divides the head; 0: they are not. The result is that of rows rotated
            back.
        means: float16 of shape [n_stream, n_page, n_head_kv, n_embd_k]: what is added to the cold rows of K, page by
            page of 128 cells, in the basis of the rows; None: nothing is.
        v_skip: The share of a query's weights that cold cells may have together whose V is left unread: each has no more
            than v_skip/n_kv of the query's total, n_kv being all cells, hot and cold. For up to 16 queries to a KV head,
            with cold rows of whole blocks of 32 values, and where there are more tiles of 128 cold cells than of hot ones,
            and some of these; 0: all is read.
        n_threads: Threads, 1 to 512.
        isa: One of isas(); None: the best.

    Returns:
        float32 of shape [n_stream, n_tokens, n_head, n_embd_v].

    Raises:
        ParamsError: For arguments that can not be used or do not fit together.
    """
    return Attention(
        q, cold, hot, types=types, mask=mask, sinks=sinks, scale=scale, logit_softcap=logit_softcap, max_bias=max_bias,
        n_rot=n_rot, means=means, v_skip=v_skip,
    ).compute(n_threads, isa)  # fmt: skip


class Attention:
    """The arguments of attention(), checked once, to compute with again and again. Arrays are used where they are.

    Args:
        q: Queries, float32 of shape [n_stream, n_tokens, n_head, n_embd_k].
        cold: Rows of K and of V, each of shape [n_stream, n_kv, n_head_kv, n_embd]: float32 for f32, float16 for f16,
            the bits as uint16 for bf16. The rows of quantised types are their bytes, uint8, with ``row_size(type,
            n_embd)`` in place of n_embd. None: there are no cold rows.
        hot: The same of hot rows. Not both can be None.
        types: ggml types of the cold and of the hot rows, each one name or one for K and one for V.
        mask: float32 or float16 of shape [n_stream, n_tokens, n_kv], cold cells before hot ones; None: every token sees
            every cell.
        sinks: float32 of shape [n_head]: a logit of every head that only adds to the softmax's denominator; None: none.
        scale: Multiplies the scores; None: 1 / sqrt(n_embd_k).
        logit_softcap: Scores are capped to softcap * tanh(score / softcap); 0: they are not.
        max_bias: ALiBi: heads multiply the mask by slopes up to 2**-(max_bias / n_head) ([Press et al.
            2021](https://arxiv.org/abs/2108.12409)); 0: by 1.
        n_rot: Cold rows of K and of V are rotated by the orthonormal Walsh-Hadamard matrix, in blocks of so many
            values: a power of 2 from 16 that divides the head; 0: they are not. The result is that of rows rotated
            back.
        means: float16 of shape [n_stream, n_page, n_head_kv, n_embd_k]: what is added to the cold rows of K, page by
            page of 128 cells, in the basis of the rows; None: nothing is.
        v_skip: The share of a query's weights that cold cells may have together whose V is left unread: each has no more
            than v_skip/n_kv of the query's total, n_kv being all cells, hot and cold. For up to 16 queries to a KV head,
            with cold rows of whole blocks of 32 values, and where there are more tiles of 128 cold cells than of hot ones,
            and some of these; 0: all is read.

    Raises:
        ParamsError: For arguments that can not be used or do not fit together.
    """

    def __init__(
        self,
        q: np.ndarray,
        cold: Rows | None = None,
        hot: Rows | None = None,
        *,
        types: tuple[Type, Type],
        mask: np.ndarray | None = None,
        sinks: np.ndarray | None = None,
        scale: float | None = None,
        logit_softcap: float = 0.0,
        max_bias: float = 0.0,
        n_rot: tuple[int, int] = (0, 0),
        means: np.ndarray | None = None,
        v_skip: float = 0.0,
    ) -> None:
        q = _array("q", q, ("float32",), 4)
        n_stream, n_tokens, n_head, n_embd_k = q.shape
        if 0 in q.shape:
            raise ParamsError(f"q must not be empty, as {list(q.shape)} is.")
        segments = [_segment(*x) for x in zip(("cold", "hot"), (cold, hot), _types(types), strict=True)]
        found = [s for s in segments if s is not None]
        if not found:
            raise ParamsError("cold and hot must not both be None.")
        n_head_kv, n_embd_v = found[0].n_head_kv, found[0].n_embd_v
        n_kv = sum(s.n_kv for s in found)
        for s in found:
            want = (n_stream, n_head_kv, n_embd_k, n_embd_v)
            if (s.n_stream, s.n_head_kv, s.n_embd_k, s.n_embd_v) != want:
                raise ParamsError(
                    f"{s.name} must have {want[0]} streams, {want[1]} KV heads and heads of {want[2]} (K) and {want[3]}"
                    f" (V) values as q and the other rows have, not {s.n_stream}, {s.n_head_kv}, {s.n_embd_k} and"
                    f" {s.n_embd_v}."
                )
        if n_head_kv < 1 or n_head % n_head_kv != 0:
            raise ParamsError(f"q must have a multiple of {n_head_kv} heads, not {n_head}.")
        if mask is not None:
            mask = _array("mask", mask, ("float32", "float16"), 3)
            _check_shape("mask", mask, (n_stream, n_tokens, n_kv))
        if sinks is not None:
            sinks = np.ascontiguousarray(_array("sinks", sinks, ("float32",), 1))
            _check_shape("sinks", sinks, (n_head,))
        if means is not None:
            means = _array("means", means, ("float16",), 4)
            n_page = -(-segments[0].n_kv // PAGE) if segments[0] is not None else 0
            _check_shape("means", means, (n_stream, n_page, n_head_kv, n_embd_k))
        for name, value in (("logit_softcap", logit_softcap), ("max_bias", max_bias)):
            check_float(value, name, 0.0)
        if not 0 <= check_float(v_skip, "v_skip") < 1:
            raise ParamsError(f"v_skip must be from 0 to below 1, not {v_skip:g}.")
        if scale is not None:
            check_float(scale, "scale")
        if not isinstance(n_rot, tuple) or len(n_rot) != 2:
            raise ParamsError(f"n_rot must be a pair, the blocks of K and of V, not {n_rot!r}.")
        for n, n_embd in zip(n_rot, (n_embd_k, n_embd_v), strict=True):
            check_int(n, "n_rot", 0, n_embd)
            if n and (n < 16 or n & (n - 1) or n_embd % n):
                raise ParamsError(f"n_rot must be powers of 2 from 16 that divide the heads of {n_embd} values, not {n}.")

        self._out = np.empty((n_stream, n_tokens, n_head, n_embd_v), np.float32)
        # the arrays live as long as the pointers to them
        self._keep = (q, segments, mask, sinks, means)
        args = self._args = sized("struct llama_kv_mixed_attn_args *")
        args.n_embd_k, args.n_embd_v = n_embd_k, n_embd_v
        args.n_head, args.n_head_kv = n_head, n_head_kv
        args.n_tokens, args.n_stream = n_tokens, n_stream
        args.q = _pointer(q, "float *")
        args.nb_q = q.strides[2], q.strides[1], q.strides[0]
        for c_segment, segment in zip(args.seg, segments, strict=True):
            (segment or _Segment.empty(found[0])).to_c(c_segment)
        if mask is not None:
            args.mask = _pointer(mask, "void *")
            args.mask_f16 = mask.dtype == np.float16
            args.nb_mask = mask.strides[1], mask.strides[0]
        if means is not None:
            args.k_mean = _pointer(means, "void *")
            args.nb_k_mean = means.strides[2], means.strides[1], means.strides[0]
        if sinks is not None:
            args.sinks = _pointer(sinks, "float *")
        args.scale = 1 / math.sqrt(n_embd_k) if scale is None else scale
        args.logit_softcap = logit_softcap
        args.max_bias = max_bias
        args.n_rot_k, args.n_rot_v = n_rot
        args.v_skip = v_skip
        args.dst = _pointer(self._out, "float *")

    def compute(self, n_threads: int = 1, isa: str | None = None) -> np.ndarray:
        """Compute.

        Args:
            n_threads: Threads, 1 to 512.
            isa: One of isas(); None: the best.

        Returns:
            float32 of shape [n_stream, n_tokens, n_head, n_embd_v], an array that the next call overwrites.

        Raises:
            ParamsError: For an argument that can not be used.
        """
        check_int(n_threads, "n_threads", 1, N_THREADS_MAX)
        if isa is not None and isa not in isas():
            raise ParamsError(f"isa must be one of {', '.join(isas())} or None, not {isa!r}.")
        if lib.llama_kv_mixed_attn(self._args, n_threads, ffi.NULL if isa is None else isa.encode()) != 0:
            raise ParamsError(f"The kernel can not compute this: {last_error()}.")
        return self._out


class FlashAttnExt:
    """ggml_flash_attn_ext() over rows of one type, to compare with; a context manager.

    ggml keeps the rows: ``k`` and ``v`` are views of its memory, valid until close().

    Args:
        q: Like that of attention().
        k: Rows of K, like those of attention().
        v: Rows of V.
        types: ggml type of the rows, one name or one for K and one for V.
        mask: float16; it must be there with ``max_bias``.
        sinks: Like those of attention().
        scale: Like that of attention().
        logit_softcap: Like that of attention().
        max_bias: Like that of attention().
        n_threads: Threads, 1 to 512.

    Attributes:
        k (np.ndarray): Rows of K.
        v (np.ndarray): Rows of V.

    Raises:
        ParamsError: For arguments that can not be used or do not fit together.
    """

    def __init__(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        *,
        types: Type,
        mask: np.ndarray | None = None,
        sinks: np.ndarray | None = None,
        scale: float | None = None,
        logit_softcap: float = 0.0,
        max_bias: float = 0.0,
        n_threads: int = 1,
    ) -> None:
        # checks the arguments
        Attention(
            q, None, (k, v), types=(types, types), mask=mask, sinks=sinks, scale=scale, logit_softcap=logit_softcap,
            max_bias=max_bias,
        )  # fmt: skip
        check_int(n_threads, "n_threads", 1, N_THREADS_MAX)
        check_threads(n_threads, LlamamixError)
        self._n_threads, self._pid = n_threads, os.getpid()
        if mask is not None and mask.dtype != np.float16:
            raise ParamsError(f"mask must be float16 for ggml, not {mask.dtype}.")
        if mask is None and max_bias > 0:
            raise ParamsError("mask must not be None for ggml when there is a max_bias.")
        type_k, type_v = _pair(types)
        n_stream, n_tokens, n_head, n_embd_k = q.shape
        n_embd_v = v.shape[3] * v.itemsize // ggml.type_size(type_v) * ggml.blck_size(type_v)
        n_kv, n_head_kv = k.shape[1:3]
        if scale is None:
            scale = 1 / math.sqrt(n_embd_k)

        with contextlib.ExitStack() as stack:
            self._backend, ctx = None, None
            ctx, self._backend = stack.enter_context(ggml.graph(_N_NODES, n_threads))

            def tensor(type: str, *ne: int) -> Any:
                return lib.ggml_new_tensor(ctx, FORMATS[type].type, len(ne), ffi.new("int64_t[]", ne))

            def heads_last(t: Any) -> Any:  # [n_embd, heads, n, n_stream] to what ggml wants
                return lib.ggml_permute(ctx, t, 0, 2, 1, 3)

            t_q = tensor("f32", n_embd_k, n_head, n_tokens, n_stream)
            t_k = tensor(type_k, n_embd_k, n_head_kv, n_kv, n_stream)
            t_v = tensor(type_v, n_embd_v, n_head_kv, n_kv, n_stream)
            t_mask = ffi.NULL if mask is None else tensor("f16", n_kv, n_tokens, 1, n_stream)
            res = lib.ggml_flash_attn_ext(
                ctx, heads_last(t_q), heads_last(t_k), heads_last(t_v), t_mask, scale, max_bias, logit_softcap
            )
            sources = [(t_q, q), (t_k, k), (t_v, v), (t_mask, mask)]
            if sinks is not None:
                t_sinks = tensor("f32", n_head)
                lib.ggml_flash_attn_ext_add_sinks(res, t_sinks)
                sources.append((t_sinks, sinks))
            self._graph = lib.ggml_new_graph_custom(ctx, _N_NODES, False)
            lib.ggml_build_forward_expand(self._graph, res)
            stack.enter_context(ggml.buffer(ctx, self._backend))

            def view(t: Any, like: np.ndarray) -> np.ndarray:
                data = ffi.buffer(lib.ggml_get_data(t), like.nbytes)
                return np.frombuffer(data, like.dtype).reshape(like.shape)

            for t, array in sources:
                if array is not None:
                    view(t, array)[:] = array
            self.k: np.ndarray = view(t_k, k)
            self.v: np.ndarray = view(t_v, v)
            self._out = view(res, np.empty((n_stream, n_tokens, n_head, n_embd_v), np.float32))
            self._stack = stack.pop_all()

    def compute(self) -> np.ndarray:
        """Compute.

        Returns:
            float32 of shape [n_stream, n_tokens, n_head, n_embd_v], in memory that the next call overwrites and close()
                frees.

        Raises:
            LlamamixError: When ggml can not compute it.
        """
        check_process(self._pid, "graph", LlamamixError)
        note_threads(self._n_threads)
        status = lib.ggml_backend_graph_compute(self._backend, self._graph)
        if status != 0:
            raise LlamamixError("ggml could not compute flash attention.", status)
        return self._out

    def close(self) -> None:
        """Free the rows; a second call does nothing."""
        self._stack.close()

    def __enter__(self) -> FlashAttnExt:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_N_NODES = 12  # tensors of a graph, views included, and some to spare


#
# checks
#


class _Segment:
    """Rows of one cache."""

    def __init__(self, name: str, k: np.ndarray, v: np.ndarray, type_k: str, type_v: str) -> None:
        self.name, self.k, self.v, self.type_k, self.type_v = name, k, v, type_k, type_v
        self.n_stream, self.n_kv, self.n_head_kv = k.shape[:3]
        self.n_embd_k, self.n_embd_v = _n_embd(f"{name}'s K", k, type_k), _n_embd(f"{name}'s V", v, type_v)

    @classmethod
    def empty(cls, like: _Segment) -> _Segment:
        return cls("", like.k[:, :0], like.v[:, :0], like.type_k, like.type_v)

    def to_c(self, c_segment: Any) -> None:
        c_segment.k, c_segment.v = _pointer(self.k, "void *"), _pointer(self.v, "void *")
        c_segment.type_k, c_segment.type_v = FORMATS[self.type_k].type, FORMATS[self.type_v].type
        c_segment.n_kv = self.n_kv
        for name, array in (("nb_k", self.k), ("nb_v", self.v)):
            setattr(c_segment, name, (array.strides[2], array.strides[1], array.strides[0]))


def _segment(name: str, rows: Any, types: tuple[str, str]) -> _Segment | None:
    if rows is None:
        return None
    if not isinstance(rows, Sequence) or isinstance(rows, str) or len(rows) != 2:
        raise ParamsError(f"{name} must be a pair of arrays, K and V, or None.")
    k, v = (
        _array(f"{name}'s {what}", array, (ggml.dtype(type).name,), 4)
        for what, array, type in zip("KV", rows, types, strict=True)
    )
    if k.shape[:3] != v.shape[:3]:
        raise ParamsError(
            f"{name} must have K and V of as many streams, cells and heads, not {list(k.shape)} and {list(v.shape)}."
        )
    return _Segment(name, k, v, *types)


def _n_embd(name: str, array: np.ndarray, type: str) -> int:
    size, n_bytes = ggml.type_size(type), int(array.shape[3]) * array.itemsize
    if n_bytes == 0 or n_bytes % size != 0:
        raise ParamsError(f"{name} must have rows of whole {type} blocks of {size} bytes, not {n_bytes} bytes.")
    return n_bytes // size * ggml.blck_size(type)


def _types(types: Any) -> tuple[tuple[str, str], tuple[str, str]]:
    if not isinstance(types, tuple) or len(types) != 2:
        raise ParamsError(f"types must be a pair, the type of the cold and of the hot rows, not {types!r}.")
    return _pair(types[0]), _pair(types[1])


def _pair(type: Any) -> tuple[str, str]:
    k, v = type if isinstance(type, tuple) and len(type) == 2 else (type, type)
    ggml.type_size(k), ggml.type_size(v)  # refuses what is no type
    return k, v


def _array(name: str, array: Any, dtypes: tuple[str, ...], n_dims: int) -> np.ndarray:
    """The array itself, or a copy where it is not laid out as the kernel needs it."""
    if not isinstance(array, np.ndarray) or array.dtype.name not in dtypes or array.ndim != n_dims:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else repr(array)
        raise ParamsError(f"{name} must be a {' or '.join(dtypes)} array of {n_dims} dimensions, not {found}.")
    contiguous = array.shape[-1] <= 1 or array.strides[-1] == array.itemsize
    aligned = array.flags.aligned
    if array.dtype == np.uint8:  # ggml's blocks begin with an F16
        aligned = all(n % 2 == 0 for n in (array.ctypes.data, *array.strides[:-1]))
    if contiguous and aligned and array.dtype.isnative and min(array.strides) >= 0:
        return array
    return np.array(array, array.dtype.newbyteorder("="), order="C")


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ParamsError(f"{name} must be {list(shape)}, not {list(array.shape)}.")


def _pointer(array: np.ndarray, c_type: str) -> Any:
    return ffi.cast(c_type, array.ctypes.data)
