"""Copies between ggml's types, computed by ggml itself on the CPU.

    q = quantize(np.arange(128, dtype=np.float16), "q4_0")  # 72 bytes
    x = q.dequantize()                                      # float32 [128]

Types are those that a KV cache can have, see FORMATS.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._ffi import ffi, lib
from .errors import LlamamixError, ParamsError
from .formats import FORMATS

_N_ELEMENTS_MAX = 2**31 - 1  # ggml counts the elements of a copy in 32 bits
_N_DIMS_MAX = 4
_DEVICE_CPU = 0

# numpy has no bfloat16: its bits stand for it
_DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
}


#
# types
#


def is_quantized(type: str) -> bool:
    """True for types that store blocks of elements with a scale.

    Args:
        type: ggml's name of the type.

    Raises:
        ParamsError: For a type that a KV cache can not have.
    """
    return blck_size(type) > 1


def blck_size(type: str) -> int:
    """Elements in a block, 1 when the type is not quantised.

    Args:
        type: ggml's name of the type.

    Raises:
        ParamsError: For a type that a KV cache can not have.
    """
    return int(lib.ggml_blck_size(_number(type)))


def type_size(type: str) -> int:
    """Bytes of a block.

    Args:
        type: ggml's name of the type.

    Raises:
        ParamsError: For a type that a KV cache can not have.
    """
    return int(lib.ggml_type_size(_number(type)))


def row_size(type: str, n: int) -> int:
    """Bytes of a row.

    Args:
        type: ggml's name of the type.
        n: Elements of the row.

    Raises:
        ParamsError: When they are not whole blocks, and for a type that a KV cache can not have.
    """
    if isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 0:
        raise ParamsError(f"n must be a whole number of elements, not {n!r}.")
    block = blck_size(type)
    if n % block != 0:
        raise ParamsError(f"{type} stores blocks of {block} elements, which do not divide a row of {n}.")
    return int(n) // block * type_size(type)


def dtype(type: str) -> np.dtype[Any]:
    """Of the numpy array that holds a tensor's elements: their own, or uint8 for the bytes of quantised rows.

    Args:
        type: ggml's name of the type.

    Raises:
        ParamsError: For a type that a KV cache can not have.
    """
    _number(type)
    return _DTYPES.get(type, np.dtype(np.uint8))


def _number(type: Any) -> int:
    if not isinstance(type, str) or type not in FORMATS:
        raise ParamsError(f"type must be one of {', '.join(FORMATS)}, not {type!r}.")
    return FORMATS[type].type


#
# tensors
#


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """Elements of a ggml type. ``np.asarray(tensor)`` is ``data``.

    Args:
        type: ggml's name of the type.
        ne: 1 to 4 dimensions in ggml's order: the first is the contiguous one.
        data: The elements, a contiguous array whose shape is ``ne`` reversed, as numpy puts the contiguous dimension
            last: float32 for f32, float16 for f16, the bits as uint16 for bf16. Quantised rows are their bytes, uint8,
            with ``row_size(type, ne[0])`` in place of the last dimension.

    Raises:
        ParamsError: When the three do not fit together.
    """

    type: str
    ne: tuple[int, ...]
    data: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "ne", tuple(self.ne))
        shape = _shape(self.type, self.ne)
        data = self.data
        if not isinstance(data, np.ndarray) or data.dtype != dtype(self.type) or data.shape != shape:
            found = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else repr(data)
            raise ParamsError(
                f"data of {self.type} {list(self.ne)} must be {dtype(self.type)} {list(shape)}, not {found}."
            )
        if not data.flags.c_contiguous:
            raise ParamsError("data must be contiguous.")

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.data.nbytes

    def dequantize(self) -> np.ndarray:
        """The elements as float32, of the shape of ``ne`` reversed."""
        return cpy(self, "f32").data

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.data, dtype, copy=copy)

    def __repr__(self) -> str:
        return f"<Tensor {self.type} {list(self.ne)}>"


def _shape(type: str, ne: tuple[int, ...]) -> tuple[int, ...]:
    """Of the numpy array that holds a tensor's elements."""
    if not 1 <= len(ne) <= _N_DIMS_MAX:
        raise ParamsError(f"A tensor must have 1 to {_N_DIMS_MAX} dimensions, not {len(ne)}.")
    if any(isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 0 for n in ne):
        raise ParamsError(f"The dimensions of a tensor must be whole numbers, not {list(ne)}.")
    if math.prod(ne) > _N_ELEMENTS_MAX:
        raise ParamsError(f"A tensor must not have more than {_N_ELEMENTS_MAX} elements.")
    n_row = row_size(type, ne[0])
    return (*reversed(ne[1:]), n_row // dtype(type).itemsize)


def quantize(array: Any, type: str) -> Tensor:
    """Numbers as a tensor of any type; blocks run along the last dimension.

    Args:
        array: Numbers, of 1 to 4 dimensions. float16 and float32 are taken as they are, others as float32.
        type: ggml's name of the type.

    Raises:
        ParamsError: When the last dimension is not whole blocks, or a number to be quantised is not finite.
    """
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise ParamsError(f"The array must hold numbers, not {array.dtype}.")
    source = "f16" if array.dtype == np.float16 else "f32"
    array = np.array(array, _DTYPES[source], order="C")
    return cpy(Tensor(source, array.shape[::-1], array), type)


def cpy(src: Tensor, type: str) -> Tensor:
    """A copy in another type, by ggml_cpy.

    Args:
        src: f32, f16 and bf16 go to every type; what is quantised goes to f32 or stays what it is.
        type: ggml's name of the type.

    Raises:
        ParamsError: For other pairs, rows that are not whole blocks, and numbers to be quantised that are not finite.
    """
    if not isinstance(src, Tensor):
        raise ParamsError(f"src must be a Tensor, not {src!r}.")
    res = np.empty(_shape(type, src.ne), dtype(type))
    if is_quantized(src.type) and type not in ("f32", src.type):
        raise ParamsError(f"ggml copies {src.type} to f32 only, not to {type}: dequantize() comes first.")
    if is_quantized(type) and type != src.type and not np.isfinite(_values(src)).all():
        raise ParamsError(f"Numbers must be finite to be stored as {type}.")
    if res.size == 0:
        return Tensor(type, src.ne, res)
    with graph(_N_NODES) as (ctx, backend):
        ne = ffi.new("int64_t[]", src.ne)
        a, b = (lib.ggml_new_tensor(ctx, _number(t), len(src.ne), ne) for t in (src.type, type))
        copy = lib.ggml_new_graph_custom(ctx, _N_NODES, False)
        lib.ggml_build_forward_expand(copy, lib.ggml_cpy(ctx, a, b))
        with buffer(ctx, backend):
            lib.ggml_backend_tensor_set(a, ffi.from_buffer(src.data), 0, src.nbytes)
            status = lib.ggml_backend_graph_compute(backend, copy)
            if status != 0:
                raise LlamamixError(f"ggml could not copy {src.type} to {type}.", status)
            lib.ggml_backend_tensor_get(b, ffi.from_buffer(res), 0, res.nbytes)
    return Tensor(type, src.ne, res)


def _values(tensor: Tensor) -> np.ndarray:
    if tensor.type == "bf16":
        return (tensor.data.astype(np.uint32) << 16).view(np.float32)
    return tensor.data


#
# graphs
#

_N_NODES = 4  # the two tensors and the copy, and one to spare


@contextlib.contextmanager
def graph(n_nodes: int, n_threads: int = 1) -> Iterator[tuple[Any, Any]]:
    """A context for a graph of so many tensors, and a CPU backend with so many threads."""
    params = ffi.new("struct ggml_init_params *")
    params.mem_size = n_nodes * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(n_nodes, False)
    params.no_alloc = True
    ctx = lib.ggml_init(params[0])
    backend = lib.ggml_backend_init_by_type(_DEVICE_CPU, ffi.NULL)
    try:
        if ctx == ffi.NULL or backend == ffi.NULL:
            raise LlamamixError("ggml's CPU backend can not be used.")
        reg = lib.ggml_backend_dev_backend_reg(lib.ggml_backend_get_device(backend))
        set_n_threads = lib.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_set_n_threads")
        if set_n_threads != ffi.NULL:
            ffi.cast("void (*)(ggml_backend_t, int)", set_n_threads)(backend, n_threads)
        yield ctx, backend
    finally:
        lib.ggml_backend_free(backend)  # NULL is fine for both
        lib.ggml_free(ctx)


@contextlib.contextmanager
def buffer(ctx: Any, backend: Any) -> Iterator[None]:
    """Memory for the tensors of a context."""
    memory = lib.ggml_backend_alloc_ctx_tensors(ctx, backend)
    if memory == ffi.NULL:
        raise LlamamixError("There is no memory for the tensors.")
    try:
        yield
    finally:
        lib.ggml_backend_buffer_free(memory)
