"""Caches that hold the same tokens whenever a test begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..context import Context
from ..errors import ContextError
from ..model import Model
from ..params import KVMixedParams
from ..shape import ModelShape, kv_bytes
from ..stats import PromptProgress
from .configurations import Configuration
from .plan import BenchTest
from .records import BenchError


def cache_bytes(context: Context, shape: ModelShape, configuration: Configuration) -> int:
    """Bytes of a context's KV cache, all layers and all parts; recurrent states, which are no K and V, do not count."""
    stats = context.stats
    if stats is None:
        return shape.kv_bytes(context.n_ctx, configuration.type_k, configuration.type_v, context.n_ubatch)
    swa = shape.swa_bytes(context.n_ctx, stats.type_hot_k, stats.type_hot_v, context.n_ubatch)
    return stats.bytes_total + swa


def plan_bytes(shape: ModelShape, configuration: Configuration, n_ctx: int) -> int:
    """The bytes that it is going to have, about."""
    if configuration.kv_mixed is None:
        return shape.kv_bytes(n_ctx, configuration.type_k, configuration.type_v)
    return kv_bytes(shape, n_ctx, KVMixedParams.parse(configuration.kv_mixed))


class DepthCache:
    """A configuration's context, and a way back to its first ``len(tokens)`` tokens.

    A plain cache loses its tail, which leaves the cells before it as they were. A mixed one may have moved tokens to
    cold meanwhile, which would stay there, so its state is saved once and loaded every time. Without a context (after
    park()) both load their state into a new one.
    """

    def __init__(self, model: Model, configuration: Configuration, tokens: np.ndarray, **params: Any) -> None:
        self.configuration = configuration
        self._model = model
        self._tokens = tokens
        self._params = {"swa_full": False} | configuration.context_params() | params
        self._context: Context | None = None
        self._state: bytes | None = None
        self._known: set[BenchTest] = set()

    def fill(self, on_progress: Callable[[PromptProgress], None] | None = None) -> None:
        """Make the context and compute the tokens. Raises ContextError, which names the configuration.

        on_progress  is told how far that is
        """
        context = self._new_context()
        if len(self._tokens) > 0:
            try:
                context.set_progress_callback(on_progress)
                context.decode(self._tokens)
                context.set_progress_callback(None)
                if self.configuration.kv_mixed is not None:
                    self._state = context.state_save(0)
            except ContextError as error:
                self.close()
                raise self._error(error) from None

    def restore(self) -> Context:
        """The context, as it was when it was filled. Raises BenchError when it can not be."""
        context = self._context or self._new_context()
        if self._state is not None:
            context.state_load(self._state, 0)
        else:
            context.memory.seq_rm(0, len(self._tokens))
        n_held = context.memory.seq_pos_max() + 1
        if n_held != len(self._tokens):
            raise BenchError(f"{self.configuration.name}: {len(self._tokens)} tokens of depth have become {n_held}.")
        return context

    def park(self) -> None:
        """Give the context up until restore() is called."""
        if self._context is None:
            return
        if self._state is None and len(self._tokens) > 0:
            self._state = self.restore().state_save(0)
        self.close()

    def is_first(self, test: BenchTest) -> bool:
        """True when the context has not been asked about this test before."""
        if test in self._known:
            return False
        self._known.add(test)
        return True

    def close(self) -> None:
        """Free the context. Closing twice is fine."""
        if self._context is not None:
            self._context.close()
            self._context = None

    def _new_context(self) -> Context:
        self._known.clear()
        try:
            self._context = Context(self._model, **self._params)
        except ContextError as error:
            raise self._error(error) from None
        return self._context

    def _error(self, error: ContextError) -> ContextError:
        return ContextError(f"{self.configuration.name}: {error}", error.code)
