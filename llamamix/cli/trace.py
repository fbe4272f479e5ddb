"""llamamix trace: what the mixed KV cache does while a model generates, or did in a recorded run."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ._files import check_outputs
from ._options import (
    UNLIMITED,
    add_command,
    add_context,
    add_length,
    add_model,
    add_prompt,
    add_sampling,
    context_params,
    max_tokens,
    model_params,
    model_path,
    read_prompt,
    sampling_params,
    start_log,
)
from ._output import FORMS, render
from ._progress import PromptBar, Speed
from ._session import Interrupt, check_prompt, full, open_context

if TYPE_CHECKING:
    from ..context import Context
    from ..stats import PromptProgress
    from ..trace.recorder import Recorder
    from ..trace.recording import Header

_INTERVAL = 0.1  # seconds between two looks at the progress of a run
_PAUSE_MAX = 2.0  # seconds that a replay waits for the next record

# what the library writes about the cache, and nothing else of its log
_LOG_LINES = ("[MIXED_CACHE", "llama_kv_cache_mixed: creating ")


def register(commands: Any) -> None:
    parser = add_command(
        commands, "trace", "Show what the mixed KV cache does while a model generates, or did in a recorded run.",
        usage="(-m MODEL (-p TEXT | -f FILE) | --replay FILE) [OPTION ...]",
    )
    parser.set_defaults(run=_run)
    source = parser.add_mutually_exclusive_group(required=True)
    add_model(source)
    source.add_argument("--replay", metavar="FILE", help="look at a run that --jsonl recorded; no model is needed")
    add_prompt(parser, required=False)
    add_length(parser)

    output = parser.add_argument_group("output")
    form = output.add_mutually_exclusive_group()
    form.add_argument("--plain", action="store_true", help="lines, no live view (default when stdout is no terminal)")
    form.add_argument(
        "-o", "--output", metavar="FORM", choices=FORMS,
        help="md, json, jsonl or csv: the records on stdout, the summary on stderr",
    )  # fmt: skip
    output.add_argument("--jsonl", metavar="FILE", help="record the run, for --replay")
    output.add_argument("--plot", metavar="FILE", help="draw the timeline, e.g. run.png (needs matplotlib)")
    output.add_argument("--svg", metavar="FILE", help="save the last state of the live view as a picture")
    output.add_argument("--layers", action="store_true", help="the quantisation error by layer as well")
    output.add_argument("--no-error", action="store_true", help="do not measure the quantisation error")
    output.add_argument(
        "--speed", type=float, default=1.0, metavar="X", help="of a replay in the live view, 0: at once (default: 1)"
    )

    add_context(parser)
    add_sampling(parser)


def _run(args: argparse.Namespace) -> None:
    from ..errors import ParamsError
    from ..trace.plot import check_matplotlib

    start_log(args)
    has_prompt = args.prompt is not None or args.file is not None
    if args.replay and (has_prompt or args.jsonl):
        raise ParamsError("--replay shows a run that is over; -p, -f and --jsonl are for a new one.")
    if args.model and not has_prompt:
        raise ParamsError("A prompt is needed, with -p or -f.")
    if not 0 <= args.speed < float("inf"):
        raise ParamsError(f"--speed must be 0 or more, not {args.speed}.")
    check_outputs(args, check_matplotlib)  # a mistake should not have to wait for the run
    if args.replay:
        _replay(args)
    else:
        _record(args)


#
# a run of its own
#


def _record(args: argparse.Namespace) -> None:
    from .. import __version__
    from ..errors import ParamsError
    from ..model import Model
    from ..params import resolve_kv_mixed
    from ..trace.recorder import Recorder
    from ..trace.recording import FORMAT, VERSION, Header
    from ..trace.ring import Trace

    if resolve_kv_mixed(args.kv_mixed) is None:
        raise ParamsError("A trace is about the mixed KV cache; --kv-mixed can not be off.")
    of_model = model_params(args)
    params = context_params(args)
    sampling = sampling_params(args)
    n_max = max_tokens(args)
    prompt = read_prompt(args)
    plain = _is_plain(args)

    with (
        _log_lines(plain) as lines,
        Model(model_path(args.model), **of_model) as model,
        open_context(model, params) as context,
        Trace(context, log=plain, measure_error=not args.no_error, layers=args.layers) as trace,
    ):
        tokens = model.tokenize(prompt, parse_special=True)
        check_prompt(context, len(tokens), args.predict)
        pieces = context.generate(tokens, n_max, sampling, args.stop)
        header = Header(
            format=FORMAT,
            version=VERSION,
            llamamix=__version__,
            model=model.metadata.get("general.name", model.path.name),
            kv_mixed=trace.params.spec(),
            n_ctx=context.n_ctx,
            cache=trace.cache,
        )
        with _Output(args, header, lines) as output, Interrupt() as interrupt:
            recorder = Recorder(trace, output.add)
            done = False
            try:
                _generate(context, pieces, len(tokens), n_max, recorder, interrupt)
                done = not interrupt.requested
            finally:
                recorder.finish(interrupted=not done)
                output.finish()
    if interrupt.requested:
        raise KeyboardInterrupt


def _generate(
    context: Context, pieces: Iterator[str], n_prompt: int, n_max: int, recorder: Recorder, interrupt: Interrupt
) -> None:
    from ..errors import ContextFullError, DecodeAborted

    text = ""
    due = 0.0
    speed = Speed()

    def tell(progress: PromptProgress) -> None:
        recorder.progress(_prompt_progress(progress, speed.at(progress.n_done), recorder.trace.now()))

    # asking costs time, so only the prompt, which may take long, is asked about it
    context.set_abort_callback(lambda: interrupt.requested or recorder.failed)
    with PromptBar(context, is_wanted=not sys.stdout.isatty(), then=tell) as bar:
        try:
            for piece in pieces:
                if bar.is_on:
                    context.set_abort_callback(None)
                    bar.stop()
                text += piece
                if time.monotonic() >= due:
                    recorder.progress(_progress(context, n_prompt, text, recorder.trace.now()))
                    due, text = time.monotonic() + _INTERVAL, ""
                if interrupt.requested:
                    break
        except DecodeAborted:
            if not interrupt.requested:
                raise
        except ContextFullError:
            if n_max < UNLIMITED:
                raise full(context, n_prompt) from None
        finally:
            recorder.progress(_progress(context, n_prompt, text, recorder.trace.now()))


def _prompt_progress(progress: PromptProgress, speed: float, t: float) -> Any:
    from ..trace.recording import Progress

    stats = progress.stats
    assert stats is not None  # the trace would not have begun
    return Progress(t, progress.n_done, 0, stats.hot_used, stats.cold_used, speed, 0.0, "")


def _progress(context: Context, n_prompt: int, text: str, t: float) -> Any:
    from ..trace.recording import Progress

    n_held, stats, perf = context.memory.seq_pos_max() + 1, context.stats, context.perf
    assert stats is not None  # the trace would not have begun
    return Progress(
        t=t,
        n_in=min(n_held, n_prompt),
        n_out=max(n_held - n_prompt, 0),
        hot_used=stats.hot_used,
        cold_used=stats.cold_used,
        prefill=perf.p_eval_per_second,
        decode=perf.eval_per_second,
        text=text,
    )


class _Lines(logging.Handler):
    """Keeps what is logged about the cache; the decode that it comes from must not wait for whoever reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: deque[str] = deque()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line.startswith(_LOG_LINES):
            self.lines.append(line)


