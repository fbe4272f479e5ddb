"""The ``llamamix`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import bench, chat, demo, eval, exec, generate, info, libdir, pull, rpc_server, selftest, serve, trace
from ._errors import EXIT_ERROR, exit_code, fail, prepare_streams
from ._options import Parser

_COMMANDS = (generate, chat, serve, rpc_server, info, bench, eval, pull, demo, trace, selftest, exec, libdir)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llamamix", description="llama.cpp with a mixed KV cache: newest tokens in F16, older ones quantised.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action=_Version)
    parser.set_defaults(run=None, parser=parser)
    commands = parser.add_subparsers(metavar="COMMAND")
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
    prepare_streams()
    if sys.stdout is None:
        fail("Standard output is closed.")
        return EXIT_ERROR
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.run is None:
        parser.print_help()
        return 0
    return exit_code(args.run, args)
