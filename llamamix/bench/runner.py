"""Runs a plan: every test of every configuration, repetition by repetition in turn."""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..context import Context
from ..errors import ContextError, ModelError, ParamsError
from ..model import Model
from ..params import FLASH_ATTN
from ..shape import ModelShape
from ..stats import PromptProgress
from . import machine
from .caches import DepthCache, cache_bytes, plan_bytes
from .configurations import Configuration
from .plan import BenchTest, Plan, order
from .records import Row

_COMPUTE_BYTES = 512 << 20  # room for a context's compute buffers


class Progress(Protocol):
    """Is told how far a run has come."""

    def step(self, what: str) -> None:
        """The next of the plan's steps begins."""

    def tokens(self, progress: PromptProgress) -> None:
        """How far the step is, while a prompt or the tokens of a depth are computed."""

    def note(self, text: str) -> None:
        """Something that whoever waits should know."""


def random_tokens(model: Model, n: int, seed: int) -> np.ndarray:
    """``n`` token ids drawn from the whole vocabulary, the first one that begins a text where the model has one."""
    tokens = np.random.default_rng(seed).integers(0, model.n_vocab, n, dtype=np.int32)
    with contextlib.suppress(ModelError):  # no tokenizer
        begin = model.tokenize("")
        tokens[: len(begin)] = begin[:n]
    return tokens


def text_tokens(model: Model, text: str, n: int) -> np.ndarray:
    """The first ``n`` token ids of a text, which begins again when it is too short. Raises ParamsError without any."""
    tokens = model.tokenize(text)
    if not tokens:
        raise ParamsError("The text has no tokens.")
    return np.resize(np.array(tokens, np.int32), n)


class _Sample(NamedTuple):
    ns: int
    token_ns: tuple[int, ...]
    migrate_us: int


@dataclass(slots=True)
class _Samples:
    """A configuration's repetitions of a test, what its context said of itself, and when they began."""

    done: list[_Sample] = field(default_factory=list)
    context: dict[str, Any] = field(default_factory=dict)
    time: str = ""


