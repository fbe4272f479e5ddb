"""How a context is made: what is refused beforehand, and the size of a ubatch where that was left open."""

from __future__ import annotations

import os
from typing import Any

from ._ffi import error_lines, ffi, last_error, lib
from ._fork import check_threads
from ._handle import ExclusiveHandle
from .errors import ContextError
from .formats import FORMATS
from .model import Model
from .params import ContextParams, KVMixedParams, resolve_kv_mixed
from .pooling import NONE, Pooling, pooling_of, pools_mean

# architectures whose graph has V in a shape that can only be stored transposed
_ARCHS_V_TRANSPOSED = ("plm",)


def create_context(model: Model, params: ContextParams) -> tuple[ExclusiveHandle, Pooling]:
    """A ``struct llama_context``, and how it pools. Raises ContextError when it can not be created."""
    _check_supported(model, params)
    c_params = params.to_c(_n_cpus())
    check_threads(max(c_params.n_threads, c_params.n_threads_batch), ContextError)
    handle, pooling = _create(model, params, c_params)
    n_batch = lib.llama_n_batch(handle.pointer)  # no more than the context, where there is a causal mask
    if params.n_ubatch is None and pooling.one_ubatch and lib.llama_n_ubatch(handle.pointer) < n_batch:
        handle.close()  # only a context knows what its model needs
        c_params.n_ubatch = c_params.n_batch
        handle, pooling = _create(model, params, c_params)
    return handle, pooling


def _round_ubatch(model: Model, c_params: Any) -> None:
    """Make n_ubatch a multiple of the sequences, without which libllama aborts the process for a mean."""
    n_seq_max = c_params.n_seq_max
    n_ubatch = min(c_params.n_ubatch, c_params.n_batch, c_params.n_ctx or model.n_ctx_train)
    if n_ubatch < n_seq_max:
        raise ContextError(
            f"Means of embeddings need n_ubatch, n_batch and n_ctx of n_seq_max ({n_seq_max}) or more, not {n_ubatch}."
        )
    c_params.n_ubatch = n_ubatch // n_seq_max * n_seq_max


def _create(model: Model, params: ContextParams, c_params: Any) -> tuple[ExclusiveHandle, Pooling]:
    if params.embeddings and pools_mean(model, c_params.pooling_type):
        _round_ubatch(model, c_params)
    parent = model.handle()
    model.check_servers(ContextError)
    kv_mixed = _kv_mixed(params)
    with error_lines() as errors:
        pointer = lib.llama_kv_mixed_init_from_model(
            parent.pointer, c_params, kv_mixed.to_c() if kv_mixed else ffi.NULL
        )
        if pointer != ffi.NULL:
            handle = ExclusiveHandle(pointer, lib.llama_free, parent, "context", ContextError)
    model.check_servers(ContextError)
    if pointer == ffi.NULL:
        raise ContextError(f"The context can not be created: {errors.reason() or last_error()}.")
    return handle, pooling_of(
        model,
        int(lib.llama_pooling_type(pointer)) if params.embeddings else NONE,
        causal=bool(lib.llama_get_causal_attn(pointer)),
        has_memory=lib.llama_get_memory(pointer) != ffi.NULL,
        n_stream=1 if params.kv_unified else int(lib.llama_n_seq_max(pointer)),
    )


def _kv_mixed(params: ContextParams) -> KVMixedParams | None:
    """The mixed cache that is asked for. By default there is none for embeddings, which are to be a plain cache's."""
    if params.embeddings and params.kv_mixed is True:
        return None
    return resolve_kv_mixed(params.kv_mixed)


def _n_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_supported(model: Model, params: ContextParams) -> None:
    """Refuse what libllama would abort the process for."""
    if model.params.vocab_only:
        raise ContextError("The model was loaded with its vocabulary only.")
    if model.has_encoder:
        raise ContextError("Models with an encoder are not supported.")
    arch = model.metadata.get("general.architecture")
    if arch in _ARCHS_V_TRANSPOSED and (params.flash_attn != "off" or _kv_mixed(params) is not None):
        raise ContextError(f"A model of architecture {arch} needs flash_attn='off' and kv_mixed=False.")
    for size, name in zip(model.head_sizes(), ("type_k", "type_v"), strict=True):
        ggml_type = getattr(params, name)
        block = FORMATS[ggml_type].n_block
        if size % block != 0:
            raise ContextError(
                f"{name}={ggml_type} stores blocks of {block} elements, which do not divide a head of {size}."
            )
