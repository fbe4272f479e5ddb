"""Bars on stderr, when that is a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def bars(*columns: Any) -> Iterator[Any]:
    """A ``rich.progress.Progress`` of these columns, which goes when it is over and leaves the log alone."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(
        *columns,
        console=console,
        disable=not console.is_terminal,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as progress:
        yield progress
