"""What a run measures: tests, repetitions and the order within them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import ParamsError
from ..params import N_THREADS_MAX, check_int
from .configurations import Configuration

#: llama.cpp's defaults
N_BATCH, N_UBATCH = 2048, 512

_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?:([+*])(\d{1,9}))?)?")
_N_TOKENS_MAX = 2**30
_N_VALUES_MAX = 10_000


@dataclass(frozen=True, slots=True)
class BenchTest:
    """Tokens to compute in a cache that holds others already.

    Attributes:
        n_prompt: Tokens as one prompt, 0: none.
        n_gen: Tokens one by one, 0: none.
        n_depth: Tokens in the cache before.
        n_threads: Threads; None: as many as this process may use.
    """

    n_prompt: int
    n_gen: int
    n_depth: int
    n_threads: int | None = None

    @property
    def name(self) -> str:
        """As llama-bench has it, e.g. "tg128 @ d2048"."""
        return name_of_test(self.n_prompt, self.n_gen, self.n_depth)


def name_of_test(n_prompt: int, n_gen: int, n_depth: int = 0) -> str:
    """What llama-bench calls a test."""
    what = "+".join(f"{kind}{n}" for kind, n in (("pp", n_prompt), ("tg", n_gen)) if n > 0)
    return f"{what} @ d{n_depth}" if n_depth > 0 else what


@dataclass(frozen=True, slots=True)
class Plan:
    """Every configuration runs every test.

    Args:
        configurations: The caches; the first is the baseline.
        n_prompt: Tokens of a prompt, a test each; 0: none.
        n_gen: Tokens one by one, a test each; 0: none.
        n_depth: Tokens in the cache before the tests.
        n_threads: Threads; None: as many as this process may use.
        repetitions: How often every test runs.
        n_batch: The most tokens that one call of llama_decode() gets.
        n_ubatch: The most tokens that one graph computes.
        warmup: Run every test once before its repetitions (of tokens one by one: a single one).
        one_context: Keep the cache of one configuration at a time, and the states of the others.

    Raises:
        ParamsError: For a value that can not be used.
    """

    configurations: tuple[Configuration, ...]
    n_prompt: tuple[int, ...] = (512,)
    n_gen: tuple[int, ...] = (128,)
    n_depth: tuple[int, ...] = (0,)
    n_threads: tuple[int | None, ...] = (None,)
    repetitions: int = 5
    n_batch: int = N_BATCH
    n_ubatch: int = N_UBATCH
    warmup: bool = True
    one_context: bool = False

    def __post_init__(self) -> None:
        for name in ("n_prompt", "n_gen", "n_depth"):
            for n in getattr(self, name):
                check_int(n, name, 0, _N_TOKENS_MAX)
        for n_threads in self.n_threads:
            if n_threads is not None:
                check_int(n_threads, "n_threads", 1, N_THREADS_MAX)
        check_int(self.repetitions, "repetitions", 1, 10**6)
        check_int(self.n_batch, "n_batch", 1, 2**31 - 1)
        check_int(self.n_ubatch, "n_ubatch", 1, 2**31 - 1)
        if not self.configurations:
            raise ParamsError("There is no cache to measure.")
        if not any((*self.n_prompt, *self.n_gen)):
            raise ParamsError("There is nothing to measure: -p and -n are 0.")

    @property
    def n_tokens_max(self) -> int:
        """The most tokens that a test computes."""
        return max((*self.n_prompt, *self.n_gen))

    @property
    def n_steps(self) -> int:
        """How often a cache is filled or a test runs."""
        n_tests = sum(1 for depth in self.n_depth for _ in self.tests(depth))
        return len(self.configurations) * (len(self.n_depth) + n_tests * self.repetitions)

    def tests(self, n_depth: int) -> Iterator[BenchTest]:
        """The tests at a depth, one after the other.

        Args:
            n_depth: Tokens in the cache before.
        """
        for n_threads in self.n_threads:
            for n in self.n_prompt:
                if n > 0:
                    yield BenchTest(n, 0, n_depth, n_threads)
            for n in self.n_gen:
                if n > 0:
                    yield BenchTest(0, n, n_depth, n_threads)


def order(n: int, repetition: int) -> list[int]:
    """In which order a repetition takes ``n`` configurations: there and back, then from the next one on.

    In two repetitions every configuration has the same mean place, so a machine that slows down steadily slows all of
    them alike.
    """
    start = repetition // 2 % n
    there = [(start + i) % n for i in range(n)]
    return there[::-1] if repetition % 2 else there


def int_list(texts: Sequence[str], flag: str, low: int = 0) -> tuple[int, ...]:
    """Whole numbers as llama-bench reads them: "512,1024", and ranges "1-4", "0-8192+2048", "1-64*2".

    Each is there once. Raises ParamsError for anything else and for numbers below ``low``.
    """
    values: dict[int, None] = {}
    for part in ",".join(texts).split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ParamsError(f"{flag} must be numbers or ranges such as 512,1024 or 0-8192+2048, not {part!r}.")
        first, last, operator, step = match.groups()
        value, end, by = int(first), int(last or first), int(step or 1)
        while value <= end and len(values) < _N_VALUES_MAX:
            if value < low:
                raise ParamsError(f"{flag} must be at least {low}, not {value}.")
            values[value] = None
            following = value * by if operator == "*" else value + by
            if following <= value:
                raise ParamsError(f"{flag} has the range {part!r}, which never ends.")
            value = following
    if not values:
        raise ParamsError(f"{flag} has a range that ends before it begins.")
    return tuple(values)
