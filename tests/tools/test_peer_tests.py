"""tools/peer_tests.py: how it reads what programs say, and what it makes of it. Running them takes minutes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.tools import load_tool


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    return load_tool("peer_tests")


def test_summaries(peer: ModuleType) -> None:
    assert peer._summary("|a|OK|\nSummary: all 2 test(s) passed\n") == ["OK", "OK"]
    assert peer._summary("Summary: 3 test(s) executed, 1 failed\n") == ["OK", "OK", "FAIL"]
    assert peer._summary("Segmentation fault") == peer._summary("Summary: no tests executed") == []


@pytest.mark.parametrize(
    ("code", "output", "statuses", "spec", "counts", "reason"),
    [
        (0, "", ["PASS", "SKIP", "PASS"], None, {"passed": 2, "skipped": 1}, ""),
        (0, "", [], "hot=16", {"passed": 1}, ""),
        (1, "", ["PASS", "FAIL"], "hot=16", {"passed": 1, "failed": 1}, ""),
        (-11, "last words", [], None, {"failed": 1}, "exit code -11: last words"),
        (-11, "last words", ["PASS"], "hot=16", {"passed": 1, "failed": 1}, "exit code -11: last words"),
        (-11, "E no mixed KV cache for a x model: why\nmore", ["PASS"], "hot=16", {"n/a": 1}, "no mixed KV cache for a x model: why"),
        (-11, "E no mixed KV cache for a x model: why\nmore", [], None, {"failed": 1}, "exit code -11: more"),
        (1, "too small\n8 is too small to corrupt", ["PASS", "FAIL"], "hot=16", {"passed": 1, "n/a": 1}, "its quantised state is too small to be damaged"),
        (1, "8 is too small to corrupt", ["FAIL", "FAIL"], "hot=16", {"failed": 2}, ""),
    ],
)  # fmt: skip
def test_outcomes(
    peer: ModuleType, tiny_model_path: Path, code: int, output: str, statuses: list[str], spec: str, counts: dict, reason: str
) -> None:  # fmt: skip
    outcome = peer.Upstream(Path("nowhere"))._outcome(code, output, statuses, [tiny_model_path], spec)
    assert ({k: n for k, n in outcome.counts.items() if n}, outcome.reason) == (counts, reason)


def test_a_refusal_is_asked_of_the_library(peer: ModuleType, tiny_model_path: Path) -> None:
    assert peer.refusal(tiny_model_path, "hot=16,cold=q4_0") == ""
    # any other reason is none
    assert peer.refusal(tiny_model_path, "hot=4,sink=8") == ""


def test_side_by_side(peer: ModuleType, capsys: pytest.CaptureFixture) -> None:
    class Suite:
        def run(self, spec: str | None) -> Iterator[tuple[str, str, Any]]:
            off = spec is None
            yield "one", "a", peer.Outcome({"passed": 2})
            yield "one", "b", peer.Outcome({"passed": 2} if off else {"n/a": 1}, "" if off else "because")
            yield "two", "c", peer.Outcome({"failed": 1})  # off as well
            yield "two", "d", peer.Outcome({"passed": 1} if off or "f16" in spec else {"failed": 1})

    records, worse = peer.compare([Suite()], ["off", "q4_0", "f16"])
    assert worse == ["two of d with the cache q4_0"]
    rows = [list(record.values()) for record in records]
    assert rows == [
        ["one", 4, 0, 0, 2, 0, 0, 1, 2, 0, 0, 1],
        ["two", 1, 1, 0, 0, 2, 0, 0, 1, 1, 0, 0],
    ]
    assert "one b q4_0: because" in capsys.readouterr().err
