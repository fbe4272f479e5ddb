"""Records as a Markdown table, JSON, JSON lines or CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import markdown

if TYPE_CHECKING:
    from ..grid import Grid

Record = Mapping[str, Any]


def render(records: Sequence[Record], form: str) -> str:
    """Records that have the same keys as text in one of FORMS."""
    return FORMS[form](records)


def show(grids: Sequence[Grid], form: str | None) -> None:
    """Tables for people on stdout, in Markdown when that was asked for or stdout is no terminal; on stderr beside records.

    form  one of FORMS, None: none was asked for
    """
    from rich.console import Console

    if form == "md" or (form is None and not sys.stdout.isatty()):
        sys.stdout.write("\n".join(grid.markdown() for grid in grids))
        return
    console = Console(stderr=form is not None)
    for grid in grids:
        console.print(grid.rich(console.width))


def _md(records: Sequence[Record]) -> str:
    right = [not isinstance(value, str) for value in records[0].values()]
    return markdown.table(list(records[0]), [[_cell(value) for value in record.values()] for record in records], right)


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _json(records: Sequence[Record]) -> str:
    return json.dumps(list(records), indent=2) + "\n"


def _jsonl(records: Sequence[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _csv(records: Sequence[Record]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


FORMS: dict[str, Callable[[Sequence[Record]], str]] = {"md": _md, "json": _json, "jsonl": _jsonl, "csv": _csv}
