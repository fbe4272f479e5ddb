"""llamamix generate: text from a model."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ._options import (
    UNLIMITED,
    add_command,
    add_context,
    add_length,
    add_prompt,
    add_sampling,
    context_params,
    model_path,
    read_prompt,
    sampling_params,
    start_log,
)

if TYPE_CHECKING:
    from ..context import Context
    from ..model import Model


def register(commands: Any) -> None:
    parser = add_command(commands, "generate", "Generate text; it goes to stdout as it comes.")
    parser.set_defaults(run=_run)
    parser.add_argument(
        "-m", "--model", required=True, metavar="MODEL", help="a GGUF file, or a name that 'pull' knows"
    )
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
    from ..context import Context
    from ..errors import ContextFullError
    from ..model import Model

    start_log(args)
    params = context_params(args)  # a mistake should not have to wait for the model
    sampling = sampling_params(args)
    prompt = read_prompt(args)

    with (
        Model(model_path(args.model), n_gpu_layers=args.n_gpu_layers) as model,
        Context(model, **params) as context,
    ):
        tokens = _tokens(model, prompt, args)
        unlimited = args.predict == -1
        try:
            for piece in context.generate(tokens, UNLIMITED if unlimited else args.predict, sampling, args.stop):
                sys.stdout.write(piece)
                sys.stdout.flush()
        except ContextFullError:
            if not unlimited or context.memory.seq_pos_max() < len(tokens):
                raise
        sys.stdout.write("\n")
        if args.stats:
            _print_stats(context, len(tokens))


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

    n_generated = context.memory.seq_pos_max() + 1 - n_prompt
    Console(stderr=True).print(summary(n_prompt, n_generated, context.perf, context.stats))