class Runner:
    """Measures.

    tokens  token ids, as many as the deepest test has in the cache at its end
    seed    where they come from, None: a text
    emit    gets the rows of a test when it is done, or what there is of it when it is interrupted
    clock   nanoseconds

    Raises what Model and Context raise.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        tokens: np.ndarray,
        *,
        seed: int | None,
        emit: Callable[[list[Row]], None],
        progress: Progress,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        from .. import __version__

        self._model = model
        self._shape = ModelShape.from_model(model)
        self._plan = plan
        self._tokens = tokens
        self._emit = emit
        self._progress = progress
        self._clock = clock
        self._one_context = plan.one_context
        self._setting: dict[str, Any] = {
            "llamamix": __version__,
            **machine.describe(model),
            "model_filename": str(model.path),
            "model_type": model.desc,
            "model_size": model.size,
            "model_n_params": model.n_params,
            "n_batch": plan.n_batch,
            "n_ubatch": plan.n_ubatch,
            "seed": seed,
        }

    def run(self) -> None:
        """All of it, depth by depth."""
        for depth in self._plan.n_depth:
            with contextlib.ExitStack() as stack:
                caches = self._fill(depth, stack)
                for test in self._plan.tests(depth):
                    self._measure(test, caches)

    #
    # depth
    #

    def _fill(self, depth: int, stack: contextlib.ExitStack) -> list[DepthCache]:
        caches: list[DepthCache] = []
        n_ctx = depth + self._plan.n_tokens_max
        for configuration in self._plan.configurations:
            self._progress.step(f"d{depth} {configuration.name}")
            cache = DepthCache(
                self._model,
                configuration,
                self._tokens[:depth],
                n_ctx=n_ctx,
                n_batch=self._plan.n_batch,
                n_ubatch=self._plan.n_ubatch,
                n_threads=self._plan.n_threads[0],
            )
            stack.callback(cache.close)
            if caches and not self._one_context and not self._has_room(configuration, n_ctx):
                self._save_memory(caches)
            try:
                cache.fill(self._progress.tokens)
            except ContextError:
                if self._one_context or not caches:
                    raise
                for other in caches:
                    other.park()
                cache.fill(self._progress.tokens)  # it was not for lack of memory when this fails too
                self._save_memory(caches)
            if self._one_context:
                cache.park()
            caches.append(cache)
        return caches

    def _has_room(self, configuration: Configuration, n_ctx: int) -> bool:
        available = machine.memory_available()
        n_bytes = plan_bytes(self._shape, configuration, self._shape.n_ctx_padded(n_ctx))
        return available is None or 2 * n_bytes + _COMPUTE_BYTES <= available  # the cache and its state

    def _save_memory(self, caches: Sequence[DepthCache]) -> None:
        self._one_context = True
        for cache in caches:
            cache.park()
        self._progress.note("Memory is short: one cache is kept at a time, and the states of the others.")

    #
    # tests
    #

    def _measure(self, test: BenchTest, caches: Sequence[DepthCache]) -> None:
        samples = [_Samples() for _ in caches]
        try:
            for repetition in range(self._plan.repetitions):
                for i in order(len(caches), repetition):
                    name = caches[i].configuration.name
                    self._progress.step(f"{test.name} {name} ({repetition + 1}/{self._plan.repetitions})")
                    self._sample(caches[i], test, samples[i])
        finally:  # Ctrl-C too: what has been measured is not lost
            rows = [
                self._row(cache.configuration, test, measured)
                for cache, measured in zip(caches, samples, strict=True)
                if measured.done
            ]
            if rows:
                self._emit(rows)

    def _sample(self, cache: DepthCache, test: BenchTest, samples: _Samples) -> None:
        context = cache.restore()
        if test.n_threads is not None:
            context.set_n_threads(test.n_threads)
        if self._plan.warmup and cache.is_first(test):
            self._compute(context, test, min(test.n_gen, 1))
            context = cache.restore()
        if not samples.done:
            samples.context = self._describe(context, cache.configuration)
            samples.time = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        before = _migrate_us(context)
        with _no_gc():
            times = self._compute(context, test, test.n_gen)
        migrate_us = _migrate_us(context) - before
        durations = tuple(end - start for start, end in itertools.pairwise(times))
        token_ns = durations[len(durations) - test.n_gen :]
        samples.done.append(_Sample(times[-1] - times[0], token_ns, migrate_us))
        if self._one_context:
            cache.park()

    def _compute(self, context: Context, test: BenchTest, n_gen: int) -> list[int]:
        """The times at the beginning, after the prompt if there is one, and after every token."""
        first = test.n_depth + test.n_prompt
        times = [self._clock()]
        if test.n_prompt > 0:
            context.set_progress_callback(self._progress.tokens)
            context.decode(self._tokens[test.n_depth : first])
            context.set_progress_callback(None)
            context.perf_reset()  # it waits until all is computed
            times.append(self._clock())
        for i in range(first, first + n_gen):
            context.decode(self._tokens[i : i + 1])
            context.perf_reset()
            times.append(self._clock())
        return times

    def _describe(self, context: Context, configuration: Configuration) -> dict[str, Any]:
        kv_mixed = context.kv_mixed
        return {
            "n_threads": context.n_threads,
            "kv_mixed": kv_mixed.spec() if kv_mixed is not None else None,
            "kv_bytes": cache_bytes(context, self._shape, configuration),
            "n_ctx": context.n_ctx,
        }

    def _row(self, configuration: Configuration, test: BenchTest, samples: _Samples) -> Row:
        return Row(
            **self._setting,
            **samples.context,
            cache=configuration.name,
            type_k=configuration.type_k,
            type_v=configuration.type_v,
            flash_attn=FLASH_ATTN[configuration.flash_attn],
            n_prompt=test.n_prompt,
            n_gen=test.n_gen,
            n_depth=test.n_depth,
            test_time=samples.time,
            samples_ns=tuple(sample.ns for sample in samples.done),
            samples_token_ns=tuple(sample.token_ns for sample in samples.done),
            samples_migrate_us=(
                tuple(sample.migrate_us for sample in samples.done) if configuration.kv_mixed is not None else None
            ),
        )


def _migrate_us(context: Context) -> int:
    stats = context.stats
    return 0 if stats is None else stats.t_migrate_us


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    """No pause of Python's in what is timed."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
