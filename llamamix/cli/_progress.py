"""Bars on stderr, when that is a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ..context import Context
    from ..stats import PromptProgress

_WIDE = 80  # columns that all there is to say needs


@contextlib.contextmanager
def bars(*columns: Any) -> Iterator[Any]:
    """A ``rich.progress.Progress`` of these columns, which goes when it is over and leaves the log alone.

    A narrow terminal has the text of the columns, and no bar.
    """
    from rich.progress import BarColumn

    console = _console()
    if console.width < _WIDE:
        columns = tuple(column for column in columns if not isinstance(column, BarColumn))
    with _progress(console, *columns) as progress:
        yield progress


@contextlib.contextmanager
def file_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for files that are read and written: it is told what is being done, and the bytes done and in all."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn

    with bars(TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn()) as progress:
        task = progress.add_task("", total=None)

        def update(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield update


def _console() -> Console:
    from rich.console import Console

    console = Console(stderr=True)
    console.quiet = not console.is_terminal  # even a bar that is disabled ends a line in some versions of rich
    return console


def _progress(console: Console, *columns: Any) -> Any:
    from rich.progress import Progress

    return Progress(
        *columns,
        console=console,
        disable=not console.is_terminal,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


class PromptBar:
    """How far a context's prompt is: tokens, speed, and how hot and cold fill. It goes with stop().

    what       the word that it begins with
    is_wanted  False: nothing is shown, as where something else is on the terminal
    then       is told the same
    """

    def __init__(
        self,
        context: Context,
        what: str = "prompt",
        *,
        is_wanted: bool = True,
        then: Callable[[PromptProgress], None] | None = None,
    ) -> None:
        from rich.progress import BarColumn, TextColumn

        console = _console()
        self._context = context
        self._what = what
        self._then = then
        self._is_wide = console.width >= _WIDE
        text = TextColumn("{task.description}", markup=False)
        self._bars = _progress(console, text, *([BarColumn(bar_width=None)] if self._is_wide else []))
        self._is_shown = is_wanted and console.is_terminal
        self._task: Any = None
        self._speed = Speed()
        self.is_on: bool = False

    def __enter__(self) -> PromptBar:
        self.is_on = True
        if self._is_shown:
            self._bars.start()
        if self._is_shown or self._then is not None:
            self._context.set_progress_callback(self._tell)
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take it away; doing so twice is fine."""
        if self.is_on:
            self.is_on = False
            self._context.set_progress_callback(None)
            self._bars.stop()

    def _tell(self, progress: PromptProgress) -> None:
        if self._is_shown:
            if self._task is None:
                self._task = self._bars.add_task("", total=progress.n_tokens)
            text = line(self._what, progress, self._speed.at(progress.n_done), self._is_wide)
            self._bars.update(self._task, completed=progress.n_done, description=text)
        if self._then is not None:
            self._then(progress)


class Speed:
    """Tokens per second of a prompt, as it was when tokens were last known to be done."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._n_done = 0
        self._speed = 0.0

    def at(self, n_done: int) -> float:
        """The speed now that so many are done, 0: none are."""
        if n_done > self._n_done:
            self._n_done = n_done
            self._speed = n_done / max(time.monotonic() - self._start, 1e-9)
        return self._speed


def line(what: str, progress: PromptProgress, speed: float, is_wide: bool) -> str:
    """What there is to say of a prompt, in 70 or in 40 columns."""
    stats = progress.stats
    parts = [f"{progress.n_done}/{progress.n_tokens}"]
    if is_wide and what:
        parts.insert(0, what)
    if speed > 0:
        parts.append(f"{speed:.0f} tokens/s" if is_wide else f"{speed:.0f}/s")
    if stats is not None:
        tiers = (("hot", stats.hot_used, stats.hot_size), ("cold", stats.cold_used, stats.cold_size))
        parts += [f"{name} {used}" + (f"/{size}" if is_wide else "") for name, used, size in tiers]
    return ("  " if is_wide else " ").join(parts)
