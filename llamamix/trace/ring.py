"""The trace of a cache, drained from the library's ring."""

from __future__ import annotations

import math
import threading
import time
import weakref
from dataclasses import replace
from typing import Any, Protocol

from .._ffi import ffi, lib, sized
from .._handle import ExclusiveHandle
from ..errors import ContextError
from ..params import KVMixedParams, check_int
from ..stats import CacheStats
from .events import Event, EventKind, LayerError, Trigger

_N_READ = 256  # records that one call of the library gets room for
_N_MAX = 65536


class Traceable(Protocol):
    """What can be traced: a Context or a MixedKVCache."""

    _handle: ExclusiveHandle


# how the memory is got from what a handle points to
_GET_MEMORY = {
    "struct llama_context *": "llama_get_memory",
    "struct llama_kv_mixed_cache *": "llama_kv_mixed_cache_get_memory",
}


def _enum(name: str, prefix: str) -> dict[int, str]:
    """The members of an enum of the C header, by number, named as here."""
    members = ffi.typeof(f"enum {name}").elements
    return {number: member.removeprefix(prefix).lower() for number, member in members.items()}


_KINDS = {n: EventKind(name) for n, name in _enum("llama_kv_mixed_event_kind", "LLAMA_KV_MIXED_EVENT_").items()}
_TRIGGERS = {n: Trigger(name) for n, name in _enum("llama_kv_mixed_trigger", "LLAMA_KV_MIXED_TRIGGER_").items()}
_FLAGS = {name: n for n, name in _enum("llama_kv_mixed_trace_flags", "LLAMA_KV_MIXED_TRACE_").items()}

_running: weakref.WeakValueDictionary[int, Trace] = weakref.WeakValueDictionary()  # by the address of the memory


