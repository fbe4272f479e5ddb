"""Links between the pages of this repository: each leads to a file, or a heading, that is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.markdown import anchors, links
from helpers.paths import DOCS, ROOT

PAGES = [ROOT / "README.md", ROOT / "vendor" / "README.md", *sorted(DOCS.rglob("*.md"))]


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere. Those to other sites are not followed."""
    found = []
    for link in links(page):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or not target.is_relative_to(ROOT):
            found.append(link)
        elif anchor and not anchor.startswith("llamamix.") and anchor not in anchors(target):
            found.append(link)  # anchors of the reference are made of docstrings: the site's build knows them
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_broken_links_are_found() -> None:
    page = DOCS / "testing.md"
    assert len(links(ROOT / "README.md")) > 15 and "tests" in anchors(page)
    assert {"when-tokens-move", "means-of-k", "speculation-and-other-rollbacks"} <= anchors(DOCS / "cache.md")


@pytest.mark.parametrize(
    "link", ["cache.md#nothing", "nothing.md", "../nothing/README.md", "images/nothing.svg", "#nothing"]
)
def test_a_link_that_leads_nowhere_is_found(link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "cache.md").write_text("# The cache\n\n## Means of K\n")
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n[right](cache.md#means-of-k), [wrong]({link}), [right](#page), ![right](cache.md)\n")
    assert broken(page) == [link]
