"""The links of a chain of samplers, each one of llama.cpp's, and what SamplingParams are as a chain.

    sampler = Sampler(model, [TopK(40), TopP(0.9), Temperature(0.7), Draw(seed=1)])

Links change the candidates one after the other; the last one takes a token. What a link does and where it comes from is
written in llama.cpp's llama.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ._ffi import ffi, lib
from .errors import ParamsError
from .params import RANDOM_SEED, SamplingParams, check_float, check_int, check_logit_bias

_INT_MAX = 2**31 - 1
_COUNT_MAX = 2**20


@dataclass(frozen=True, slots=True)
class Link:
    """A sampler in a chain.

    Attributes:
        takes (bool): True for those that take a token; the last one of a chain must be one, and no other one is of use.
    """

    takes: ClassVar[bool] = False

    def make(self, vocab: Any, n_vocab: int) -> Any:
        """A new ``struct llama_sampler *`` for a vocabulary, a ``const struct llama_vocab *``."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class LogitBias(Link):
    """Adds numbers to the logits of tokens.

    Args:
        biases: Token id → number; -inf bans the token.

    Raises:
        ParamsError: For what is no bias; when a chain is made, for tokens that the vocabulary does not have.
    """

    biases: Mapping[int, float]

    def __post_init__(self) -> None:
        check_logit_bias(self.biases)

    def make(self, vocab: Any, n_vocab: int) -> Any:
        c_biases = ffi.new("struct llama_logit_bias[]", len(self.biases))
        for item, (token, bias) in zip(c_biases, self.biases.items(), strict=True):
            if not 0 <= token < n_vocab:
                raise ParamsError(f"Token {token} is not in the vocabulary (0 to {n_vocab - 1}).")
            item.token, item.bias = int(token), float(bias)
        return lib.llama_sampler_init_logit_bias(n_vocab, len(self.biases), c_biases)


@dataclass(frozen=True, slots=True)
class Penalties(Link):
    """Makes recent tokens less likely.

    Args:
        last_n: How many tokens are recent; 0: none.
        repeat: Divides their logits where these are positive, multiplies them where not, over 0 ([Keskar et al.
            2019](https://arxiv.org/abs/1909.05858)); 1: off.
        frequency: Is subtracted for every occurrence.
        presence: Is subtracted when one occurred at all.

    Raises:
        ParamsError: For a value that can not be used.
    """

    last_n: int = 64
    repeat: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0

    def __post_init__(self) -> None:
        check_int(self.last_n, "last_n", 0, _COUNT_MAX)
        if check_float(self.repeat, "repeat") <= 0:
            raise ParamsError(f"repeat must be over 0, not {self.repeat:g}.")
        check_float(self.frequency, "frequency")
        check_float(self.presence, "presence")

    def make(self, vocab: Any, n_vocab: int) -> Any:
        return lib.llama_sampler_init_penalties(n_vocab, self.last_n, self.repeat, self.frequency, self.presence)


