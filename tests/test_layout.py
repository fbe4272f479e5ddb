"""Where tests and what they share lie."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.paths import ROOT

TESTS = ROOT / "tests"


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_nothing_is_imported_from_a_test(path: Path) -> None:
    """Nor by the programs that tests write: what several need is in tests/helpers."""
    imports = re.findall(r"^\s*(?:from|import)\s+(.+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert [line for line in imports if re.search(r"\btest_\w+|\bconftest\b", line)] == []


def test_every_test_is_in_a_folder() -> None:
    assert sorted(path.name for path in TESTS.glob("*.py")) == ["conftest.py", "test_layout.py"]
