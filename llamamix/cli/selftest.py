"""llamamix selftest: what the cache does, checked live."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ._options import add_command, start_log
from ._output import FORMS, render

if TYPE_CHECKING:
    from ..selftest import Result


def register(commands: Any) -> None:
    parser = add_command(
        commands, "selftest", "Play through what the cache does and check it. No model is needed.",
        usage="[SCENARIO ...] [-o FORM]",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO", help="default: all")
    parser.add_argument(
        "-o", "--output", metavar="FORM", choices=["text", *FORMS], default="text",
        help="text (default), md, json, jsonl or csv",
    )  # fmt: skip


def _run(args: argparse.Namespace) -> None:
    from ..errors import LlamamixError
    from ..selftest import choose

    start_log(args)
    results = []
    for scenario in choose(args.scenario):
        results.append(scenario.run())
        if args.output == "text":
            _show(results[-1])
    if args.output != "text":
        print(render([record for result in results for record in _records(result)], args.output), end="")
    failed = [result.name for result in results if not result.ok]
    if failed:
        raise LlamamixError(f"{len(failed)} of {len(results)} scenarios failed: {', '.join(failed)}.")
    if args.output == "text":
        print(f"{len(results)} of {len(results)} scenarios passed")


def _records(result: Result) -> list[dict[str, Any]]:
    return [
        {"scenario": result.name, "check": c.what, "expected": c.expected, "found": c.found, "ok": c.ok}
        for c in result.checks
    ]


def _show(result: Result) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    yes, no = _marks(console.encoding)

    def line(*parts: tuple[str, str]) -> None:
        console.print(Text.assemble(*parts), soft_wrap=True)

    line((result.name, "bold"), (f": {result.title}", ""))
    for text in result.log:
        line((f"  {text}", "dim"))
    for check in result.checks:
        if check.ok:
            line((f"  {yes} ", "green"), (f"{check.what}: {check.found}", ""))
        else:
            line((f"  {no} ", "red"), (f"{check.what}: expected {check.expected}, found {check.found}", ""))
    line((f"{yes} passed\n", "green") if result.ok else (f"{no} failed\n", "red"))


def _marks(encoding: str) -> tuple[str, str]:
    try:
        "✓✗".encode(encoding)
    except UnicodeEncodeError:
        return "ok", "FAILED"
    return "✓", "✗"
