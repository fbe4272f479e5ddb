"""A context for a command: plain words where it can not be made, and Ctrl-C that ends no more than it should."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..context import Context
    from ..model import Model
    from ..shape import ModelShape

_STEP = 256  # a context is a multiple of so many tokens


def open_context(model: Model, params: Mapping[str, Any]) -> Context:
    """The context of these ContextParams.

    Raises ContextError when its KV cache is larger than the memory that is free, before any of that is taken, and what
    Context raises.
    """
    from ..context import Context
    from ..shape import ModelShape

    if model.params.n_gpu_layers == 0 or not (model.params.rpc or _has_gpu()):
        check_memory(ModelShape.from_model(model), params)
    return Context(model, **params)


def _has_gpu() -> bool:
    from ..bench import machine

    return machine.gpu_info() != ""


def check_memory(shape: ModelShape, params: Mapping[str, Any]) -> None:
    """Raise ContextError for a KV cache that is larger than the memory that is free.

    params  of them n_ctx, kv_mixed, type_k and type_v count
    """
    from ..bench import machine
    from ..display import n_bytes
    from ..errors import ContextError, ModelError
    from ..params import resolve_kv_mixed
    from ..shape import kv_bytes

    n_there = machine.memory_available()
    n_ctx = shape.n_ctx_padded(params["n_ctx"])
    kv_mixed = resolve_kv_mixed(params["kv_mixed"])
    n_needed = 0
    with contextlib.suppress(ModelError, KeyError):  # who makes the context says it better
        if kv_mixed is None:
            n_needed = shape.kv_bytes(n_ctx, params.get("type_k", "f16"), params.get("type_v", "f16"))
        else:
            n_needed = kv_bytes(shape, n_ctx, kv_mixed)
    if n_there is not None and n_needed > n_there:
        raise ContextError(
            f"A context of {n_ctx} tokens takes {n_bytes(n_needed)} for its KV cache, and {n_bytes(n_there)} of memory"
            " are free; give a smaller -c."
        )


def check_prompt(context: Context, n_prompt: int, n_predict: int) -> None:
    """Raise ParamsError for a prompt of no tokens, and ContextError for one that the context can not hold.

    n_predict  tokens that are to follow, -1: no matter how many
    """
    from ..errors import ContextError, ParamsError

    if n_prompt == 0:
        raise ParamsError("The prompt is empty.")
    if context.model.is_recurrent or n_prompt <= context.n_ctx_seq:
        return
    n_wanted = -(-(n_prompt + max(n_predict, 1)) // _STEP) * _STEP
    n_train = context.model.n_ctx_train
    most = f" (the model was made for {n_train})" if n_wanted > n_train else ""
    raise ContextError(
        f"The prompt has {n_prompt} tokens, and the context holds {context.n_ctx_seq}; give -c {n_wanted}{most}, or a"
        " shorter prompt."
    )


def full(context: Context, n_prompt: int) -> Exception:
    """The error for a context that is full before all was generated that was asked for."""
    from ..errors import ContextFullError

    n_held = context.memory.seq_pos_max() + 1
    return ContextFullError(
        f"The context is full: it holds {context.n_ctx_seq} tokens, {n_prompt} of the prompt and {n_held - n_prompt}"
        " generated; give a larger -c, or -n -1 to end there.", 1,
    )  # fmt: skip


class Interrupt:
    """Ctrl-C as something to look at between tokens; pressed again it does not wait.

    An exception could come anywhere, and would be lost in a line of the log.

    then  is called when it is pressed
    """

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self.requested = False
        self._then = then

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, *_args: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._then is not None:
            self._then()