@contextlib.contextmanager
def _log_lines(wanted: bool) -> Iterator[deque[str]]:
    log = logging.getLogger("llamamix")
    handler = _Lines()
    if not wanted:
        yield handler.lines
        return
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


#
# a recorded run
#


def _replay(args: argparse.Namespace) -> None:
    from ..trace.recording import read_recording

    header, records = read_recording(args.replay)
    with _Output(args, header, deque()) as output:
        t = 0.0
        try:
            for record in records:
                if output.is_live and args.speed > 0:
                    time.sleep(min((record.t - t) / args.speed, _PAUSE_MAX))
                    t = record.t
                output.add([record])
        except KeyboardInterrupt:
            output.finish()
            raise
        output.finish()


#
# what comes out
#


def _is_plain(args: argparse.Namespace) -> bool:
    return args.output is None and (args.plain or not sys.stdout.isatty())


class _Output:
    """The live view or the lines of the log, files, and at the end of a run the summary."""

    def __init__(self, args: argparse.Namespace, header: Header, lines: deque[str]) -> None:
        from ..trace.summary import Summary

        self._args = args
        self._lines = lines
        self._records: list[Any] = []
        self._keep = args.plot or args.output not in (None, "jsonl")
        self._writers: list[Any] = [sys.stdout] if args.output == "jsonl" else []
        self._live: Any = None
        self._drawn = 0.0
        self.summary = Summary(header)
        self.is_live = args.output is None and not _is_plain(args)

    def __enter__(self) -> _Output:
        with contextlib.ExitStack() as stack:
            if self._args.jsonl:
                self._writers.append(stack.enter_context(open(self._args.jsonl, "w", encoding="utf-8")))
            self._write([self.summary.header])
            if self.is_live:
                from rich.live import Live

                self._live = stack.enter_context(Live(auto_refresh=False))
                self._draw()
            self._stack = stack.pop_all()
        return self

    def add(self, records: list[Any]) -> None:
        for record in records:
            self.summary.add(record)
        if self._keep:
            self._records += records
        self._write(records)
        self._write_lines()
        if self._live and time.monotonic() - self._drawn >= _INTERVAL / 2:
            self._draw()

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def finish(self) -> None:
        """Show the last state, and write what is written at the end."""
        from rich.console import Console

        from ..trace.plot import plot
        from ..trace.view import svg

        if self._live:
            self._draw()
        self._write_lines()
        self._stack.close()
        args = self._args
        if args.output not in (None, "jsonl"):
            events = [_flat(record) for record in self._records if record.RECORD == "event"]
            sys.stdout.write(render(events, args.output) if events else "")
        console = Console(stderr=args.output is not None)
        for table in self.summary.tables():
            console.print(table)
        if args.plot:
            plot(self.summary.header, self._records, args.plot)
        if args.svg:
            with open(args.svg, "w", encoding="utf-8") as file:
                file.write(svg(self.summary))

    def _write(self, records: list[Any]) -> None:
        for writer in self._writers:
            writer.writelines(f"{record.to_json()}\n" for record in records)
            writer.flush()

    def _write_lines(self) -> None:
        while self._lines:
            sys.stdout.write(f"{self._lines.popleft()}\n")
        sys.stdout.flush()

    def _draw(self) -> None:
        from ..trace.view import view

        self._live.update(view(self.summary), refresh=True)
        self._drawn = time.monotonic()


def _flat(event: Any) -> dict[str, Any]:
    """An event as a record of a table."""
    values = {name: getattr(event, name) for name in event.__dataclass_fields__ if name not in ("RECORD", "layers")}
    values |= {"kind": event.kind.value, "trigger": event.trigger and event.trigger.value}
    values["seq_ids"] = " ".join(map(str, event.seq_ids))
    return {name: "" if value is None else value for name, value in values.items()}
