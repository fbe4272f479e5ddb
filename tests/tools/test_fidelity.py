"""The tables of docs/fidelity.md are what the recordings say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.evaluations import make_row, reference
from helpers.paths import DOCS
from helpers.tools import load_tool

tool = load_tool("fidelity")

PAGE = """# A page

<!-- table: overview smol 2048 -->
what was there before
<!-- end -->

words

<!-- table: details smol 2048 decode -->
<!-- end -->

how

<!-- commands -->
<!-- end -->
"""

ROWS = [
    row
    for leg in ("prompt", "decode")
    for row in (
        reference(leg=leg, model_filename="SmolLM2.gguf"),
        make_row(leg=leg, model_filename="SmolLM2.gguf"),
        make_row(leg=leg, model_filename="SmolLM2.gguf", cache="mixed", kv_bytes=21),
        make_row(leg=leg, model_filename="SmolLM2.gguf", cache="mixed, no sinks", role="ablation"),
        make_row(leg=leg, model_filename="gemma.gguf", model_sha256="2" * 64, cache="another"),
    )
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    page, recording = tmp_path / "page.md", tmp_path / "run.jsonl"
    page.write_text(PAGE)
    recording.write_text("".join(json.dumps(row.record()) + "\n" for row in [*ROWS, ROWS[1]]))
    return page, recording


def run(*args: object) -> int:
    return tool.main(list(map(str, args)))


def test_tables(files: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, recording = files
    picture = ("--plot", tmp_path / "a.svg", "smol", 2048)
    assert run(recording, "--page", page, "--check") == 1 and page.read_text() == PAGE
    assert run(recording, "--page", page, *picture) == 0
    text = page.read_text()
    overview, rest = text.split("words")
    details, how = rest.split("how")
    assert "what was there before" not in text and text.startswith("# A page\n\n<!-- table: overview smol 2048 -->\n\n")
    rows = [line.split("|")[1].strip() for line in overview.splitlines() if line.startswith("|")][2:]
    assert rows == ["q8_0", "mixed"]  # no ablation, no other model, nothing twice
    rows = [line.split("|")[1].strip() for line in details.splitlines() if line.startswith("|")][2:]
    assert rows == ["f16", "q8_0", "mixed"]
    assert "decode: 1023 positions" in details and "prompt:" not in details
    assert how.count("llamamix eval -m") == len(tool.RUNS) and "docs/data/fidelity-smollm2-2k.jsonl" in how
    assert "<svg" in (tmp_path / "a.svg").read_text()
    # once more it is the same
    assert run(recording, "--page", page, "--check") == 0
    assert run(recording, "--page", page, *picture) == 0 and page.read_text() == text


def test_ablations() -> None:
    text = tool.table("ablation smol 2048", ROWS)
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")][2:]
    assert rows == ["mixed", "mixed, no sinks"]


def test_lookups() -> None:
    found = replace(ROWS[1], lookup_distances=(100,), lookup_found=(1,))
    assert "1/1" in tool.table("lookups smol 2048", [found])


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("overview smol", "A table is one of overview"),
        ("graph smol 2048", "not 'graph smol 2048'"),
        ("overview smol many", "A table is one of"),
        ("overview llama 2048", "nothing for the table 'overview llama 2048'"),
        ("overview smol 8192", "nothing for the table"),
        ("lookups smol 2048", "nothing for the table"),
    ],
)
def test_tables_that_there_are_not(what: str, text: str) -> None:
    with pytest.raises(tool.FidelityError, match=text):
        tool.table(what, ROWS)


def test_what_goes_wrong(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, recording = files
    page.write_text("no table")
    assert run(recording, "--page", page) == 1
    assert capsys.readouterr().err == "fidelity.py: The page has no table to fill.\n"
    assert run(tmp_path / "missing", "--page", page) == 1 and "No such file" in capsys.readouterr().err
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    assert run("--page", page) == 1 and "no recording in docs/data" in capsys.readouterr().err


def test_recording(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The commands of the page, with what the command line knows; one that fails ends it."""
    from llamamix.cli import _parser

    ran: list[list[str]] = []
    codes = iter([0] * len(tool.RUNS) + [130])

    def run_command(command: list[str], **_options: object) -> Any:
        ran.append(command[1:])
        return SimpleNamespace(returncode=next(codes))

    monkeypatch.setattr(tool.subprocess, "run", run_command)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    assert run("--record") == 0
    assert [command[-1] for command in ran] == [f"docs/data/fidelity-{name}.jsonl" for name in tool.RUNS]
    for command in ran:
        assert command[:2] == ["-m", "llamamix"]
        args = _parser().parse_args(command[2:])
        assert args.f32 and args.model
    assert (tmp_path / "docs" / "data").is_dir()
    capsys.readouterr()
    assert run("--record", "smollm2-8k") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "fidelity.py: smollm2-8k has not come to its end; it goes on where it was when this is run again."
    )
    assert run("--record", "smollm3") == 1 and "There is no evaluation smollm3; there are" in capsys.readouterr().err


def test_the_page() -> None:
    """What it shows is what was recorded."""
    assert list((DOCS / "data").glob("fidelity-*.jsonl")) != []
    assert tool.main(["--check"]) == 0
