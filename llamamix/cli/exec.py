"""llamamix exec: one of the fork's programs, as it is."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

from ._options import add_command


def register(commands: Any) -> None:
    parser = add_command(
        commands, "exec",
        "Run a program of llama.cpp that came with this install. There are llama-server, llama-cli, llama-completion,"
        " llama-perplexity and llama-bench. All that follows the name is the program's own.",
        "PROGRAM [ARG ...]",
    )  # fmt: skip
    parser.set_defaults(run=_run)
    parser.add_argument("program", metavar="PROGRAM", help="its name, with or without llama-")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARG", help="its arguments")


def _run(args: argparse.Namespace) -> int:
    from ..programs import find_program

    program = find_program(args.program)
    command = [str(program), *args.args]
    if sys.platform == "win32":  # there, exec leaves the shell without the program
        return subprocess.run(command).returncode
    sys.stdout.flush()
    os.execv(program, command)
