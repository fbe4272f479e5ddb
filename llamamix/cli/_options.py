"""Options that several commands have, named as llama.cpp names them."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any


def add_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("-v", "--verbose", action="store_true", help="show llama.cpp's log on stderr")
    return parser


def add_kv_mixed(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--kv-mixed", metavar="SPEC", default=True,
        help="the mixed KV cache, e.g. hot=512,cold=q4_0,group=128,threshold=0.8,sink=4; 1: its defaults,"
        " off: a plain cache (default: 1)",
    )  # fmt: skip


def add_threads(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: as many as there are CPUs)")


def start_log(args: argparse.Namespace) -> None:
    """Send llama.cpp's log to stderr when asked to."""
    if args.verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")


def model_path(name: str) -> Path:
    """A model given by its path or its name, pulled when needed."""
    from ..pull import console_progress, resolve

    with console_progress() as progress:
        return resolve(name, progress)
