"""The ``llamamix`` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import bench, demo, eval, exec, generate, info, libdir, pull, selftest, serve, trace
from ._errors import exit_code

_COMMANDS = (generate, serve, info, bench, eval, pull, demo, trace, selftest, exec, libdir)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamamix", description="llama.cpp with a mixed KV cache: newest tokens in F16, older ones quantised.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.register(commands)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_args: object) -> None:
        from .. import __version__

        print(f"llamamix {__version__}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = _parser().parse_args(argv)
    return exit_code(args.run, args)