@dataclass(frozen=True, slots=True)
class Dry(Link):
    """Makes tokens less likely that would go on with a repetition of what was there before (DRY).

    A repetition of n tokens, n of at least ``allowed_length``, costs the next token's logit ``multiplier * base ** (n -
    allowed_length)``.

    Args:
        multiplier: How much; 0: off.
        base: 1 or more.
        allowed_length: Shorter repetitions, in tokens, are fine.
        last_n: How many tokens are looked at; 0: none.
        breakers: Texts over which no repetition goes.

    Raises:
        ParamsError: For a value that can not be used.
    """

    multiplier: float = 0.8
    base: float = 1.75
    allowed_length: int = 2
    last_n: int = 64
    breakers: tuple[str, ...] = ("\n", ":", '"', "*")

    def __post_init__(self) -> None:
        check_float(self.multiplier, "multiplier", 0.0)
        check_float(self.base, "base", 1.0)
        check_int(self.allowed_length, "allowed_length", 0, _COUNT_MAX)
        check_int(self.last_n, "last_n", 0, _COUNT_MAX)
        for text in self.breakers:
            if not isinstance(text, str) or not text or "\0" in text:
                raise ParamsError(f"breakers must be texts of a character or more, not {text!r}.")

    def make(self, vocab: Any, n_vocab: int) -> Any:
        texts = [ffi.new("char[]", text.encode("utf-8", "replace")) for text in self.breakers]
        return lib.llama_sampler_init_dry(
            vocab, self.multiplier, self.base, self.allowed_length, self.last_n,
            ffi.new("char *[]", texts), len(texts),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TopK(Link):
    """Keeps the most likely tokens.

    Args:
        k: How many; 0: all.

    Raises:
        ParamsError: For a value that can not be used.
    """

    k: int = 40

    def __post_init__(self) -> None:
        check_int(self.k, "k", 0, _INT_MAX)

    def make(self, vocab: Any, n_vocab: int) -> Any:
        return lib.llama_sampler_init_top_k(self.k)


@dataclass(frozen=True, slots=True)
class TopP(Link):
    """Keeps the most likely tokens whose probabilities sum up to p ([Holtzman et al.
    2019](https://arxiv.org/abs/1904.09751)).

    Args:
        p: 0 to 1; 1: all.
        min_keep: How many stay in any case.

    Raises:
        ParamsError: For a value that can not be used.
    """

    p: float = 0.95
    min_keep: int = 1

    def __post_init__(self) -> None:
        _check_share(self)

    def make(self, vocab: Any, n_vocab: int) -> Any:
        return lib.llama_sampler_init_top_p(self.p, self.min_keep)


@dataclass(frozen=True, slots=True)
class MinP(Link):
    """Drops tokens less likely than p times the most likely one ([Nguyen et al.
    2024](https://arxiv.org/abs/2407.01082)).

    Args:
        p: 0 to 1; 0: none are dropped.
        min_keep: How many stay in any case.

    Raises:
        ParamsError: For a value that can not be used.
    """

    p: float = 0.05
    min_keep: int = 1

    def __post_init__(self) -> None:
        _check_share(self)

    def make(self, vocab: Any, n_vocab: int) -> Any:
        return lib.llama_sampler_init_min_p(self.p, self.min_keep)


@dataclass(frozen=True, slots=True)
class Typical(Link):
    """Locally typical sampling: keeps the tokens whose surprise is nearest to the expected one, as many as have
    probabilities that sum up to p ([Meister et al. 2022](https://arxiv.org/abs/2202.00666)).

    Args:
        p: 0 to 1; 1: all.
        min_keep: How many stay in any case.

    Raises:
        ParamsError: For a value that can not be used.
    """

    p: float = 1.0
    min_keep: int = 1

    def __post_init__(self) -> None:
        _check_share(self)

    def make(self, vocab: Any, n_vocab: int) -> Any:
        return lib.llama_sampler_init_typical(self.p, self.min_keep)


@dataclass(frozen=True, slots=True)
class TopNSigma(Link):
    """Keeps the tokens whose logits are within n standard deviations of the best one ([Tang et al.
    2024](https://arxiv.org/abs/2411.07641)).

    Args:
        n: 0 or more.

    Raises:
        ParamsError: For a value that can not be used.
    """

    n: float = 1.0

    def __post_init__(self) -> None:
        check_float(self.n, "n", 0.0)

    def make(self, vocab: Any, n_vocab: int) -> Any:
        return lib.llama_sampler_init_top_n_sigma(self.n)


@dataclass(frozen=True, slots=True)
class Xtc(Link):
    """With a probability, drops all tokens over a threshold but for the least likely of them (XTC).

    Args:
        probability: 0 to 1.
        threshold: 0 to 1; over 0.5 it does nothing.
        min_keep: How many tokens stay in any case.
        seed: 0 to 2**32 - 2; None: a different one each time.

    Raises:
        ParamsError: For a value that can not be used.
    """

    probability: float = 0.5
    threshold: float = 0.1
    min_keep: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        check_float(self.probability, "probability", 0.0, 1.0)
        check_float(self.threshold, "threshold", 0.0, 1.0)
        check_int(self.min_keep, "min_keep", 0, _COUNT_MAX)
        _check_seed(self.seed)

    def make(self, vocab: Any, n_vocab: int) -> Any:
        return lib.llama_sampler_init_xtc(self.probability, self.threshold, self.min_keep, _seed(self.seed))


@dataclass(frozen=True, slots=True)
class Temperature(Link):
    """Divides the logits by a temperature.

    Args:
        t: The temperature; 0: the best token only.
        delta: The temperature is from ``t - delta`` to ``t + delta``: the lower the entropy, the lower it is.
        exponent: The share of the largest entropy is taken to this power.

    Raises:
        ParamsError: For a value that can not be used.
    """

    t: float = 0.8
    delta: float = 0.0
    exponent: float = 1.0

    def __post_init__(self) -> None:
        check_float(self.t, "t", 0.0)
        check_float(self.delta, "delta", 0.0)
        check_float(self.exponent, "exponent", 0.0)

    def make(self, vocab: Any, n_vocab: int) -> Any:
        return lib.llama_sampler_init_temp_ext(self.t, self.delta, self.exponent)


@dataclass(frozen=True, slots=True)
class Greedy(Link):
    """Takes the most likely token."""

    takes: ClassVar[bool] = True

    def make(self, vocab: Any, n_vocab: int) -> Any:
        return lib.llama_sampler_init_greedy()


@dataclass(frozen=True, slots=True)
class Draw(Link):
    """Takes a token at random, each as likely as the candidates say.

    Args:
        seed: 0 to 2**32 - 2; None: a different one each time.

    Raises:
        ParamsError: For a value that can not be used.
    """

    takes: ClassVar[bool] = True

    seed: int | None = None

    def __post_init__(self) -> None:
        _check_seed(self.seed)

    def make(self, vocab: Any, n_vocab: int) -> Any:
        return lib.llama_sampler_init_dist(_seed(self.seed))


@dataclass(frozen=True, slots=True)
class Mirostat(Link):
    """Takes a token at random, so that the text's surprise stays near a target ([Basu et al.
    2020](https://arxiv.org/abs/2007.14966)).

    Args:
        tau: The surprise to aim at, in bits.
        eta: How fast it is followed.
        seed: 0 to 2**32 - 2; None: a different one each time.
        version: 1 or 2.
        m: Version 1: tokens by which the distribution is estimated, 2 or more.

    Raises:
        ParamsError: For a value that can not be used.
    """

    takes: ClassVar[bool] = True

    tau: float = 5.0
    eta: float = 0.1
    seed: int | None = None
    version: int = 2
    m: int = 100

    def __post_init__(self) -> None:
        check_float(self.tau, "tau", 0.0)
        check_float(self.eta, "eta", 0.0)
        check_int(self.version, "version", 1, 2)
        check_int(self.m, "m", 2, _COUNT_MAX)
        _check_seed(self.seed)

    def make(self, vocab: Any, n_vocab: int) -> Any:
        if self.version == 1:
            return lib.llama_sampler_init_mirostat(n_vocab, _seed(self.seed), self.tau, self.eta, self.m)
        return lib.llama_sampler_init_mirostat_v2(_seed(self.seed), self.tau, self.eta)


def links_of(params: SamplingParams) -> list[Link]:
    """The chain that SamplingParams stand for, in llama.cpp's order."""
    links: list[Link] = [LogitBias(params.logit_bias)] if params.logit_bias else []
    penalties = params.repeat_penalty, params.frequency_penalty, params.presence_penalty
    links.append(Penalties(params.repeat_last_n, *penalties))
    if params.temperature == 0:
        return [*links, Greedy()]
    return [
        *links,
        TopK(params.top_k),
        Typical(params.typical_p),
        TopP(params.top_p),
        MinP(params.min_p),
        Temperature(params.temperature),
        Draw(params.seed),
    ]


def _check_share(link: TopP | MinP | Typical) -> None:
    check_float(link.p, "p", 0.0, 1.0)
    check_int(link.min_keep, "min_keep", 0, _COUNT_MAX)


def _check_seed(seed: int | None) -> None:
    if seed is not None:
        check_int(seed, "seed", 0, RANDOM_SEED - 1)


def _seed(seed: int | None) -> int:
    return RANDOM_SEED if seed is None else seed
