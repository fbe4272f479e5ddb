"""The llamamix command: in this process, in one of its own, and in a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

from llamamix.cli import main

_TIMEOUT = 60  # seconds

#: exit code, stdout, stderr
Result = tuple[int, str, str]


def run(capsys: pytest.CaptureFixture[str], *args: object) -> Result:
    """Run it in this process."""
    try:
        code = main([str(a) for a in args])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def command(*args: object) -> list[str]:
    """The arguments of a process that runs it."""
    return [sys.executable, "-m", "llamamix", *map(str, args)]


def assert_error(result: Result, code: int, text: str) -> None:
    """It said so in one sentence, and nothing else."""
    assert result[0] == code and result[1] == ""
    lines = result[2].splitlines()
    assert len(lines) == 1 and lines[0].startswith("llamamix: ") and text in lines[0]


class Screen(NamedTuple):
    """What came out in a terminal: the exit code, and all that was written, with control sequences."""

    code: int
    written: str

    @property
    def lines(self) -> list[str]:
        """Lines as they were written, those included that others took the place of, without control sequences."""
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.written)
        return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def in_terminal(
    *args: object, columns: int = 80, on_text: Callable[[str, int], None] | None = None, **environment: str
) -> Screen:
    """Run it in a terminal with so many columns, which all of its streams are.

    on_text  is called with all that was written so far, whenever something was, and the terminal's descriptor, to
             which input can be written
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(environment | {"TERM": "xterm", "COLUMNS": str(columns)})
        arguments = command(*args)
        os.execv(arguments[0], arguments)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = b""
    end = time.monotonic() + _TIMEOUT
    while True:
        if not select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail(f"it did not end within {_TIMEOUT} s: {written.decode('utf-8', 'replace')[-2000:]!r}")
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # Linux's end of a terminal
            break
        if not part:
            break
        written += part
        if on_text is not None:
            on_text(written.decode("utf-8", "replace"), terminal)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return Screen(os.waitstatus_to_exitcode(status), written.decode("utf-8", "replace"))
