"""The cells of a KV cache that is driven by hand, and their rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import ggml
from ._ffi import ffi, last_error, lib, sized
from ._handle import ExclusiveHandle
from .errors import CacheError, LlamamixError, ParamsError
from .formats import format_name
from .params import N_LAYER_MAX, check_int

_K, _V = 0, 1

_CELL = np.dtype([("pos", np.int32), ("shift", np.int32), ("seqs", np.uint64, 4)])


def checked(result: int, error: type[LlamamixError] = CacheError) -> int:
    """A return value of the cache's C interface; a negative one raises ``error`` with the reason."""
    if result < 0:
        raise error(f"The cache can not be used like this: {last_error()}.", result)
    return int(result)


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell in use.

    Attributes:
        index: Its number.
        pos: Position of its token.
        seq_ids: The sequences that have the token, ascending.
        shift: What seq_add() and seq_div() did to the position and the K row does not show yet.
    """

    index: int
    pos: int
    seq_ids: tuple[int, ...]
    shift: int = 0


class Tier:
    """Cells of one type and their K and V rows: ``cache.hot``, ``cache.cold``. A part of a cache, which it keeps open.

    Attributes:
        size (int): Cells per stream.
        n_stream (int): Streams: 1 when unified, else one per sequence.
        n_layer (int): Layers that have rows.
        type_k (str): ggml type of rows of K.
        type_v (str): ggml type of rows of V.
        n_head_kv (int): Heads of a row.
        head_size_k (int): Elements of a K head.
        head_size_v (int): Elements of a V head.
        row_size_k (int): Bytes of a row of K.
        row_size_v (int): Bytes of a row of V.
        n_pad (int): What cell counts are rounded up to.
        n_page (int): Pages of 128 cells per stream whose K rows are stored less their mean, see get_means(); 0: rows
            are stored as they are.
    """

    def __init__(self, handle: ExclusiveHandle, number: int, n_pad: int) -> None:
        info = sized("struct llama_kv_mixed_tier *")
        with handle as cache:
            checked(lib.llama_kv_mixed_cache_get_tier(cache, number, info))
        self._handle = handle
        self._number = number
        self.n_pad = n_pad
        self.size: int = int(info.size)
        self.n_stream: int = int(info.n_stream)
        self.n_layer: int = int(info.n_layer)
        self.type_k: str = format_name(info.type_k)
        self.type_v: str = format_name(info.type_v)
        self.n_head_kv: int = int(info.n_head_kv)
        self.head_size_k: int = int(info.n_embd_head_k)
        self.head_size_v: int = int(info.n_embd_head_v)
        self.row_size_k: int = int(info.row_size_k)
        self.row_size_v: int = int(info.row_size_v)
        self.n_page: int = int(info.n_page)

    def __repr__(self) -> str:
        with self._handle.glance() as cache:
            used = "" if cache is None else f"{self._used(cache)} in use, "
        return f"<Tier {self.n_stream} x {self.size} cells, {used}K {self.type_k}, V {self.type_v}>"

    @property
    def used(self) -> int:
        """Cells in use, all streams together."""
        with self._handle as cache:
            return self._used(cache)

    def n(self, stream: int = 0) -> int:
        """Cells in view: up to the last one in use, rounded up to a multiple of ``n_pad``; 0 when the stream is empty.

        Args:
            stream: The stream.

        Raises:
            ParamsError: For a stream that there is not.
        """
        self._stream(stream)
        with self._handle as cache:
            return self._n(cache, stream)

    def cells(self, stream: int = 0) -> list[Cell]:
        """The cells in use, by index.

        Args:
            stream: The stream.

        Raises:
            ParamsError: For a stream that there is not.
        """
        self._stream(stream)
        with self._handle as cache:
            cells = self._cells(cache, stream)
        return [
            Cell(int(i), int(cells["pos"][i]), _seq_ids(cells["seqs"][i]), int(cells["shift"][i]))
            for i in np.flatnonzero(cells["pos"] >= 0)
        ]

    def get_k(self, layer: int, stream: int | None = None) -> ggml.Tensor:
        """A copy of a layer's K rows in view.

        Args:
            layer: The layer, 0 to ``n_layer - 1``.
            stream: The stream; None: all.

        Returns:
            Rows with ggml's dimensions: ``ne`` is (head_size_k, n_head_kv, n, n_stream), n the largest n() of the
                streams. numpy counts them from the other end, so ``data[s, i, h]`` is what cell i of stream s has for
                head h: float16 for f16, the bytes of blocks for quantised types. ``dequantize()`` gives float32. Where
                there are means (``n_page``), rows are what is left without them.

        Raises:
            ParamsError: For a layer or a stream that there is not.
        """
        return self._get(_K, layer, stream)

    def get_v(self, layer: int, stream: int | None = None) -> ggml.Tensor:
        """A copy of a layer's V rows in view, like get_k(), with heads of ``head_size_v``.

        Args:
            layer: The layer, 0 to ``n_layer - 1``.
            stream: The stream; None: all.

        Raises:
            ParamsError: For a layer or a stream that there is not.
        """
        return self._get(_V, layer, stream)

    def get_means(self, layer: int, stream: int | None = None) -> np.ndarray:
        """The means of K in all pages of 128 cells.

        They are in the basis of the rows, which is that of rotated ones where rows are rotated: a row of cell i is what
        ``get_k()`` has of it, dequantised, plus the mean of page i // 128. Those of pages without tokens mean nothing.

        Args:
            layer: The layer, 0 to ``n_layer - 1``.
            stream: The stream; None: all.

        Returns:
            float16 of shape [n_stream, n_page, n_head_kv, head_size_k].

        Raises:
            ParamsError: Where there are none, or no such layer or stream.
        """
        check_int(layer, "layer", 0, N_LAYER_MAX - 1)
        streams = range(self.n_stream) if stream is None else [self._stream(stream)]
        if self.n_page == 0:
            raise ParamsError("These rows of K are stored as they are, there are no means.")
        means = np.empty((len(streams), self.n_page, self.n_head_kv, self.head_size_k), np.float16)
        with self._handle as cache:
            for part, s in zip(means, streams, strict=True):
                dst = ffi.from_buffer(part)
                checked(lib.llama_kv_mixed_cache_get_means(cache, layer, s, 0, self.n_page, dst), ParamsError)
        return means

    def set_means(self, layer: int, page: int, means: Any, stream: int = 0) -> None:
        """Write the means of K of pages. What rows of these pages stand for changes with it.

        Args:
            layer: The layer, 0 to ``n_layer - 1``.
            page: The first page.
            means: Numbers of shape [n, n_head_kv, head_size_k], stored as F16.
            stream: The stream.

        Raises:
            ParamsError: For arguments that can not be used; nothing is written then.
        """
        check_int(layer, "layer", 0, N_LAYER_MAX - 1)
        self._stream(stream)
        data = np.ascontiguousarray(means, np.float16)
        if data.ndim != 3 or data.shape[1:] != (self.n_head_kv, self.head_size_k) or len(data) == 0:
            raise ParamsError(
                f"means must be of shape [n, {self.n_head_kv}, {self.head_size_k}], not {list(data.shape)}."
            )
        check_int(page, "page", 0, max(0, self.n_page - len(data)))
        with self._handle as cache:
            src = ffi.from_buffer(data)
            checked(lib.llama_kv_mixed_cache_set_means(cache, layer, stream, page, len(data), src), ParamsError)

    def set_k(self, layer: int, cell: int, rows: Any, stream: int = 0) -> None:
        """Write K rows of a layer.

        Args:
            layer: The layer, 0 to ``n_layer - 1``.
            cell: The first cell.
            rows: Numbers of shape [n, n_head_kv, head_size_k], or [n_head_kv, head_size_k] for one row, which ggml
                converts to the tier's type; or a [Tensor][llamamix.ggml.Tensor] of that type with an ``ne`` of
                (head_size_k, n_head_kv, n).
            stream: The stream.

        Raises:
            ParamsError: For arguments that can not be used; nothing is written then.
        """
        self._set(_K, layer, cell, rows, stream)

    def set_v(self, layer: int, cell: int, rows: Any, stream: int = 0) -> None:
        """Write V rows of a layer, like set_k(), with heads of ``head_size_v``.

        Args:
            layer: The layer, 0 to ``n_layer - 1``.
            cell: The first cell.
            rows: Like those of set_k().
            stream: The stream.

        Raises:
            ParamsError: For arguments that can not be used; nothing is written then.
        """
        self._set(_V, layer, cell, rows, stream)

    def _used(self, cache: Any) -> int:
        return sum(int(np.count_nonzero(self._cells(cache, s)["pos"] >= 0)) for s in range(self.n_stream))

    def _stream(self, stream: Any) -> int:
        return check_int(stream, "stream", 0, self.n_stream - 1)

    def _cells(self, cache: Any, stream: int) -> np.ndarray:
        cells = np.empty(self.size, _CELL)
        c_cells = ffi.from_buffer("struct llama_kv_mixed_cell[]", cells)
        checked(lib.llama_kv_mixed_cache_get_cells(cache, self._number, stream, c_cells))
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
        check_int(layer, "layer", 0, N_LAYER_MAX - 1)
        streams = range(self.n_stream) if stream is None else [self._stream(stream)]
        with self._handle as cache:
            n = max(self._n(cache, s) for s in streams)
            rows = np.empty((len(streams), n, self.n_head_kv, row_size // self.n_head_kv), np.uint8)
            for part, s in zip(rows, streams, strict=True):
                dst = ffi.from_buffer(part)
                checked(lib.llama_kv_mixed_cache_get_rows(cache, self._number, layer, v, s, 0, n, dst), ParamsError)
        data = rows.view(ggml.dtype(type))
        return ggml.Tensor(type, (head_size, self.n_head_kv, n, len(streams)), data)

    def _set(self, v: int, layer: int, cell: int, rows: Any, stream: int) -> None:
        type, head_size, _ = self._rows(v)
        check_int(layer, "layer", 0, N_LAYER_MAX - 1)
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
            checked(lib.llama_kv_mixed_cache_set_rows(cache, self._number, layer, v, stream, cell, n, src), ParamsError)

    def copy_stream(self, cache: Any, src: int, dst: int) -> None:
        """Copy all rows of a stream to another one."""
        for v in (_K, _V):
            rows = ffi.new("uint8_t[]", self.size * self._rows(v)[2])
            for layer in range(self.n_layer):
                checked(lib.llama_kv_mixed_cache_get_rows(cache, self._number, layer, v, src, 0, self.size, rows))
                checked(lib.llama_kv_mixed_cache_set_rows(cache, self._number, layer, v, dst, 0, self.size, rows))


def _seq_ids(words: np.ndarray) -> tuple[int, ...]:
    return tuple(64 * i + bit for i, word in enumerate(words.tolist()) if word for bit in range(64) if word >> bit & 1)