class Trace:
    """What a mixed KV cache does, from ``with`` (or start()) until the end of the block (or stop()).

    read() and stop() may be called from another thread than the one that decodes, which they do not wait for. A cache
    has one trace at a time.

    Args:
        cache: A Context or a MixedKVCache.
        n_max: The most records that wait to be read, 1 or more; the oldest make way.
        log: Also write the records to the log of this package, as text.
        measure_error: Measure the quantisation error of what moves, which takes about ten times as long as to move it.
        layers: Keep it by layer as well.

    Attributes:
        params (KVMixedParams): The cache's parameters in force, when it has begun.
        cache (CacheStats): The cache as the trace began.

    Raises:
        ParamsError: For an ``n_max`` that can not be used.
    """

    def __init__(
        self,
        cache: Traceable,
        n_max: int = _N_MAX,
        *,
        log: bool = False,
        measure_error: bool = False,
        layers: bool = False,
    ) -> None:
        self._n_max = check_int(n_max, "n_max", 1, 2**32 - 1)
        # the cache of a context goes when the context does
        self._handle = (getattr(cache, "_context", None) or cache)._handle
        self._get_memory = _GET_MEMORY[ffi.typeof(self._handle.pointer).cname]
        self._layers = layers
        wanted = {"log": log, "error": measure_error or layers, "layers": layers}
        self._flags = sum(_FLAGS[name] for name, on in wanted.items() if on)

        self._lock = threading.Lock()
        self._c_events = ffi.new("struct llama_kv_mixed_event[]", _N_READ)
        self._c_layers = ffi.new("struct llama_kv_mixed_layer_error[]", _N_READ)
        self._c_dropped = ffi.new("uint64_t *")
        self._memory: Any = None
        self._on = False

    def __repr__(self) -> str:
        if self._handle.closed:
            state = "closed"
        elif self._on:
            state = f"on for {self.now():.1f} s"
        else:
            state = "not begun" if self._memory is None else "stopped"
        return f"<Trace of up to {self._n_max} records, {state}, {self.n_dropped} dropped>"

    def __enter__(self) -> Trace:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin. What an earlier start() recorded is gone.

        Raises:
            ContextError: When there is no mixed KV cache, and when it has a trace already.
        """
        # a decode is waited for: the first record tells the state of the cache
        with self._handle as pointer, self._lock:
            memory = getattr(lib, self._get_memory)(pointer)
            other = _running.get(_address(memory))
            if other is not None and not other._handle.closed:
                raise ContextError("This KV cache is traced already; end that trace first.")
            # before the first record, so that now() is never behind what has happened
            self._t0 = time.monotonic()
            if lib.llama_kv_mixed_trace_start(memory, self._n_max, self._flags) != 0:
                raise ContextError("There is no mixed KV cache to trace.")
            self._memory = memory
            self._on = True
            _running[_address(memory)] = self

            #: the cache's parameters in force
            self.params: KVMixedParams = KVMixedParams.from_c(
                _filled("llama_kv_mixed_params", lib.llama_kv_mixed_get_params, memory)
            )
            #: the cache as the trace began
            self.cache: CacheStats = CacheStats.from_c(
                _filled("llama_kv_mixed_stats", lib.llama_kv_mixed_get_stats, memory)
            )

            self._t0_us = -1
            self._layer_errors: dict[int, list[LayerError]] = {}
            self._waiting = self._drain()

    def stop(self) -> None:
        """Record nothing more; what waits can still be read. Stopping twice is fine.

        In a process that was forked since start() this does nothing.
        """
        if self._handle.inherited:  # a thread that this process does not have may hold the lock
            return
        with self._lock, self._handle.guard() as pointer:
            if not self._on:
                return
            self._on = False
            if pointer is not None:
                lib.llama_kv_mixed_trace_start(self._memory, 0, 0)
            _running.pop(_address(self._memory), None)

    def now(self) -> float:
        """Seconds since the trace began, on the clock of the events."""
        return time.monotonic() - self._t0

    @property
    def n_dropped(self) -> int:
        """Records that were lost because n_max others waited, as of the last read()."""
        return int(self._c_dropped[0])

    def read(self) -> list[Event]:
        """Take the events since the last call.

        Returns:
            The events, oldest first.

        Raises:
            ContextError: When the trace has not begun, and when what was traced is closed.
        """
        self._handle.check_process()
        with self._lock, self._handle.guard() as pointer:
            if self._memory is None:
                raise ContextError("The trace has not begun.")
            if pointer is None:
                raise ContextError("What was traced is closed.")
            events = self._waiting + self._drain()
            self._waiting = []
            return self._with_layers(events) if self._layers else events

    def _drain(self) -> list[Event]:
        events: list[Event] = []
        n = _N_READ
        while n == _N_READ:
            n = lib.llama_kv_mixed_trace_read(self._memory, self._c_events, _N_READ, self._c_dropped)
            if n > 0 and self._t0_us < 0:
                self._t0_us = self._c_events[0].t_us
            events += [_event(self._c_events[i], self._t0_us) for i in range(n)]
        return events

    def _drain_layers(self) -> None:
        n = _N_READ
        while n == _N_READ:
            n = lib.llama_kv_mixed_trace_read_layers(self._memory, self._c_layers, _N_READ)
            for i in range(n):
                c = self._c_layers[i]
                if _are_numbers(c):
                    error = LayerError(c.il, c.rmse_k, c.max_k, c.rmse_v, c.max_v, c.rms_k, c.rms_v)
                    self._layer_errors.setdefault(c.id, []).append(error)

    def _with_layers(self, events: list[Event]) -> list[Event]:
        self._drain_layers()  # after the events: those of later ones may be among them
        events = [replace(e, layers=tuple(self._layer_errors.get(e.id, ()))) for e in events]
        if events:
            self._layer_errors = {n: errors for n, errors in self._layer_errors.items() if n > events[-1].id}
        return events


def _address(memory: Any) -> int:
    return int(ffi.cast("uintptr_t", memory))


def _filled(name: str, fill: Any, memory: Any) -> Any:
    """A struct that the library fills."""
    c_struct = sized(f"struct {name} *")
    fill(memory, c_struct)
    return c_struct


def _event(c: Any, t0_us: int) -> Event:
    """From a ``struct llama_kv_mixed_event``."""
    measured = _are_numbers(c)
    return Event(
        id=c.id,
        t=(c.t_us - t0_us) / 1e6,
        kind=_KINDS[c.kind],
        trigger=_TRIGGERS.get(c.trigger),
        stream=_natural(c.strm),
        seq_ids=tuple(64 * i + bit for i, word in enumerate(c.seqs) for bit in range(64) if word >> bit & 1),
        pos_min=_natural(c.pos_min),
        pos_max=_natural(c.pos_max),
        n_tokens=c.n_tokens,
        hot_used=c.hot_used,
        hot_size=c.hot_size,
        cold_used=c.cold_used,
        cold_size=c.cold_size,
        duration=c.dur_us / 1e6,
        bytes_in=c.bytes_in,
        bytes_out=c.bytes_out,
        rmse_k=c.rmse_k if measured else None,
        max_k=c.max_k if measured else None,
        rmse_v=c.rmse_v if measured else None,
        max_v=c.max_v if measured else None,
        rms_k=c.rms_k if measured else None,
        rms_v=c.rms_v if measured else None,
    )


def _are_numbers(c: Any) -> bool:
    """False when an error was not measured, or rows were not finite."""
    return all(map(math.isfinite, (c.rmse_k, c.max_k, c.rmse_v, c.max_v, c.rms_k, c.rms_v)))


def _natural(value: int) -> int | None:
    return None if value < 0 else value
