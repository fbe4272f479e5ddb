"""The shape of a model's KV cache, from a GGUF file's metadata alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelError
from .params import KVMixedParams

_PAD = 256  # a context is a multiple of this


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What decides the size of a KV cache.

    n_head_kv    K/V heads of each layer that has any
    head_size_k  elements of a K head
    head_size_v  elements of a V head, 0: the model keeps no V

    Layers with sliding windows count as if they kept the whole context.
    """

    arch: str
    n_ctx_train: int
    n_layer: int
    n_head: int
    n_head_kv: tuple[int, ...]
    head_size_k: int
    head_size_v: int

    @classmethod
    def from_gguf(cls, path: Path) -> ModelShape:
        """Read it. Raises ModelError for what is no GGUF file of a language model."""
        import gguf

        try:
            reader = gguf.GGUFReader(path)
        except OSError as error:
            raise ModelError(f"{path} can not be read: {error.strerror}.") from None
        except Exception as error:  # the reader has no exception of its own for damaged files
            raise ModelError(f"{path} is not a GGUF file, or damaged ({error}).") from None

        def get(key: str, default: Any = None) -> Any:
            field = reader.get_field(key)
            if field is not None:
                return field.contents()
            if default is None:
                raise ModelError(f"{path} has no {key}.")
            return default

        arch = get("general.architecture")
        n_layer = get(f"{arch}.block_count")
        n_head = get(f"{arch}.attention.head_count", 0)
        n_head_max = max(n_head) if isinstance(n_head, list) else n_head
        n_head_kv = get(f"{arch}.attention.head_count_kv", n_head)
        per_layer = n_head_kv if isinstance(n_head_kv, list) else [n_head_kv] * n_layer
        per_layer = per_layer[: n_layer - get(f"{arch}.attention.shared_kv_layers", 0)]
        default = get(f"{arch}.embedding_length") // n_head_max if n_head_max else 0
        has_v = reader.get_field(f"{arch}.attention.key_length_mla") is None  # with MLA, V is a part of K
        return cls(
            arch=arch,
            n_ctx_train=get(f"{arch}.context_length"),
            n_layer=n_layer,
            n_head=n_head_max,
            n_head_kv=tuple(n for n in per_layer if n > 0),
            head_size_k=get(f"{arch}.attention.key_length", default),
            head_size_v=get(f"{arch}.attention.value_length", default) if has_v else 0,
        )

    @property
    def n_head_kv_max(self) -> int:
        return max(self.n_head_kv, default=0)

    def n_ctx_padded(self, n_ctx: int) -> int:
        """The context that libllama makes of the one asked for, 0: the one the model was trained with."""
        return -(-(n_ctx or self.n_ctx_train) // _PAD) * _PAD

    def kv_bytes_per_token(self, type_k: str, type_v: str | None = None) -> int:
        """Bytes of K and V of one token over all layers. Raises ModelError when the type does not fit the heads."""
        return sum(
            n_head * (_row_bytes(type_k, self.head_size_k) + _row_bytes(type_v or type_k, self.head_size_v))
            for n_head in self.n_head_kv
        )


def kv_bytes(shape: ModelShape, n_ctx: int, params: KVMixedParams) -> int:
    """Bytes of a mixed KV cache whose hot rows are F16."""
    n_hot, n_cold = params.cells(n_ctx)
    cold = shape.kv_bytes_per_token(params.type_cold_k, params.type_cold_v)
    return n_hot * shape.kv_bytes_per_token("f16") + n_cold * cold


def _row_bytes(kv_type: str, n_elements: int) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kv_type.upper()]]
    if n_elements % block != 0:
        raise ModelError(f"{kv_type} stores blocks of {block} elements, which do not divide a head of {n_elements}.")
    return n_elements // block * size
