"""Records as a Markdown table, JSON, JSON lines or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def render(records: Sequence[Record], form: str) -> str:
    """Records that have the same keys as text in one of FORMS."""
    return FORMS[form](records)


def _md(records: Sequence[Record]) -> str:
    rows = [list(records[0]), *([_cell(value) for value in record.values()] for record in records)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [not isinstance(value, str) for value in records[0].values()]
    rule = [("-" * (w - 1) + ":") if n else "-" * w for w, n in zip(widths, numeric, strict=True)]
    lines = [
        "| " + " | ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)) + " |"
        for row in (rows[0], rule, *rows[1:])
    ]
    return "\n".join(lines) + "\n"


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
