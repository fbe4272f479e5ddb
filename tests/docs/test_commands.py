"""The commands that README.md and the pages show: there are such options, and what is said to be printed is printed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.markdown import commands, fences
from helpers.paths import DOCS, ROOT

import llamamix.cli

PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def shown(page: Path) -> list[tuple[list[str], str]]:
    """The arguments of every ``llamamix`` that a page runs, and what it prints, nothing where that is not shown."""
    found = []
    for fence in fences(page):
        for line, output in commands(fence):
            for part in re.split(r" && | \| ", line):
                words = shlex.split(part, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    del words[0]
                if words[:1] == ["llamamix"]:
                    found.append((words[1:], output))
    return found


ALL = [(page, arguments, output) for page in PAGES for arguments, output in shown(page)]


def test_commands_are_found() -> None:
    assert {arguments[0] for _, arguments, _ in ALL} >= {
        "bench", "demo", "eval", "generate", "info", "pull", "selftest", "serve", "trace",
    }  # fmt: skip
    assert len(ALL) > 30


@pytest.mark.parametrize(
    "arguments", [a for _, a, _ in ALL], ids=[f"{page.stem}: {' '.join(a)}"[:70] for page, a, _ in ALL]
)
def test_there_are_such_options(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser takes them; nothing is run."""
    ran: list[Callable[..., None]] = []

    def exit_code(run: Callable[..., None], _args: object) -> int:
        ran.append(run)
        return 0

    monkeypatch.setattr(llamamix.cli, "exit_code", exit_code)
    assert llamamix.cli.main(arguments) == 0 and len(ran) == 1


def test_what_info_prints(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It depends on nothing but the model."""
    infos = [(arguments, output) for _, arguments, output in ALL if arguments[0] == "info" and output]
    assert len(infos) >= 1
    for arguments, output in infos:
        assert llamamix.cli.main(arguments) == 0
        assert capsys.readouterr().out == output
