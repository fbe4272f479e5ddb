"""How far one model's next tokens are from those of a reference, position by position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ContextError


@dataclass(frozen=True, slots=True)
class Scores:
    """What was measured at n positions.

    positions  int32 [n], positions of the tokens after which the next one is predicted
    kld        float64 [n], Kullback-Leibler divergence from the reference's prediction, nats
    nll        float64 [n], negative log-likelihood of the token that does come, nats
    nll_ref    float64 [n], the same of the reference
    same_top   bool [n], the most likely token is the reference's
    hit        bool [n], the most likely token is the one that comes
    """

    positions: np.ndarray
    kld: np.ndarray
    nll: np.ndarray
    nll_ref: np.ndarray
    same_top: np.ndarray
    hit: np.ndarray

    def __len__(self) -> int:
        return len(self.kld)

    @classmethod
    def join(cls, parts: list[Scores]) -> Scores:
        """Scores one after the other."""
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS}
        return cls(**arrays)


#: the arrays of Scores with their types
FIELDS = {
    "positions": np.int32, "kld": np.float64, "nll": np.float64, "nll_ref": np.float64, "same_top": np.bool_,
    "hit": np.bool_,
}  # fmt: skip


class Reference:
    """Predictions of the reference, to compare others with.

    positions  int [n]
    targets    int [n], the tokens that come
    logits     float32 [n, n_vocab]
    """

    def __init__(self, positions: np.ndarray, targets: np.ndarray, logits: np.ndarray) -> None:
        self._positions = positions.astype(np.int32)
        self._targets = targets
        self._logits = logits
        self._tops = logits.argmax(axis=1)
        self._log_sums = np.array([_log_sum(row) for row in logits])

    def scores(self, logits: np.ndarray) -> Scores:
        """Of logits at the same positions, float32 [n, n_vocab].

        All in float64: of caches that are nearly the same the divergence is 1e-7 and less, and what float32 makes of a
        sum over the vocabulary is more. Raises ContextError when logits are not numbers.
        """
        n = len(logits)
        kld, nll, nll_ref = np.empty(n), np.empty(n), np.empty(n)
        for i in range(n):
            log_p = self._logits[i].astype(np.float64) - self._log_sums[i]
            log_q = logits[i].astype(np.float64) - _log_sum(logits[i])
            p = np.exp(log_p)
            seen = slice(None) if p.all() else p > 0  # what the model rules out may be minus infinity in both
            # no product of matrices: the threads of NumPy's would be in the way of the next decode
            kld[i] = (p[seen] * (log_p[seen] - log_q[seen])).sum()
            nll[i], nll_ref[i] = -log_q[self._targets[i]], -log_p[self._targets[i]]
        tops = logits.argmax(axis=1)
        return Scores(self._positions, kld, nll, nll_ref, tops == self._tops, tops == self._targets)

    def own_scores(self) -> Scores:
        """Of the reference itself: no divergence."""
        nll = self._log_sums - self._logits[np.arange(len(self._tops)), self._targets].astype(np.float64)
        same = np.ones(len(nll), np.bool_)
        return Scores(self._positions, np.zeros(len(nll)), nll, nll, same, self._tops == self._targets)


def _log_sum(row: np.ndarray) -> float:
    """The logarithm of the sum of the exponentials, float64."""
    values = row.astype(np.float64)
    top = values.max()
    if not np.isfinite(top):  # not a number, or not one of them
        raise ContextError("The model's logits are not numbers.")
    return float(top + np.log(np.exp(values - top).sum()))
