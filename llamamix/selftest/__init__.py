"""Shows that the cache does what it says: ten scenarios on caches of a bare shape, in a second and without a model.

Each compares what it expects with what the library does, and keeps the lines that the library logs about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import LibraryError, ParamsError
from . import caches, copies
from .play import Check, Play, log_lines

__all__ = ["SCENARIOS", "Check", "Result", "Scenario", "choose"]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a scenario: its checks, and the lines that the library logged about the cache."""

    name: str
    title: str
    log: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    title: str
    steps: Callable[[Play], None]

    def run(self) -> Result:
        """Play it. An error ends it and is a check that failed. Raises LibraryError when there is no library."""
        with log_lines() as lines:
            play = Play(lines)
            try:
                self.steps(play)
            except LibraryError:
                raise
            except Exception as error:  # whatever it is, it must not end the other scenarios
                play.check("goes to its end", "no error", f"{type(error).__name__}: {error}")
        return Result(self.name, self.title, tuple(lines), tuple(play.checks))


def choose(names: Sequence[str]) -> list[Scenario]:
    """Scenarios by name, all when there is none. Raises ParamsError for an unknown name."""
    known = {scenario.name: scenario for scenario in SCENARIOS}
    for name in names:
        if name not in known:
            raise ParamsError(f"{name} is not a scenario; there are {', '.join(known)}.")
    return [known[name] for name in names or known]


SCENARIOS = tuple(
    Scenario(steps.__name__, title, steps)
    for title, steps in (
        ("both caches are there, as asked for", caches.constructor),
        ("tokens go in, and out", caches.basic_ops),
        ("commit() moves the oldest tokens when hot passes 80 %", caches.quantization_trigger),
        ("find_slot() makes room, and refuses when there is none", caches.find_slot_trigger),
        ("operations on sequences act on both caches", caches.sequence_ops),
        ("other sizes work, and what can not work is refused", caches.config_variations),
        ("K and V of every layer can be reached", copies.basic_access),
        ("batch, sbatch, ubatch, find_slot, commit", copies.data_storage_and_retrieval),
        ("F16 to Q4_0 to F32 with ggml_cpy", copies.simple_ggml_cpy),
        ("rows go from an F16 cache to a Q4_0 cache", copies.copy_between_caches),
    )
)
