"""Exceptions as a sentence and an exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ..errors import ContextError, LlamamixError, ParamsError
from ._flags import with_flags

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_PIPE = 141  # 128 + SIGPIPE


def exit_code(run: Callable[[Any], int | None], args: Any) -> int:
    """Run a command, which returns its exit code or None for 0. LLAMAMIX_DEBUG=1 shows where an error comes from."""
    try:
        code = run(args)
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:
        _drop_stdout()  # the reader has gone
        return EXIT_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (LlamamixError, OSError) as error:
        if os.environ.get("LLAMAMIX_DEBUG") == "1":
            traceback.print_exc()
        fail(_sentence(error))
        if isinstance(error, OSError):
            _drop_stdout()  # it may be what can not be written
        return EXIT_USAGE if isinstance(error, ParamsError) else EXIT_ERROR


def fail(sentence: str) -> None:
    """Say on stderr what went wrong."""
    print(f"llamamix: {sentence}", file=sys.stderr)


def _sentence(error: LlamamixError | OSError) -> str:
    if isinstance(error, (ParamsError, ContextError)):
        return with_flags(str(error))
    if isinstance(error, OSError) and error.strerror:
        what = f"{os.fsdecode(error.filename)} can not be used" if error.filename else "The output can not be written"
        return f"{what}: {error.strerror}."
    return str(error)


def _drop_stdout() -> None:
    """Keep Python from finding out again, when it flushes at exit, that stdout can not be written."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


#
# standard streams
#


def prepare_streams() -> None:
    """Make the standard streams fit for what follows.

    A file that is opened must not get the number of one that is closed, as everything written to that would go into
    it. Characters that a stream can not show become question marks.
    """
    closed = [number for number in range(3) if not _is_open(number)]
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
