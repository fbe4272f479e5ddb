"""Computes texts with all caches in step, and compares every prediction with the reference's at once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ..bench import machine
from ..bench.caches import plan_bytes
from ..errors import ParamsError
from ..model import Model
from ..shape import ModelShape
from .cases import REFERENCE, Case
from .compare import Scores
from .lockstep import Contexts, Key, Lockstep, n_tokens
from .plan import PROMPT, Plan
from .records import Row
from .statistics import Estimate, mean, perplexity, perplexity_ratio, quantile, share
from .store import Measured, Store, key_of, library_digest, tokens_digest
from .texts import Chunk, Source


class Progress(Protocol):
    """Is told how far a run has come."""

    def begin(self, n_tokens: int) -> None:
        """So many tokens are going to be computed with a model, all caches together."""

    def advance(self, n_tokens: int) -> None:
        """So many more have been."""

    def describe(self, what: str) -> None:
        """What comes now."""


#: what is known of a cache's divergence, as Row has it
_STATISTICS: dict[str, Callable[[Scores], Estimate]] = {
    "kld_mean": lambda scores: mean(scores.kld),
    "kld_median": lambda scores: quantile(scores.kld, 0.5),
    "kld_p99": lambda scores: quantile(scores.kld, 0.99),
    "kld_p999": lambda scores: quantile(scores.kld, 0.999),
    "same_top": lambda scores: share(scores.same_top),
    "ppl_ratio": lambda scores: perplexity_ratio(scores.nll, scores.nll_ref),
}

_Found = list[tuple[Chunk, Measured]]


class Runner:
    """Evaluates caches of one model.

    cases         the reference is the first
    sources       texts
    store         where scores are kept
    model_sha256  of the model's file
    emit          gets the rows of a text, context and leg when all is measured, or what there is when it is interrupted
    progress      is told of every step

    Raises what Model and Context raise, ParamsError when a text is too short and when memory is, EvalError when scores
    can not be kept.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        cases: Sequence[Case],
        sources: Sequence[Source],
        store: Store,
        *,
        model_sha256: str,
        emit: Callable[[list[Row]], None],
        progress: Progress,
    ) -> None:
        from .. import __version__

        self._model = model
        self._shape = ModelShape.from_model(model)
        self._plan = plan
        self._cases = tuple(cases)
        self._reference = cases[0]
        self._store = store
        self._emit = emit
        self._progress = progress
        self._library = library_digest()
        here = machine.describe(model)
        self._machine: dict[str, Any] = {"library": self._library, "cpu": here["cpu_info"]}
        if here["backends"] != "CPU":
            self._machine |= {**here, "servers": model.params.rpc}
        self._model_sha256 = model_sha256
        self._setting: dict[str, Any] = {
            "llamamix": __version__,
            "library": self._library[:12],
            **here,
            "model_filename": model.path.name,
            "model_type": model.desc,
            "model_size": model.size,
            "model_sha256": model_sha256,
            "n_decode": plan.n_decode,
            "stride": plan.stride,
            "n_batch": plan.n_batch,
            "reference": plan.reference,
        }
        self._units = [
            (n_ctx, source, source.chunks(model, n_ctx, n_chunks))
            for n_ctx, n_chunks in plan.contexts()
            for source in sources
        ]
        for _, source, chunks in self._units:
            self._check_positions(source, chunks)

    def run(self) -> None:
        """All of it: contexts one after the other, in each text by text, chunk by chunk."""
        self._progress.begin(sum(self._n_tokens(chunk) for _, _, chunks in self._units for chunk in chunks))
        for n_ctx, units in itertools.groupby(self._units, key=lambda unit: unit[0]):
            with contextlib.ExitStack() as stack:
                contexts = Contexts(self._model, self._plan, n_ctx, stack)
                for _, source, chunks in units:
                    self._evaluate(contexts, source, chunks)

    def _check_positions(self, source: Source, chunks: Sequence[Chunk]) -> None:
        for leg in self._plan.legs:
            if any(len(self._plan.positions(chunk, leg)) == 0 for chunk in chunks):
                raise ParamsError(f"{source.name} has no position to score in the {leg} leg; take a longer context.")

    #
    # one text in one context
    #

    def _evaluate(self, contexts: Contexts, source: Source, chunks: Sequence[Chunk]) -> None:
        found: dict[Key, _Found] = {}
        try:
            for number, chunk in enumerate(chunks, 1):
                of_many = f" {number}/{len(chunks)}" if len(chunks) > 1 else ""
                self._progress.describe(f"{source.name} {contexts.n_ctx}{of_many}")
                kept, missing = self._kept(chunk)
                for key, measured in kept.items():
                    found.setdefault(key, []).append((chunk, measured))
                if missing:
                    self._measure(contexts, chunk, missing, found)
        finally:  # Ctrl-C too: what has been measured is not lost
            for leg in self._plan.legs:
                rows = [
                    self._row(contexts.n_ctx, source, leg, case, found[leg, case])
                    for case in self._cases
                    if (leg, case) in found
                ]
                if rows:
                    self._emit(rows)

    def _measure(self, contexts: Contexts, chunk: Chunk, missing: Sequence[Key], found: dict[Key, _Found]) -> None:
        self._check_memory(contexts, chunk, missing)
        lockstep = Lockstep(self._plan, contexts, self._reference, chunk, self._progress.advance)
        try:
            lockstep.run(missing)
        finally:
            for (leg, case), measured in lockstep.measured(self._shape).items():
                if (leg, case) in missing:
                    found.setdefault((leg, case), []).append((chunk, measured))
                    if leg in lockstep.complete:
                        self._store.save(self._key(chunk, leg, case), measured)

    def _kept(self, chunk: Chunk) -> tuple[dict[Key, Measured], list[Key]]:
        """What was measured before, and what is missing. The reference is computed beside whatever is."""
        kept: dict[Key, Measured] = {}
        missing: list[Key] = []
        for leg in self._plan.legs:
            for case in self._cases:
                measured = self._store.load(self._key(chunk, leg, case))
                if measured is not None and np.array_equal(measured.scores.positions, self._plan.positions(chunk, leg)):
                    kept[leg, case] = measured
                else:
                    missing.append((leg, case))
        return kept, missing

    def _key(self, chunk: Chunk, leg: str, case: Case) -> str:
        n_ubatch = self._plan.n_ubatch
        return key_of(
            {
                **self._machine,
                "model": self._model_sha256,
                "tokens": tokens_digest(chunk.tokens, self._plan.positions(chunk, leg)),
                "leg": leg,
                "plan": self._plan.settings(leg),
                "reference": self._reference.settings(n_ubatch),
                "case": case.settings(n_ubatch),
            }
        )

    def _n_tokens(self, chunk: Chunk) -> int:
        return n_tokens(self._plan, self._reference, len(chunk.tokens), self._kept(chunk)[1])

    def _check_memory(self, contexts: Contexts, chunk: Chunk, missing: Sequence[Key]) -> None:
        """Refuse what certainly does not fit, before the machine begins to swap."""
        available = machine.memory_available()
        wanted = {case for _, case in missing} | {self._reference}
        new = [case for case in wanted if case not in contexts]
        if available is None or not new:
            return
        plan = self._plan
        positions = plan.positions(chunk, PROMPT) if any(leg == PROMPT for leg, _ in missing) else np.zeros(1, int)
        n_rows = int(np.bincount(positions // plan.n_batch).max())
        # logits of a batch, and of a ubatch while it is computed; copies of the reference's and of one more
        per_context = 4 * self._model.n_vocab * (n_rows + min(plan.n_ubatch, plan.n_batch))
        n_bytes = sum(plan_bytes(self._shape, case.configuration, contexts.n_ctx) + per_context for case in new)
        n_bytes += 2 * 4 * self._model.n_vocab * n_rows
        if n_bytes > available:
            raise ParamsError(
                f"{len(new)} caches of {contexts.n_ctx} tokens and their results need {n_bytes >> 20} MiB, and there"
                f" are {available >> 20}: take a smaller -b, a larger --stride, or fewer caches at a time (what was"
                " measured is kept)."
            )

    #
    # results
    #

    def _row(self, n_ctx: int, source: Source, leg: str, case: Case, found: _Found) -> Row:
        scores = Scores.join([measured.scores for _, measured in found])
        measured = found[0][1]
        configuration = case.configuration
        lookups = [item for chunk, m in found for item in _lookups(chunk, m.scores)]
        n_ubatch = min(case.n_ubatch or self._plan.n_ubatch, self._plan.n_batch)
        values: dict[str, Any] = {}
        if case.role == REFERENCE:
            values = dict.fromkeys(("kld_max", *(f"{n}{e}" for n in _STATISTICS for e in ("", "_err"))))
        else:
            for name, statistic in _STATISTICS.items():
                values[name], values[f"{name}_err"] = statistic(scores)
            values["kld_max"] = float(scores.kld.max())
        values["ppl"], values["ppl_err"] = perplexity(scores.nll)
        return Row(
            **self._setting,
            **values,
            text=source.name,
            text_source=source.source,
            text_sha256=source.sha256,
            n_ctx=n_ctx,
            leg=leg,
            n_chunks=len(found),
            n_positions=len(scores),
            n_ubatch=n_ubatch,
            n_threads=measured.n_threads,
            flash_attn=configuration.flash_attn,
            role=case.role,
            cache=case.name,
            type_k=configuration.type_k,
            type_v=configuration.type_v,
            kv_mixed=measured.kv_mixed,
            rotation=case.rotation,
            kv_bytes=measured.kv_bytes,
            f16_bytes=self._shape.kv_bytes(n_ctx, "f16", n_ubatch=min(self._plan.n_ubatch, self._plan.n_batch)),
            lookup_distances=tuple(distance for distance, _ in lookups),
            lookup_found=tuple(int(hit) for _, hit in lookups),
        )


def _lookups(chunk: Chunk, scores: Scores) -> Iterator[tuple[int, bool]]:
    """Of the lookups whose value was scored to its last token: how far back it was, and whether it was found."""
    index = {int(position): i for i, position in enumerate(scores.positions)}
    for lookup in chunk.lookups:
        places = [index.get(i) for i in range(lookup.start - 1, lookup.end - 1)]
        if None not in places:
            yield lookup.distance, all(bool(scores.hit[i]) for i in places)
