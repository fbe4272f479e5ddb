#!/usr/bin/env python3
"""Fills the tables of docs/fidelity.md, and draws its picture, from recorded evaluations.

    python tools/fidelity.py --record              # run all evaluations, into docs/data/fidelity-NAME.jsonl
    python tools/fidelity.py --record smollm2-2k   # one of them
    python tools/fidelity.py                       # fill the page from what is recorded
    python tools/fidelity.py --check               # is the page what the recordings say?

What was measured is kept, so that a run which was interrupted goes on where it was. What a table or the list of
commands says stands between two lines of the page:

    <!-- table: KIND MODEL N_CTX [LEG] -->
    <!-- end -->

    <!-- commands -->
    <!-- end -->

overview   mean divergence of every cache by text and leg
details    all that is known of every cache, text by text
ablation   mean divergence of caches that lack an ingredient, beside the one that has it
lookups    how many values every cache finds

MODEL is how a model's name begins, in any case of letters.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "fidelity.md"
PICTURE = ROOT / "docs" / "images" / "fidelity.svg"

if str(ROOT) not in sys.path:  # a checkout that is not installed
    sys.path.append(str(ROOT))

from llamamix.errors import LlamamixError  # noqa: E402
from llamamix.eval.cases import ABLATION  # noqa: E402
from llamamix.eval.plot import plot  # noqa: E402
from llamamix.eval.records import Row, read_records, unique  # noqa: E402
from llamamix.eval.table import lookup_grids, overview_grids, results_grids  # noqa: E402
from llamamix.grid import Grid  # noqa: E402

# the presets, and what they are compared with
_MIXED = "default;quality;memory;cold=q4_0,mean=off"

# Both legs begin with the same batches, which are computed once: small ones leave little to compute twice.
# Decoding at depth shows the error of upstream's F16 flash attention, so the reference is F32.
# At 2048 tokens, all plain types that take no more bytes than the default preset does at 8192, where they take ten minutes
# each.
_SETTING = "--f32 --reference f32 -b 256 -ub 128"
RUNS = {
    "smollm2-2k": f"-m smollm2 {_SETTING} -c 2048 -ctk f16,q8_0,q4_1,iq4_nl,q4_0 --kv-mixed '{_MIXED}'",
    "smollm2-8k": f"-m smollm2 {_SETTING} -c 8192 --stride 2 -ctk f16,q8_0 --kv-mixed '{_MIXED}'",
    "smollm2-ablation": f"-m smollm2 {_SETTING} -c 2048 --kv-mixed default --ablate",
    "gemma3-2k": f"-m gemma3 {_SETTING} -c 2048 --stride 4 -ctk f16,q8_0,q4_0 --kv-mixed '{_MIXED}'",
    "gemma3-8k": f"-m gemma3 {_SETTING} -c 8192 --stride 8 -ctk f16,q8_0 --kv-mixed '{_MIXED}'",
}

_PART = re.compile(r"(<!-- (table: [^\n]*?|commands) -->\n).*?(<!-- end -->)", re.DOTALL)


class FidelityError(LlamamixError):
    """The page or the recordings are not what they should be."""


def _ablations(rows: Sequence[Row]) -> list[Grid]:
    """Of the caches that have ablations, and of these."""
    lacking = [row.cache for row in rows if row.role == ABLATION]
    whole = {name for row in rows for name in [row.cache] if any(other.startswith(f"{name}, ") for other in lacking)}
    return overview_grids([row for row in rows if row.role == ABLATION or row.cache in whole])


def _whole(grids: Callable[[Sequence[Row]], list[Grid]]) -> Callable[[Sequence[Row]], list[Grid]]:
    return lambda rows: grids([row for row in rows if row.role != ABLATION])


_KINDS: dict[str, Callable[[Sequence[Row]], list[Grid]]] = {
    "overview": _whole(overview_grids),
    "details": _whole(results_grids),
    "lookups": _whole(lookup_grids),
    "ablation": _ablations,
}


def table(what: str, rows: Sequence[Row]) -> str:
    """The Markdown of a table, by the words in its line. Raises FidelityError."""
    words = what.split()
    if len(words) not in (3, 4) or words[0] not in _KINDS or not words[2].isdecimal():
        raise FidelityError(f"A table is one of {', '.join(_KINDS)} with a model and a context, not {what!r}.")
    kind, model, n_ctx, *legs = words
    wanted = [
        row
        for row in rows
        if row.model.lower().startswith(model.lower()) and row.n_ctx == int(n_ctx) and (not legs or row.leg == legs[0])
    ]
    grids = _KINDS[kind](wanted) if wanted else []
    if not grids:
        raise FidelityError(f"The recordings have nothing for the table {what!r}.")
    return "\n".join(grid.markdown() for grid in grids)


def commands() -> str:
    """The Markdown of all commands."""
    lines = [f"llamamix eval {RUNS[name]} --jsonl {_recording(name)}" for name in RUNS]
    return "```sh\n" + "\n".join(lines) + "\npython tools/fidelity.py\n```\n"


def filled(page: str, rows: Sequence[Row]) -> str:
    """The page with its tables as the rows have them, and the commands. Raises FidelityError when it has neither."""

    def fill(match: re.Match[str]) -> str:
        what = match[2]
        text = commands() if what == "commands" else table(what.removeprefix("table: "), rows)
        return f"{match[1]}\n{text}\n{match[3]}"

    text, n = _PART.subn(fill, page)
    if n == 0:
        raise FidelityError("The page has no table to fill.")
    return text


def record(names: Sequence[str]) -> None:
    """Run evaluations, one after the other. Raises FidelityError for one that there is not, and when one fails."""
    for name in names:
        if name not in RUNS:
            raise FidelityError(f"There is no evaluation {name}; there are {', '.join(RUNS)}.")
    for name in names:
        print(f"llamamix eval {RUNS[name]} --jsonl {_recording(name)}", file=sys.stderr)
        (ROOT / _recording(name)).parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "llamamix", "eval", *shlex.split(RUNS[name]), "--jsonl", _recording(name)]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise FidelityError(f"{name} has not come to its end; it goes on where it was when this is run again.")


def _recording(name: str) -> str:
    return f"docs/data/fidelity-{name}.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Fill the tables of docs/fidelity.md from recorded evaluations.")
    parser.add_argument("recordings", nargs="*", type=Path, help="default: docs/data/fidelity-*.jsonl")
    parser.add_argument(
        "--record", nargs="*", metavar="NAME", help=f"run evaluations: {', '.join(RUNS)} (default: all)"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/fidelity.md")
    parser.add_argument("--check", action="store_true", help="change nothing; is the page what it should be?")
    parser.add_argument(
        "--plot", nargs=3, metavar=("FILE", "MODEL", "N_CTX"), default=(str(PICTURE), "smollm2", "8192"),
        help="the picture (default: docs/images/fidelity.svg smollm2 8192)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        if args.record is not None:
            record(args.record or list(RUNS))
            return 0
        files = args.recordings or sorted((ROOT / "docs" / "data").glob("fidelity-*.jsonl"))
        if not files:
            raise FidelityError("There is no recording in docs/data; the page says how to make one.")
        rows = unique([row for file in files for row in read_records(file)])
        page = args.page.read_text(encoding="utf-8")
        text = filled(page, rows)
        if args.check:
            if text != page:
                raise FidelityError(f"{args.page} is not what the recordings say; run this without --check.")
            return 0
        args.page.write_text(text, encoding="utf-8")
        picture, model, n_ctx = args.plot
        plot([row for row in rows if row.model.lower().startswith(model) and f"{row.n_ctx}" == n_ctx], picture)
    except (LlamamixError, OSError) as error:
        print(f"fidelity.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
