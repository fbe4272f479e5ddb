"""The site: it is built without a warning, and has what it should; what is wrong in a page fails the build."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.paths import DOCS, ROOT

import llamamix

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "mkdocstrings", "material")),
    reason="mkdocs is not installed (pip install '.[docs]')",
)


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # the theme's word on another version of mkdocs
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site")
    result = build(ROOT, path)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    return path


def text_of(html: str) -> str:
    return re.sub(r"<[^>]*>", "", html)


def test_every_page_is_there(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        path = page.relative_to(DOCS).with_suffix("")
        folder = path.parent if path.name == "index" else path
        assert (site / folder / "index.html").is_file()


def test_every_public_name_has_an_anchor(site: Path) -> None:
    pages = [page.read_text(encoding="utf-8") for page in (site / "reference").rglob("index.html")]
    for name in llamamix.__all__:
        assert sum(len(re.findall(rf'<h2 id="llamamix\.{name}"', page)) for page in pages) == 1, name


def test_parameters_are_tables(site: Path) -> None:
    """With type, default and description, each in a cell of its own."""
    html = (site / "reference" / "context" / "index.html").read_text(encoding="utf-8")
    rows = [[text_of(cell).strip() for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]
            for row in re.findall(r"<tr.*?</tr>", html, re.DOTALL)]  # fmt: skip
    (row,) = [row for row in rows if row[:1] == ["n_ctx"] and len(row) == 4]
    assert row[1] == "int" and row[3] == "4096" and row[2].startswith("Cells of the KV cache")


def test_pages_are_rendered(site: Path) -> None:
    cache = (site / "cache" / "index.html").read_text(encoding="utf-8")
    assert cache.count("<table>") >= 3 and 'id="means-of-k"' in cache
    trace = (site / "trace" / "index.html").read_text(encoding="utf-8")
    assert (site / "images" / "trace.svg").is_file() and 'src="../images/trace.svg"' in trace
    for html in site.rglob("index.html"):  # no fence and no table was taken for text
        text = text_of(re.sub(r"<(pre|code).*?</\1>", "", html.read_text(encoding="utf-8"), flags=re.DOTALL))
        assert "```" not in text and not re.search(r"^\|.*\|$", text, re.MULTILINE), html


def append_to(path: str, text: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        with (root / path).open("a", encoding="utf-8") as file:
            file.write(text)

    return change


def replace_in(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / path).read_text(encoding="utf-8")
        assert text.count(old) == 1
        (root / path).write_text(text.replace(old, new), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (append_to("docs/cache.md", "\n[x](nothing.md)\n"), "'nothing.md', but the target is not found"),
        (append_to("docs/cache.md", "\n[x](trace.md#nothing)\n"), "does not contain an anchor '#nothing'"),
        (append_to("docs/cache.md", "\n[x](../README.md)\n"), "'../README.md', but the target"),
        (append_to("docs/cache.md", "\n[x][llamamix.Nothing]\n"), "cross-reference target 'llamamix.Nothing'"),
        (append_to("docs/new.md", "# New\n"), "not included in the \"nav\""),
        (replace_in("llamamix/memory.py", "n_stream (int): 1", "n_stream (int) 1"), "Failed to get 'name: "),
        (replace_in("llamamix/grammar.py", "        schema: A", "        shema: A"), "'shema' does not appear"),
    ],
    ids=["page", "anchor", "outside", "reference", "nav", "docstring", "parameter"],
)  # fmt: skip
def test_what_is_wrong_fails_the_build(change: Callable[[Path], None], warning: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("docs", "examples", "llamamix"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", root)
    change(root)
    result = build(root, tmp_path / "site")
    assert result.returncode != 0 and warning in result.stderr, result.stderr
