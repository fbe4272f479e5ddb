"""What all pictures have in common: matplotlib, which may be missing, and a file at the end."""

from __future__ import annotations

import os
from typing import Any

from .errors import LlamamixError


def check_matplotlib(error: type[LlamamixError]) -> None:
    """Raise an error of that class when there is none."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise error("A plot needs matplotlib; pip install 'llamamix[plot]' adds it.") from None


def save(figure: Any, path: str | os.PathLike[str], error: type[LlamamixError]) -> None:
    """Write a picture; the ending of the path says in which format.

    Raises an error of that class when that is no format, and OSError when the file can not be written.
    """
    try:
        figure.savefig(path, dpi=120)
    except ValueError as reason:
        raise error(f"{path} can not be drawn: {reason}.") from None
