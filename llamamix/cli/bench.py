"""llamamix bench: speed and memory of KV cache configurations, side by side."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._files import check_outputs
from ._options import add_command, add_model, add_rpc, model_params, model_path, read_text, start_log
from ._output import FORMS, render, show
from ._progress import Speed, bars, file_progress, line

if TYPE_CHECKING:
    from ..bench import Plan, Row
    from ..stats import PromptProgress

_N_THREADS_MIN = 1
_WIDE = 120  # columns of a terminal that has room for all of a step


def register(commands: Any) -> None:
    parser = add_command(
        commands, "bench", "Measure KV cache configurations side by side: llama-bench's tests, in turn in one process.",
        usage="(-m MODEL | --replay FILE) [OPTION ...]",
    )
    parser.set_defaults(run=_run)
    source = parser.add_mutually_exclusive_group(required=True)
    add_model(source)
    source.add_argument("--replay", metavar="FILE", help="look at a run that -o jsonl or --jsonl recorded")

    # None where nothing is given, so that --replay can refuse what is; lists may be given several times
    tests = parser.add_argument_group("tests", "lists: 512,1024, and ranges: 1-4, 0-8192+2048, 1-64*2")
    tests.add_argument("-p", "--n-prompt", action="append", metavar="N,..", help="prompt tokens (default: 512)")
    tests.add_argument("-n", "--n-gen", action="append", metavar="N,..", help="tokens to decode (default: 128)")
    tests.add_argument("-d", "--n-depth", action="append", metavar="N,..", help="tokens in the cache (default: 0)")
    tests.add_argument("-r", "--repetitions", type=int, metavar="N", help="of every test (default: 5)")
    tests.add_argument("-f", "--file", metavar="FILE", help="take the tokens of a text (-: stdin; default: random)")
    tests.add_argument("-s", "--seed", type=int, metavar="N", help="of random tokens (default: 0)")
    tests.add_argument("--no-warmup", action="store_true", default=None, help="do not run every test once before")
    tests.add_argument(
        "--one-context", action="store_true", default=None,
        help="one cache in memory at a time, the states of the others (default: when memory is short)",
    )  # fmt: skip

    caches = parser.add_argument_group("configurations", "the first is the baseline of all ratios")
    caches.add_argument(
        "-ctk", "--cache-type-k", action="append", metavar="TYPE,..", help="default: like -ctv, or f16,q8_0,q4_0"
    )
    caches.add_argument("-ctv", "--cache-type-v", action="append", metavar="TYPE,..", help="default: like -ctk")
    caches.add_argument(
        "--kv-mixed", action="append", metavar="SPEC",
        help="a mixed KV cache, e.g. hot=512,cold=q4_0 (repeatable; off: none; default: hot=512)",
    )  # fmt: skip
    caches.add_argument("-fa", "--flash-attn", action="append", metavar="MODE,..", help="on, off or auto (default)")

    context = parser.add_argument_group("context")
    context.add_argument(
        "--weights", metavar="TYPE",
        help="requantise the model first, once: q4_0, q8_0, f16 and more (default: as they are)",
    )  # fmt: skip
    context.add_argument("-b", "--batch-size", type=int, metavar="N", help="default: 2048")
    context.add_argument("-ub", "--ubatch-size", type=int, metavar="N", help="default: 512")
    context.add_argument("-t", "--threads", action="append", metavar="N,..", help="default: as many as there are CPUs")
    context.add_argument("-ngl", "--n-gpu-layers", type=int, metavar="N", help="-1: all (default)")
    add_rpc(context)

    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", metavar="FORM", choices=FORMS, help="md, json, jsonl or csv; default: a table, in Markdown"
        " when stdout is no terminal; json, jsonl and csv: all there is on stdout, the table on stderr",
    )  # fmt: skip
    output.add_argument("--jsonl", metavar="FILE", help="record the run, for --replay")
    output.add_argument("--fit", action="store_true", help="fit the time per token over 3 depths or more")
    output.add_argument("--plot", metavar="FILE", help="draw speed over depth and memory, e.g. bench.png or .svg")


# what only a new run has; -t 1 is --threads in args.threads
_NEW_RUN = (
    "n_prompt", "n_gen", "n_depth", "repetitions", "file", "seed", "no_warmup", "one_context", "cache_type_k",
    "cache_type_v", "kv_mixed", "flash_attn", "batch_size", "ubatch_size", "threads", "n_gpu_layers", "rpc", "jsonl",
    "weights",
)  # fmt: skip


def _run(args: argparse.Namespace) -> None:
    from ..bench.plot import check_matplotlib
    from ..errors import ParamsError

    start_log(args)
    check_outputs(args, check_matplotlib)  # a mistake should not have to wait for the run
    if args.replay is None:
        _measure(args)
        return
    for name in _NEW_RUN:
        if getattr(args, name) is not None:
            raise ParamsError(f"--replay shows a run that is over; --{name.replace('_', '-')} is for a new one.")
    _replay(args)


#
# a run of its own
#


def _measure(args: argparse.Namespace) -> None:
    from ..bench.runner import Runner, random_tokens, text_tokens
    from ..errors import ParamsError
    from ..model import Model
    from ..weights import check_type

    plan = _plan(args)
    if args.fit and (not any(plan.n_gen) or len(plan.n_depth) < 3):
        raise ParamsError("--fit needs -n over 0 and 3 depths or more, e.g. -d 0,2048,7680.")
    if args.plot and not any(plan.n_gen):
        raise ParamsError("--plot draws the speed of decoding; -n must be over 0.")
    seed = 0 if args.seed is None else args.seed
    if args.file is not None and args.seed is not None:
        raise ParamsError("-s is for random tokens, and -f has others.")
    if seed < 0:
        raise ParamsError(f"-s must be 0 or more, not {seed}.")
    weights = None if args.weights is None else check_type(args.weights)
    of_model = model_params(args)
    text = None if args.file is None else read_text(args.file)

    with Model(_weights(model_path(args.model), weights), **of_model) as model, _Output(args) as output:
        n_tokens = max(plan.n_depth) + plan.n_tokens_max
        tokens = random_tokens(model, n_tokens, seed) if text is None else text_tokens(model, text, n_tokens)
        complete = False
        try:
            with _progress(plan.n_steps) as progress:
                Runner(
                    model,
                    plan,
                    tokens,
                    seed=seed if text is None else None,
                    emit=output.add,
                    progress=progress,
                ).run()
            complete = True
        finally:
            output.finish(complete)


def _weights(path: Path, weights: str | None) -> Path:
    from ..weights import requantise

    if weights is None:
        return path
    with file_progress() as progress:
        return requantise(path, weights, progress)


def _plan(args: argparse.Namespace) -> Plan:
    from ..bench import Plan, configurations
    from ..bench.configurations import DEFAULT_KV_MIXED
    from ..bench.plan import int_list

    options: dict[str, Any] = {
        "configurations": configurations(
            _names(args.cache_type_k),
            _names(args.cache_type_v),
            _names(args.flash_attn) or ("auto",),
            args.kv_mixed or DEFAULT_KV_MIXED,
        ),
        "n_prompt": args.n_prompt and int_list(args.n_prompt, "-p"),
        "n_gen": args.n_gen and int_list(args.n_gen, "-n"),
        "n_depth": args.n_depth and int_list(args.n_depth, "-d"),
        "n_threads": args.threads and int_list(args.threads, "-t", _N_THREADS_MIN),
        "repetitions": args.repetitions,
        "n_batch": args.batch_size,
        "n_ubatch": args.ubatch_size,
        "one_context": args.one_context,
        "warmup": False if args.no_warmup else None,
    }
    return Plan(**{name: value for name, value in options.items() if value is not None})


def _names(texts: Sequence[str] | None) -> list[str] | None:
    return None if texts is None else [name.strip() for name in ",".join(texts).split(",")]


@contextlib.contextmanager
def _progress(n_steps: int) -> Iterator[_Bar]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with bars(*columns) as progress:
        yield _Bar(progress, progress.add_task("", total=n_steps, completed=-1))


class _Bar:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress = progress
        self._task = task
        self._is_wide = progress.console.width >= _WIDE
        self._what, self._speed = "", Speed()

    def step(self, what: str) -> None:
        self._what, self._speed = what, Speed()
        self._progress.update(self._task, advance=1, description=what)

    def tokens(self, progress: PromptProgress) -> None:
        text = line("", progress, self._speed.at(progress.n_done), self._is_wide)
        self._progress.update(self._task, description=f"{self._what} {text}")

    def note(self, text: str) -> None:
        print(f"llamamix: {text}", file=sys.stderr)


#
# a recorded run
#


def _replay(args: argparse.Namespace) -> None:
    from ..bench import fits, read_rows
    from ..errors import ParamsError

    rows = read_rows(args.replay)
    if args.fit and not fits(rows):
        raise ParamsError("--fit needs tests that decode token by token at 3 depths or more, and the run has none.")
    if args.plot and not any(row.n_gen > 0 for row in rows):
        raise ParamsError("--plot draws the speed of decoding, and the run has none.")
    with _Output(args) as output:
        output.add(rows)
        output.finish(complete=True)


#
# what comes out
#


class _Output:
    """Lines of JSON as they come, and at the end of a run the tables and the plot."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._rows: list[Row] = []
        self._writers: list[Any] = [sys.stdout] if args.output == "jsonl" else []

    def __enter__(self) -> _Output:
        self._stack = contextlib.ExitStack()
        if self._args.jsonl:
            self._writers.append(self._stack.enter_context(open(self._args.jsonl, "w", encoding="utf-8")))
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def add(self, rows: list[Row]) -> None:
        """Rows of a test that is over."""
        from ..bench import summarise

        self._rows += rows
        text = FORMS["jsonl"]([summary.record() for summary in summarise(rows)])
        for writer in self._writers:
            writer.write(text)
            writer.flush()

    def finish(self, complete: bool) -> None:
        """Show what there is; a run that was interrupted may lack what a fit or a plot needs."""
        from ..bench import fits, summarise
        from ..bench.plot import plot
        from ..bench.table import fit_grid, results_grid

        if not self._rows:
            return
        args = self._args
        summaries = summarise(self._rows)
        if args.output == "json":
            sys.stdout.write(render([summary.record() for summary in summaries], "json"))
        elif args.output == "csv":
            sys.stdout.write(render([summary.flat() for summary in summaries], "csv"))
        grids = [results_grid(summaries)]
        if args.fit and (lines := fits(self._rows)):
            grids.append(fit_grid(lines))
        show(grids, args.output)
        if args.plot and (complete or any(row.n_gen > 0 for row in self._rows)):
            plot(summaries, args.plot)
