"""llamamix eval: what a KV cache does to a model's words, cache against cache."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._files import check_outputs
from ._options import MODEL_HELP, add_command, add_model, add_rpc, model_params, model_path, start_log
from ._output import FORMS, render, show
from ._progress import bars, file_progress

if TYPE_CHECKING:
    from ..eval import Case, Plan, Row, Source, Store

_TEXTS = ("prose", "code", "recall")


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "eval",
        "Compare what KV caches do to a model's predictions with an F16 cache: KL divergence and more.",
        usage="(-m MODEL | --replay FILE) [OPTION ...]",
    )
    parser.set_defaults(run=_run)
    source = parser.add_mutually_exclusive_group(required=True)
    add_model(source, action="append", help=f"{MODEL_HELP} (repeatable: one after the other)")
    source.add_argument(
        "--replay", action="append", metavar="FILE", help="look at a run that -o jsonl or --jsonl recorded (repeatable)"
    )

    # None where nothing is given, so that --replay can refuse what is
    texts = parser.add_argument_group("texts")
    texts.add_argument("-f", "--file", action="append", metavar="FILE", help="a text of your own (repeatable)")
    texts.add_argument(
        "--text", action="append", metavar="KIND,..",
        help="prose (a novel), code (Python's own), recall (made of the first -f, or of the novel: what came before"
        " comes again); default: all three, or with -f none",
    )  # fmt: skip
    texts.add_argument("-c", "--ctx-size", action="append", metavar="N,..", help="default: 2048")
    texts.add_argument(
        "--chunks", action="append", metavar="N,..", help="contexts of every text, for each -c (default: 1)"
    )
    texts.add_argument("--leg", action="append", metavar="LEG,..", help="prompt, decode (default: both)")
    texts.add_argument("--n-decode", type=int, metavar="N", help="tokens that are decoded one by one (default: 256)")
    texts.add_argument(
        "--stride", type=int, metavar="N", help="score every N-th position of a prompt's second half (default: 1)"
    )

    caches = parser.add_argument_group("caches")
    caches.add_argument(
        "--kv-mixed", action="append", metavar="SPEC[;SPEC..]",
        help="mixed KV caches, e.g. hot=512,cold=q8_0 (repeatable; 1: the defaults)",
    )  # fmt: skip
    caches.add_argument(
        "-ctk", "--cache-type-k", action="append", metavar="TYPE,..", help="plain caches; default: like -ctv"
    )
    caches.add_argument("-ctv", "--cache-type-v", action="append", metavar="TYPE,..", help="default: like -ctk")
    caches.add_argument("-fa", "--flash-attn", metavar="MODE", help="on, off or auto (default)")
    caches.add_argument(
        "--ablate", action="store_true", default=None, help="mixed caches without each ingredient as well"
    )
    caches.add_argument("--reference", metavar="TYPE", help="of the cache to compare with: f16 (default) or f32")

    context = parser.add_argument_group("context")
    context.add_argument("--f32", action="store_true", default=None, help="expand the weights to F32 first, once")
    context.add_argument("-b", "--batch-size", type=int, metavar="N", help="default: 2048")
    context.add_argument("-ub", "--ubatch-size", type=int, metavar="N", help="default: 512")
    context.add_argument("-t", "--threads", type=int, metavar="N", help="default: as many as there are CPUs")
    context.add_argument("-ngl", "--n-gpu-layers", type=int, metavar="N", help="-1: all (default)")
    add_rpc(context)
    context.add_argument("--keep", metavar="DIR", help="keep what was measured there (default: in the cache folder)")
    context.add_argument("--no-keep", action="store_true", default=None, help="measure all of it, and keep nothing")

    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", metavar="FORM", choices=FORMS, help="md, json, jsonl or csv; default: tables, in Markdown"
        " when stdout is no terminal; json, jsonl and csv: all there is on stdout, the tables on stderr",
    )  # fmt: skip
    output.add_argument("--jsonl", metavar="FILE", help="record the run, for --replay")
    output.add_argument("--plot", metavar="FILE", help="draw divergence over bytes, e.g. eval.png or .svg")


# what only a new run has
_NEW_RUN = (
    "file", "text", "ctx_size", "chunks", "leg", "n_decode", "stride", "kv_mixed", "cache_type_k", "cache_type_v",
    "flash_attn", "ablate", "reference", "f32", "batch_size", "ubatch_size", "threads", "n_gpu_layers", "rpc", "keep",
    "no_keep", "jsonl",
)  # fmt: skip


def _run(args: argparse.Namespace) -> None:
    from ..errors import ParamsError
    from ..eval.plot import check_matplotlib

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
    plan, cases, store = _plan(args), _cases(args), _store(args)
    of_model = model_params(args)
    sources = _sources(args)
    paths = [model_path(name) for name in args.model]
    with _Output(args) as output:
        try:
            for path in paths:
                _measure_model(args, path, of_model, plan, cases, sources, store, output)
        finally:
            output.finish()


def _measure_model(
    args: argparse.Namespace,
    path: Path,
    of_model: dict[str, Any],
    plan: Plan,
    cases: Sequence[Case],
    sources: Sequence[Source],
    store: Store,
    output: _Output,
) -> None:
    from ..eval import Runner
    from ..model import Model
    from ..weights import expand, sha256_of

    with file_progress() as progress:
        if args.f32:
            path = expand(path, progress)
        sha256 = sha256_of(path, progress)
    with Model(path, **of_model) as model, _progress() as bar:
        Runner(
            model, plan, cases, sources, store, model_sha256=sha256, emit=output.add, progress=bar
        ).run()  # fmt: skip


def _plan(args: argparse.Namespace) -> Plan:
    from ..bench.plan import int_list
    from ..eval import Plan

    options: dict[str, Any] = {
        "n_ctx": args.ctx_size and int_list(args.ctx_size, "-c"),
        "n_chunks": args.chunks and int_list(args.chunks, "--chunks", 1),
        "legs": args.leg and tuple(_names(args.leg)),
        "n_decode": args.n_decode,
        "stride": args.stride,
        "n_batch": args.batch_size,
        "n_ubatch": args.ubatch_size,
        "n_threads": args.threads,
        "reference": args.reference,
    }
    return Plan(**{name: value for name, value in options.items() if value is not None})


def _cases(args: argparse.Namespace) -> Sequence[Case]:
    from ..eval import Plan, cases

    return cases(
        args.reference or Plan().reference,
        args.ubatch_size or Plan().n_ubatch,
        args.cache_type_k and _names(args.cache_type_k),
        args.cache_type_v and _names(args.cache_type_v),
        args.flash_attn or "auto",
        args.kv_mixed,
        ablate=bool(args.ablate),
        note=_note,
    )


def _sources(args: argparse.Namespace) -> list[Source]:
    from ..errors import ParamsError
    from ..eval import Recall
    from ..eval.texts import check_names, code, from_file, prose
    from ..pull import console_progress

    kinds = _names(args.text) if args.text else [] if args.file else list(_TEXTS)
    for kind in kinds:
        if kind not in _TEXTS:
            raise ParamsError(f"--text must be of {', '.join(_TEXTS)}, not {kind!r}; -f has files.")
    files = [from_file(file) for file in args.file or ()]
    novel = None
    if "prose" in kinds or ("recall" in kinds and not files):
        with console_progress() as progress:
            novel = prose(progress)
    sources: list[Source] = list(files)
    for kind in dict.fromkeys(kinds):
        if kind == "prose" and novel is not None:
            sources.append(novel)
        elif kind == "code":
            sources.append(code())
        elif base := files[0] if files else novel:
            sources.append(Recall(base))
    check_names([source.name for source in sources])
    return sources


def _store(args: argparse.Namespace) -> Store:
    from ..errors import ParamsError
    from ..eval import Store
    from ..pull import models_dir

    if args.keep is not None and args.no_keep:
        raise ParamsError("--keep and --no-keep do not go together.")
    if args.no_keep:
        return Store(None)
    return Store(Path(args.keep) if args.keep is not None else models_dir().parent / "eval")


def _names(texts: Sequence[str]) -> list[str]:
    return [name.strip() for name in ",".join(texts).split(",")]


def _note(text: str) -> None:
    print(f"llamamix: {text}", file=sys.stderr)


@contextlib.contextmanager
def _progress() -> Iterator[_Bar]:
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.0f}/s")

    columns = (
        *(BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), Speed()),
        *(TimeRemainingColumn(elapsed_when_finished=True), TextColumn("{task.description}", markup=False)),
    )
    with bars(*columns) as progress:
        yield _Bar(progress)


class _Bar:
    def __init__(self, progress: Any) -> None:
        self._progress = progress

    def begin(self, n_tokens: int) -> None:
        self._task = self._progress.add_task("", total=n_tokens)

    def advance(self, n_tokens: int) -> None:
        self._progress.update(self._task, advance=n_tokens)

    def describe(self, what: str) -> None:
        self._progress.update(self._task, description=what)


#
# a recorded run
#


def _replay(args: argparse.Namespace) -> None:
    from ..eval import read_records
    from ..eval.records import unique

    rows = unique([row for file in args.replay for row in read_records(file)])
    with _Output(args) as output:
        output.add(rows)
        output.finish()


#
# what comes out
#


class _Output:
    """Lines of JSON as they come, and at the end of a run the tables and the picture."""

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
        """Rows of a leg of a text that is over."""
        self._rows += rows
        text = FORMS["jsonl"]([row.record() for row in rows])
        for writer in self._writers:
            writer.write(text)
            writer.flush()

    def finish(self) -> None:
        """Show what there is."""
        from ..eval.plot import plot, points
        from ..eval.table import lookup_grids, overview_grids, results_grids

        if not self._rows:
            return
        args = self._args
        if args.output == "json":
            sys.stdout.write(render([row.record() for row in self._rows], "json"))
        elif args.output == "csv":
            sys.stdout.write(render([row.flat() for row in self._rows], "csv"))
        grids = results_grids(self._rows)
        if len({(row.text, row.leg) for row in self._rows}) > 1:
            grids += overview_grids(self._rows)
        show([*grids, *lookup_grids(self._rows)], args.output)
        if args.plot and points(self._rows):
            plot(self._rows, args.plot)
