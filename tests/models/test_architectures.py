"""Upstream's toy models of all architectures, by tools/architectures.py: mixed or refused as the page says.

What is mixed gives the logits of a plain cache, whatever programs do with its sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.paths import DOCS
from helpers.processes import find_program
from helpers.tools import load_tool

from llamamix import Context, Model

PAGE = DOCS / "architectures.md"


@pytest.fixture(scope="module")
def architectures() -> Any:
    return load_tool("architectures")


@pytest.fixture(scope="module")
def toys(architectures: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = architectures.make_toys(find_program("test-llama-archs"), tmp_path_factory.mktemp("toys"))
    assert len(paths) > 100
    return paths


def test_all_architectures(architectures: Any, toys: list[Path]) -> None:
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(architectures.check_apart, toys))
    wrong = {row["arch"]: row for row in rows if row["status"] not in ("mixed", "refused")}
    assert {arch: f"{row['status']}: {row['reason']}" for arch, row in wrong.items()} == {}

    def table(lines: list[str]) -> list[list[str]]:
        return [line.split(" | ")[:5] for line in lines]  # without the last column: what is measured varies

    written = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert table(written) == table(architectures.table(rows).splitlines()[2:])


#
# what that would notice
#


class Instead:
    """An object with a method of another kind; everything else is passed on."""

    def __init__(self, real: Any, **others: Any) -> None:
        self.__dict__.update(others, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def copy_without_a_row(context: Context) -> Any:
    def seq_cp(src: int, dst: int) -> None:
        context.memory.seq_cp(src, dst)
        context.memory.seq_rm(dst, 30, 31)

    return Instead(context, memory=Instead(context.memory, seq_cp=seq_cp))


def shift_without_a_row(context: Context) -> Any:
    def seq_add(seq: int, p0: int, p1: int, delta: int) -> None:
        context.memory.seq_add(seq, p0, 40, delta)
        context.memory.seq_rm(seq, 40, 41)
        context.memory.seq_add(seq, 41, p1, delta)

    return Instead(context, memory=Instead(context.memory, seq_add=seq_add))


def no_way_back(context: Context) -> Any:
    return Instead(context, memory=Instead(context.memory, seq_rm=lambda *_: None))


def state_without_a_row(context: Context) -> Any:
    def state_load(state: bytes, seq: int | None = None) -> None:
        context.state_load(state, seq)
        context.memory.seq_rm(0 if seq is None else seq, 30, 31)

    return Instead(context, state_load=state_load)


@pytest.mark.parametrize(
    ("broken", "steps"),
    [
        (copy_without_a_row, {"decode a copy"}),
        (shift_without_a_row, {"decode after a shift"}),
        (no_way_back, {"decode after a rollback"}),
        (
            state_without_a_row,
            {
                "decode a restored sequence",
                "decode it as another sequence",
                "decode sequence 0 of a restored context",
            },
        ),
    ],
)
@pytest.mark.parametrize("toy", ["llama-dense", "gpt2-dense"])
def test_a_mistake_would_show(
    toy: str,
    broken: Callable[[Context], Any],
    steps: set[str],
    architectures: Any,
    toys: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In both kinds of rows, with and without streams; gpt2's values jump."""
    play = architectures.play
    monkeypatch.setattr(
        architectures, "play", lambda context, *args: play(broken(context) if context.kv_mixed else context, *args)
    )
    with Model(next(path for path in toys if path.stem == toy)) as model:
        found = architectures.check_operations(model, np.arange(250) * 7 % 90 + 5)
    for step in steps:
        assert len([name for name in found if name.startswith(f"{step} (")]) == 4, found
