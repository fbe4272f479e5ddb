"""The shape of a model's KV cache, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelError
from .formats import FORMATS
from .gguf_file import GgufFile, path_bytes
from .params import PAGE, KVMixedParams

if TYPE_CHECKING:
    from .model import Model

_PAD = 256  # a context is a multiple of this, and so is the cache of sliding windows
_LOAD_MODE_NONE = 0
N_UBATCH = 512  # libllama's default: what that cache holds beyond a window


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token.

    n_head_kv    K/V heads
    head_size_k  elements of a K head
    head_size_v  elements of a V head, 0: the model keeps no V
    is_swa       only of the tokens in its sliding window
    """

    n_head_kv: int
    head_size_k: int
    head_size_v: int
    is_swa: bool = False

    def bytes_per_token(self, type_k: str, type_v: str) -> int:
        return self.n_head_kv * (_row_bytes(type_k, self.head_size_k) + _row_bytes(type_v, self.head_size_v))


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What decides the size of a KV cache.

    layers  those that keep K and V; recurrent ones do not, and their states are not counted
    n_swa   tokens in a sliding window, 0: no layer has one
    """

    arch: str
    n_ctx_train: int
    n_layer: int
    n_head: int
    layers: tuple[LayerShape, ...]
    n_swa: int = 0

    @classmethod
    def from_gguf(cls, path: Path) -> ModelShape:
        """Read it. Raises ModelError for what is no GGUF file of a language model.

        What its layers keep is what libllama makes of the file. Where it can not load it, the metadata has to do, and
        sliding windows count as if they were the whole context.
        """
        return cls.of(GgufFile(path), path)

    @classmethod
    def of(cls, file: GgufFile, path: Path) -> ModelShape:
        """The same of a file that is open."""

        def get(key: str, default: Any = None) -> Any:
            value = file.get(key)
            if value is None and default is None:
                raise ModelError(f"{path} has no {key}.")
            return default if value is None else value

        arch = get("general.architecture")
        n_layer = get(f"{arch}.block_count")
        n_head = get(f"{arch}.attention.head_count", 0)
        n_head_max = max(n_head) if isinstance(n_head, list) else n_head
        n_head_kv = get(f"{arch}.attention.head_count_kv", n_head)
        per_layer = n_head_kv if isinstance(n_head_kv, list) else [n_head_kv] * n_layer
        per_layer = per_layer[: n_layer - get(f"{arch}.attention.shared_kv_layers", 0)]
        default = get(f"{arch}.embedding_length") // n_head_max if n_head_max else 0
        has_v = file.get(f"{arch}.attention.key_length_mla") is None  # with MLA, V is a part of K
        size_k = get(f"{arch}.attention.key_length", default)
        size_v = get(f"{arch}.attention.value_length", default) if has_v else 0
        layers = tuple(LayerShape(n, size_k, size_v) for n in per_layer if n > 0)
        n_ctx_train = get(f"{arch}.context_length")
        n_swa = 0
        if file.n_tensors > 0:
            layers, n_swa = _loaded_layers(path) or (layers, 0)
        return cls(arch, n_ctx_train, n_layer, n_head_max, layers, n_swa)

    @classmethod
    def from_model(cls, model: Model) -> ModelShape:
        """Ask a model that is loaded, which takes no time."""
        pointer = model.handle().pointer
        arch = model.metadata.get("general.architecture", "")
        return cls(arch, model.n_ctx_train, model.n_layer, model.n_head, *_layers_of(pointer))

    @property
    def n_head_kv_max(self) -> int:
        return max((layer.n_head_kv for layer in self.layers), default=0)

    @property
    def head_size_k(self) -> int:
        """The largest of all layers."""
        return max((layer.head_size_k for layer in self.layers), default=0)

    @property
    def head_size_v(self) -> int:
        """The largest of all layers."""
        return max((layer.head_size_v for layer in self.layers), default=0)

    @property
    def mean_bytes(self) -> int:
        """Bytes of the means of a page of K, of all layers without a sliding window."""
        return sum(2 * layer.n_head_kv * layer.head_size_k for layer in self.layers if not layer.is_swa)

    def n_ctx_padded(self, n_ctx: int) -> int:
        """The context that libllama makes of the one asked for, 0: the one the model was trained with."""
        return -(-(n_ctx or self.n_ctx_train) // _PAD) * _PAD

    def kv_bytes_per_token(self, type_k: str, type_v: str | None = None) -> int:
        """Bytes that one more token takes: K and V of all layers without a sliding window.

        Raises ModelError when the type does not fit the heads.
        """
        return sum(layer.bytes_per_token(type_k, type_v or type_k) for layer in self.layers if not layer.is_swa)

    def swa_bytes(self, n_ctx: int, type_k: str, type_v: str | None = None, n_ubatch: int = N_UBATCH) -> int:
        """Bytes of the cache of sliding windows, a small one (swa_full=False), which has room for a ubatch as well."""
        n_cells = min(n_ctx, -(-(self.n_swa + n_ubatch) // _PAD) * _PAD)
        return n_cells * sum(layer.bytes_per_token(type_k, type_v or type_k) for layer in self.layers if layer.is_swa)

    def kv_bytes(self, n_ctx: int, type_k: str, type_v: str | None = None, n_ubatch: int = N_UBATCH) -> int:
        """Bytes of a plain KV cache."""
        return n_ctx * self.kv_bytes_per_token(type_k, type_v) + self.swa_bytes(n_ctx, type_k, type_v, n_ubatch)


def kv_bytes(shape: ModelShape, n_ctx: int, params: KVMixedParams) -> int:
    """Bytes of a mixed KV cache whose hot rows are F16, and of sliding windows beside it."""
    n_hot, n_cold = params.cells(n_ctx)
    cold = n_cold * shape.kv_bytes_per_token(params.type_cold_k, params.type_cold_v)
    if params.has_means:
        cold += -(-n_cold // PAGE) * shape.mean_bytes
    return n_hot * shape.kv_bytes_per_token("f16") + cold + shape.swa_bytes(n_ctx, "f16")


def _loaded_layers(path: Path) -> tuple[tuple[LayerShape, ...], int] | None:
    """What libllama says of the layers, and the size of their windows; None when it does not load the file."""
    from ._ffi import error_lines, ffi, lib

    c_params = lib.llama_model_default_params()
    c_params.no_alloc = True
    c_params.load_mode = _LOAD_MODE_NONE  # a mapped file can not be left out
    with error_lines():
        model = lib.llama_model_load_from_file(path_bytes(path), c_params)
    if model == ffi.NULL:
        return None
    try:
        return _layers_of(model)
    finally:
        lib.llama_model_free(model)


def _layers_of(model: Any) -> tuple[tuple[LayerShape, ...], int]:
    """The layers of a ``struct llama_model`` that keep K and V, and the size of their windows."""
    from ._ffi import lib, sized

    layers = []
    for i in range(lib.llama_model_n_layer(model)):
        c_layer = sized("struct llama_kv_mixed_layer *")
        if lib.llama_kv_mixed_get_layer(model, i, c_layer) == 0 and c_layer.n_head_kv > 0:
            sizes = int(c_layer.n_embd_head_k), int(c_layer.n_embd_head_v)
            layers.append(LayerShape(int(c_layer.n_head_kv), *sizes, bool(c_layer.is_swa)))
    return tuple(layers), int(lib.llama_model_n_swa(model))


def _row_bytes(kv_type: str, n_elements: int) -> int:
    block = FORMATS[kv_type].n_block
    if n_elements % block != 0:
        raise ModelError(f"{kv_type} stores blocks of {block} elements, which do not divide a head of {n_elements}.")
    return FORMATS[kv_type].row_size(n_elements)
