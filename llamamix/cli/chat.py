"""llamamix chat: a conversation with a model, turn by turn."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ._flags import with_flags
from ._options import (
    add_command,
    add_context,
    add_length,
    add_model,
    add_sampling,
    check_text,
    context_params,
    max_tokens,
    model_params,
    model_path,
    sampling_params,
    start_log,
)
from ._progress import PromptBar
from ._session import Interrupt, open_context

if TYPE_CHECKING:
    from ..context import Context
    from ..params import SamplingParams
    from ..trace.events import Event
    from ..trace.ring import Trace

_PROMPT, _PROMPT_MORE = "> ", ". "
_ALIASES = {"/exit": "/quit", "/bye": "/quit", "/?": "/help"}
_N_EVENTS = 20  # that /trace shows


def register(commands: Any) -> None:
    parser = add_command(
        commands, "chat", "Talk with a model. Every line is a message (\\ at its end: it goes on), /help lists"
        " commands, Ctrl-C stops an answer. Only what is new of the conversation is computed.",
        usage="-m MODEL [OPTION ...]",
    )  # fmt: skip
    parser.set_defaults(run=_run)
    add_model(parser, required=True)
    parser.add_argument("-sys", "--system-prompt", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--chat-template", metavar="TEXT", help="in Jinja, or the name of one, such as chatml (default: the model's)"
    )
    add_length(parser, "tokens of an answer, -1: until the model or the context ends", 512)
    add_context(parser)
    add_sampling(parser)


def _run(args: argparse.Namespace) -> None:
    from ..errors import ParamsError
    from ..model import Model

    start_log(args)
    of_model = model_params(args)
    params = context_params(args)  # a mistake should not have to wait for the model
    sampling = sampling_params(args)
    max_tokens(args)
    if args.system_prompt is not None:
        check_text(args.system_prompt, "-sys")
    if sys.stdin is None:
        raise ParamsError("Standard input is closed, and chat reads messages from it.")

    with (
        Model(model_path(args.model), **of_model) as model,
        open_context(model, params) as context,
        _trace(context) as trace,
    ):
        # raises where there is no template that can be used
        model.apply_chat_template([{"role": "user", "content": "?"}], template=args.chat_template)
        _Chat(args, context, sampling, trace).run()


@contextlib.contextmanager
def _trace(context: Context) -> Iterator[Trace | None]:
    from ..trace.ring import Trace

    if context.stats is None:
        yield None
        return
    with Trace(context) as trace:
        yield trace


class _Chat:
    """A conversation: answers go to stdout, what commands say to stderr."""

    def __init__(
        self, args: argparse.Namespace, context: Context, sampling: SamplingParams, trace: Trace | None
    ) -> None:
        self._args = args
        self._context = context
        self._sampling = sampling
        self._trace = trace
        self._events: list[Event] = []
        system = args.system_prompt
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._messages: list[dict[str, str]] = [*self._first]
        self._n_in, self._n_out = 0, 0
        self._last = ""  # what the last turn kept and computed
        self._is_over = False
        self._commands: dict[str, tuple[str, Callable[[], None]]] = {
            "/help": ("this list", self._help),
            "/stats": ("speed, and what the cache holds", self._stats),
            "/trace": (f"the last {_N_EVENTS} things that the cache did", self._show_trace),
            "/retry": ("answer the last message again", self._retry),
            "/undo": ("forget the last message and its answer", self._undo),
            "/clear": ("forget the conversation", self._clear),
            "/quit": ("end, as Ctrl-D does", self._quit),
        }

    def run(self) -> None:
        """Read and answer until the input ends, or /quit."""
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # input() edits lines with it

            _say(f"{self._context.model.path.name}. /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.")
        while not self._is_over and (text := _read_message(is_terminal)) is not None:
            if text.startswith("/"):
                self._command(text.strip())
            elif text.strip():
                self._answer(text)

    def _command(self, name: str) -> None:
        name = _ALIASES.get(name, name)
        if name in self._commands:
            self._commands[name][1]()
        else:
            _say(f"There is no {name.split()[0]}; /help lists what there is, and a space before it makes it a message.")

    def _answer(self, text: str) -> None:
        from ..errors import ContextFullError, LlamamixError

        self._messages.append({"role": "user", "content": text})
        answer = ""
        try:
            generation = self._context.chat(
                self._messages, max_tokens(self._args), self._sampling, self._args.stop,
                template=self._args.chat_template,
            )  # fmt: skip
            with Interrupt(generation.cancel) as interrupt, PromptBar(self._context) as bar:
                for piece in generation:
                    bar.stop()
                    answer += piece
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            if interrupt.requested:
                _say("\n(stopped)" if sys.stdout.isatty() else "(stopped)")
        except ContextFullError:
            _say(
                f"The conversation does not fit into the context of {self._context.n_ctx_seq} tokens: /undo or /clear"
                " makes room, -c more of it."
            )
        except LlamamixError as error:
            _say(with_flags(str(error)))
        finally:
            if answer:
                sys.stdout.write("\n")
                sys.stdout.flush()
                self._n_out += generation.n_tokens
                n_held = self._context.memory.seq_pos_max() + 1
                n_new = n_held - self._context.n_kept - generation.n_tokens
                self._n_in += n_new
                self._last = f"{self._context.n_kept} tokens kept, {n_new} computed, {generation.n_tokens} generated"
                self._messages.append({"role": "assistant", "content": answer})
            else:
                self._messages.pop()  # a message that has no answer: templates want both in turn

    #
    # commands
    #

    def _help(self) -> None:
        for name, (what, _) in self._commands.items():
            _say(f"{name:7} {what}")

    def _stats(self) -> None:
        from rich.console import Console

        from ._tables import summary

        table = summary(self._n_in, self._n_out, self._context.perf, self._context.stats)
        Console(stderr=True).print(table)
        if self._last:
            _say(f"last turn: {self._last}")

    def _show_trace(self) -> None:
        if self._trace is None:
            _say("There is nothing to trace: the cache is a plain one (--kv-mixed off).")
            return
        self._events = [*self._events, *self._trace.read()][-_N_EVENTS:]
        for event in self._events:
            _say(_line(event))

    def _retry(self) -> None:
        text = self._drop_turn()
        if text is not None:
            self._answer(text)

    def _undo(self) -> None:
        if self._drop_turn() is not None:
            _say(f"Forgotten; {len(self._messages) - len(self._first)} messages are left.")

    def _drop_turn(self) -> str | None:
        """The message that was dropped, with its answer."""
        if not self._messages or self._messages[-1]["role"] != "assistant":
            _say("There is no message yet.")
            return None
        del self._messages[-1]
        return self._messages.pop()["content"]

    def _clear(self) -> None:
        self._messages = [*self._first]
        self._context.memory.clear()
        self._last = ""
        _say("Forgotten.")

    def _quit(self) -> None:
        self._is_over = True


def _read_message(is_terminal: bool) -> str | None:
    """What is said next, None: nothing more."""
    lines: list[str] = []
    while True:
        line = _read_line(is_terminal, _PROMPT_MORE if lines else _PROMPT)
        if line is None:
            return "\n".join(lines) if lines else None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _read_line(is_terminal: bool, prompt: str) -> str | None:
    from ..errors import ParamsError
    from ..text import decode_utf8

    while True:
        try:
            if is_terminal:
                return check_text(input(prompt), "the message")
            data = sys.stdin.buffer.readline()
            return decode_utf8(data, "The message").rstrip("\n") if data else None
        except EOFError:
            _say("")
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            _say("\n(Ctrl-D or /quit ends)")
        except (ParamsError, UnicodeDecodeError):
            _say("The message is not UTF-8 text.")


def _line(event: Event) -> str:
    positions = "" if event.pos_min is None else f" ({event.pos_min} to {event.pos_max})"
    time = f", {1e6 * event.duration:.0f} µs" if event.duration else ""
    return (
        f"{event.t:.1f} s {event.kind.value}: {event.n_tokens} tokens{positions}{time}; hot {event.hot_used}, cold"
        f" {event.cold_used}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
