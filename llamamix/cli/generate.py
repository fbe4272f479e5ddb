"""llamamix generate: text from a model."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ._options import (
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
from ._progress import PromptBar
from ._session import Interrupt, check_prompt, full, open_context

if TYPE_CHECKING:
    from ..context import Context
    from ..model import Model


def register(commands: Any) -> None:
    parser = add_command(
        commands, "generate", "Generate text; it goes to stdout as it comes.",
        usage="-m MODEL (-p TEXT | -f FILE) [OPTION ...]",
    )
    parser.set_defaults(run=_run)
    add_model(parser, required=True)
    add_prompt(parser, required=True)
    parser.add_argument(
        "-cnv", "--conversation", "--chat", action="store_true", help="the prompt is a message to a chat model"
    )
    parser.add_argument("-sys", "--system-prompt", metavar="TEXT", help="the system message of a conversation")
    add_length(parser)
    parser.add_argument("--stats", action="store_true", help="end with a table of speed and cache use on stderr")

    add_context(parser)
    add_sampling(parser)


def _run(args: argparse.Namespace) -> None:
    from ..errors import ContextFullError
    from ..model import Model

    start_log(args)
    of_model = model_params(args)
    params = context_params(args)  # a mistake should not have to wait for the model
    sampling = sampling_params(args)
    n_max = max_tokens(args)
    prompt = read_prompt(args)

    with (
        Model(model_path(args.model), **of_model) as model,
        open_context(model, params) as context,
    ):
        tokens = _tokens(model, prompt, args)
        check_prompt(context, len(tokens), args.predict)
        pieces = context.generate(tokens, n_max, sampling, args.stop)
        is_full = False
        with Interrupt(pieces.cancel) as interrupt, PromptBar(context) as bar:
            try:
                for piece in pieces:
                    bar.stop()
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            except ContextFullError:
                is_full = args.predict != -1
        sys.stdout.write("\n")
        sys.stdout.flush()
        if args.stats:
            _print_stats(context, len(tokens))
        if interrupt.requested:
            raise KeyboardInterrupt
        if is_full:
            raise full(context, len(tokens))


def _tokens(model: Model, prompt: str, args: argparse.Namespace) -> list[int]:
    if not args.conversation:
        return model.tokenize(prompt, parse_special=True)
    messages = [{"role": "user", "content": prompt}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    return model.tokenize(model.apply_chat_template(messages), parse_special=True)


def _print_stats(context: Context, n_prompt: int) -> None:
    from rich.console import Console

    from ._tables import summary

    n_held = context.memory.seq_pos_max() + 1  # less than the prompt when that was interrupted
    n_in = min(n_prompt, n_held)
    Console(stderr=True).print(summary(n_in, n_held - n_in, context.perf, context.stats))
