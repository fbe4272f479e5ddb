"""What a page of Markdown has: its fenced blocks, its links, and the anchors that links can lead to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

_PARSER = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Fence:
    """A fenced block: the line that it begins in (from 1), its language, its text."""

    line: int
    language: str
    text: str


def _tokens(path: Path) -> list[Token]:
    return _PARSER.parse(path.read_text(encoding="utf-8"))


def fences(path: Path) -> list[Fence]:
    found = []
    for token in _tokens(path):
        if token.type == "fence":
            assert token.map is not None
            found.append(Fence(token.map[0] + 1, token.info.strip(), token.content))
    return found


def links(path: Path) -> list[str]:
    """Where links and images lead, as it is written there."""
    inline = [child for token in _tokens(path) for child in token.children or ()]
    found = [token.attrGet("href" if token.type == "link_open" else "src") for token in inline]
    return [str(target) for target in found if target is not None]


def anchors(path: Path) -> set[str]:
    """Those of headings: lower case, blanks as hyphens, nothing else but letters, digits, hyphens and underscores."""
    tokens = _tokens(path)
    texts = []
    for heading, content in zip(tokens, tokens[1:], strict=False):
        if heading.type == "heading_open":
            texts.append("".join(child.content for child in content.children or ()))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def commands(fence: Fence) -> list[tuple[str, str]]:
    """The commands of a block and what they print: all lines of sh, those behind a $ of console."""
    text = fence.text.replace("\\\n", " ")
    if fence.language == "sh":
        return [(line, "") for line in text.splitlines() if line.strip()]
    if fence.language != "console":
        return []
    found = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        found.append((command, output))
    return found
