"""Forked processes: what they can not use of the process before them; they are told so and do not wait forever."""

from __future__ import annotations

import os

from ._ffi import ffi, lib
from .errors import LlamamixError

_computed_by = 0  # the process that has computed with several threads


def check_process(pid: int, name: str, error: type[LlamamixError]) -> None:
    """Refuse to use what process ``pid`` made: its threads, which compute and may hold locks, were not forked."""
    if os.getpid() != pid:
        raise error(
            f"The {name} belongs to the process that made it, from which this one was forked; make another one here, or"
            " start processes with the method 'spawn'."
        )


def note_threads(n_threads: int) -> None:
    """Something is about to be computed with so many threads."""
    global _computed_by
    if n_threads > 1:
        _computed_by = os.getpid()


def check_threads(n_threads: int, error: type[LlamamixError]) -> None:
    """Refuse to compute with several threads after a fork where OpenMP would wait for those of the process before."""
    if n_threads > 1 and _computed_by not in (0, os.getpid()) and _has_openmp():
        raise error(
            "This process was forked from one that had computed with several threads, and OpenMP's threads are not"
            " forked; compute with one (n_threads=1), or start processes with the method 'spawn'."
        )


def _has_openmp() -> bool:
    return b"OPENMP = 1" in ffi.string(lib.llama_print_system_info())
