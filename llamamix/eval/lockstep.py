"""Computes the tokens of a context with several caches in step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence

import numpy as np

from ..bench.caches import cache_bytes
from ..context import Context
from ..errors import ContextError
from ..model import Model
from ..shape import ModelShape
from .cases import Case
from .compare import Reference, Scores
from .plan import DECODE, PROMPT, Plan
from .store import Measured
from .texts import Chunk

#: leg and cache
Key = tuple[str, Case]


class Contexts:
    """The contexts of n_ctx tokens, each made when it is asked for and closed with the stack."""

    def __init__(self, model: Model, plan: Plan, n_ctx: int, stack: contextlib.ExitStack) -> None:
        self.n_ctx = n_ctx
        self._model = model
        self._plan = plan
        self._stack = stack
        self._made: dict[Case, Context] = {}

    def __contains__(self, case: Case) -> bool:
        return case in self._made

    def __getitem__(self, case: Case) -> Context:
        """Raises ContextError, which names the cache."""
        if case not in self._made:
            try:
                with case.environment():
                    context = Context(
                        self._model,
                        n_ctx=self.n_ctx,
                        n_batch=self._plan.n_batch,
                        n_ubatch=case.n_ubatch or self._plan.n_ubatch,
                        n_threads=self._plan.n_threads,
                        swa_full=False,  # as llama.cpp's programs have it
                        **case.configuration.context_params(),
                    )
            except ContextError as error:
                raise ContextError(f"{case.name}: {error}", error.code) from None
            self._made[case] = self._stack.enter_context(context)
        return self._made[case]


def passes(
    plan: Plan, reference: Case, n_ctx: int, missing: Collection[Key]
) -> list[tuple[tuple[str, ...], list[Case]]]:
    """What is to be computed for scores that are missing: legs, and the caches of these, the reference first.

    Both legs are one pass where the same caches miss them and they begin with the same batches.
    """
    found: list[tuple[tuple[str, ...], list[Case]]] = []
    for leg in plan.legs:
        others = [case for leg_of, case in missing if leg_of == leg and case != reference]
        if others or (leg, reference) in missing:
            found.append(((leg,), [reference, *others]))
    if len(found) == 2 and found[0][1] == found[1][1] and n_common(plan, n_ctx) > 0:
        return [((PROMPT, DECODE), found[0][1])]
    return found


def n_common(plan: Plan, n_ctx: int) -> int:
    """How many tokens are in the batches that both legs begin with."""
    return (n_ctx - plan.n_decode) // plan.n_batch * plan.n_batch


def n_tokens(plan: Plan, reference: Case, n_ctx: int, missing: Collection[Key]) -> int:
    """How many tokens that takes, of all caches together."""
    n = 0
    for legs, cases in passes(plan, reference, n_ctx, missing):
        n_all = sum(n_ctx if leg == PROMPT else n_ctx - 1 for leg in legs)
        n += len(cases) * (n_all - (n_common(plan, n_ctx) if len(legs) > 1 else 0))
    return n


class Lockstep:
    """Scores of one chunk; advance is told of tokens that were computed."""

    def __init__(
        self, plan: Plan, contexts: Contexts, reference: Case, chunk: Chunk, advance: Callable[[int], None]
    ) -> None:
        self._plan = plan
        self._contexts = contexts
        self._reference = reference
        self._tokens = chunk.tokens
        self._positions = {leg: plan.positions(chunk, leg) for leg in plan.legs}
        self._advance = advance
        self._scores: dict[Key, list[Scores]] = {}
        #: legs that are over
        self.complete: set[str] = set()

    def run(self, missing: Collection[Key]) -> None:
        """Compute what is missing; the reference goes along. Raises ContextError."""
        n_ctx = len(self._tokens)
        for legs, cases in passes(self._plan, self._reference, n_ctx, missing):
            for case in cases:
                self._contexts[case].memory.clear()
            n_done = 0
            if PROMPT in legs:
                states: dict[Case, bytes] = {}
                if DECODE in legs:
                    n_done = n_common(self._plan, n_ctx)
                    self._batches(cases, PROMPT, 0, n_done)
                    states = {case: self._contexts[case].state_save(0) for case in cases}
                self._batches(cases, PROMPT, n_done, n_ctx)
                self.complete.add(PROMPT)
                for case in list(states):
                    self._contexts[case].memory.clear()
                    self._contexts[case].state_load(states.pop(case), 0)
            if DECODE in legs:
                first = n_ctx - self._plan.n_decode
                self._batches(cases, None, n_done, first)
                for i in range(first, n_ctx - 1):  # nothing comes after the last
                    self._feed(cases, DECODE, i, i + 1)
                self.complete.add(DECODE)

    def measured(self, shape: ModelShape) -> dict[Key, Measured]:
        """What there is so far, all of it when run() has come to its end."""
        return {
            (leg, case): Measured(Scores.join(parts), *self._describe(shape, case))
            for (leg, case), parts in self._scores.items()
        }

    def _describe(self, shape: ModelShape, case: Case) -> tuple[int, str | None, int]:
        context = self._contexts[case]
        kv_mixed = context.kv_mixed
        n_bytes = cache_bytes(context, shape, case.configuration)
        return n_bytes, None if kv_mixed is None else kv_mixed.spec(), context.n_threads

    def _batches(self, cases: Sequence[Case], leg: str | None, start: int, end: int) -> None:
        for first in range(start, end, self._plan.n_batch):
            self._feed(cases, leg, first, min(first + self._plan.n_batch, end))

    def _feed(self, cases: Sequence[Case], leg: str | None, start: int, end: int) -> None:
        tokens = self._tokens[start:end]
        positions = np.empty(0, np.int64) if leg is None else self._positions[leg]
        positions = positions[(positions >= start) & (positions < end)]
        mask = np.zeros(len(tokens), np.int8)
        mask[positions - start] = 1
        reference: Reference | None = None
        for case in cases:
            context = self._contexts[case]
            context.decode(tokens, logits=mask)
            if leg is not None and len(positions) > 0:
                if reference is None:
                    reference = Reference(positions, self._tokens[positions + 1], context.logits)
                    scores = reference.own_scores()
                else:
                    scores = reference.scores(context.logits)
                self._scores.setdefault((leg, case), []).append(scores)
            self._advance(len(tokens))
