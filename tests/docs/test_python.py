"""The Python of README.md and the pages: it runs, block by block, and prints what the pages say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.markdown import fences
from helpers.paths import DOCS, ROOT

PAGES = [ROOT / "README.md", DOCS / "index.md", DOCS / "tutorial.md", *sorted((DOCS / "reference").glob("*.md"))]
WITH_PYTHON = [page for page in PAGES if any(fence.language == "python" for fence in fences(page))]


def without_times(text: str) -> str:
    return re.sub(r"\d+ µs", "... µs", text)


def test_pages_have_python() -> None:
    assert {"README.md", "index.md", "tutorial.md"} <= {page.name for page in WITH_PYTHON}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_blocks_run(page: Path, smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page share their names; what a block prints is the block of text behind it, where there is one."""
    (tmp_path / "model.gguf").symlink_to(smollm2_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    printed = ""
    n_compared = 0
    for fence in fences(page):
        if fence.language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(fence.text, f"{page.name}, block of line {fence.line}", "exec"), names)
            printed = output.getvalue()
        elif fence.language == "text":
            assert without_times(printed) == without_times(fence.text), f"{page.name}, line {fence.line}"
            n_compared += 1
    if page.name == "tutorial.md":
        assert n_compared >= 4
