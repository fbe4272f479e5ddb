"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool] | None = None, padded: bool = True
) -> str:
    """A table, with a line break at the end.

    columns  headings
    rows     cells, as many as columns
    right    for each column whether it is aligned to the right; None: none is
    padded   fill cells with spaces, so that the text is a table to the eye as well; no: for pages with long cells
    """
    right = [False] * len(columns) if right is None else right
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (columns, *rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) if padded else 0 for i in range(len(columns))]
    rule = ["-" * ((w or 3 + r) - r) + ":" * r for w, r in zip(widths, right, strict=True)]
    head, *rest = (f"| {' | '.join(map(_align, line, widths, right))} |\n" for line in lines)
    return head + (f"| {' | '.join(rule)} |\n" if padded else f"|{'|'.join(rule)}|\n") + "".join(rest)


def _align(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)
