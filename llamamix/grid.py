"""Tables of results for people: Markdown, or rich on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import markdown

if TYPE_CHECKING:
    from rich.table import Table

_GAP = 2  # columns between columns
_NAME_MIN = 8

#: heading, aligned to the right, cells
Column = tuple[str, bool, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of text.

    caption  what all rows have in common
    columns  headings
    right    for each column whether it is aligned to the right
    rows     cells, as many as columns
    """

    caption: str
    columns: tuple[str, ...]
    right: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Caption and table."""
        return f"{self.caption}\n\n{markdown.table(self.columns, self.rows, self.right)}"

    def rich(self, width: int | None = None) -> Table:
        """Caption and table for a rich console of so many columns.

        Where numbers have room beside a name that is folded they are not folded too. Where they have none, each row
        becomes lines of a heading and a cell.
        """
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(self.caption), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
        )
        widths = self._widths(width)
        if widths is None:
            table.show_header = False
            table.add_column(style="bold")
            table.add_column(overflow="fold")
            for i, row in enumerate(self.rows):
                if i > 0:
                    table.add_row()
                for heading, cell in zip(self.columns, row, strict=True):
                    if cell:
                        table.add_row(Text(heading), Text(cell))
            return table
        for column, right, n in zip(self.columns, self.right, widths, strict=True):
            table.add_column(Text(column), justify="right" if right else "left", overflow="fold", width=n)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def _widths(self, width: int | None) -> Sequence[int | None] | None:
        """The width of each column, None: what it needs; None instead of all: there is no room for them.

        That of numbers is their own; names can be folded. So can headings, where they are in the way.
        """
        if width is None:
            return [None] * len(self.columns)
        cells = list(zip(*self.rows, strict=True))
        for headings in (self.columns, [_longest_word(column) for column in self.columns]):
            most = [max(map(len, (heading, *column))) for heading, column in zip(headings, cells, strict=True)]
            least = [
                n if right else min(_NAME_MIN, max(map(len, map(_longest_word, (heading, *column)))))
                for n, right, heading, column in zip(most, self.right, headings, cells, strict=True)
            ]
            n_free = width - sum(least) - _GAP * len(least)
            if n_free >= 0:
                for i, n in enumerate(most):
                    more = min(n - least[i], n_free)
                    least[i], n_free = least[i] + more, n_free - more
                return least
        return None


def _longest_word(text: str) -> str:
    return max(text.split(), key=len, default="")


def grid(caption: str, columns: Sequence[Column]) -> Grid:
    """A table; columns that no row has something for are left out, and so is what would control a terminal."""
    kept = [column for column in columns if any(column[2])]
    names, right, cells = zip(*kept, strict=True)
    return Grid(
        printable(caption), names, right, tuple(tuple(map(printable, row)) for row in zip(*cells, strict=True))
    )


def size(n_bytes: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{n_bytes / 2**20:.2f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.2f} GiB"


def printable(text: str) -> str:
    """Without what would control a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
