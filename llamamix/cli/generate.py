"""llamamix generate: text from a model."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ._options import add_command, add_kv_mixed, add_threads, model_path, start_log

_UNLIMITED = 2**31 - 1


def register(commands: Any) -> None:
    parser = add_command(commands, "generate", "Generate text; it goes to stdout as it comes.")
    parser.set_defaults(run=_run)
    parser.add_argument(
        "-m", "--model", required=True, metavar="MODEL", help="a GGUF file, or a name that 'pull' knows"
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT")
    prompt.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file (-: stdin)")
    parser.add_argument(
        "-cnv", "--conversation", "--chat", action="store_true", help="the prompt is a message to a chat model"
    )
    parser.add_argument("-sys", "--system-prompt", metavar="TEXT", help="the system message of a conversation")
    parser.add_argument(
        "-n", "--predict", type=int, default=128, metavar="N",
        help="tokens to generate, -1: until the model or the context ends (default: 128)",
    )  # fmt: skip
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    parser.add_argument("--stats", action="store_true", help="end with a table of speed and cache use on stderr")

    context = parser.add_argument_group("context")
    context.add_argument(
        "-c", "--ctx-size", type=int, default=4096, metavar="N", help="0: from the model (default: 4096)"
    )
    context.add_argument("-b", "--batch-size", type=int, default=2048, metavar="N", help="default: 2048")
    context.add_argument("-ub", "--ubatch-size", type=int, default=512, metavar="N", help="default: 512")
    add_threads(context)
    context.add_argument(
        "-tb", "--threads-batch", type=int, metavar="N", help="threads for the prompt (default: like -t)"
    )
    context.add_argument("-ngl", "--n-gpu-layers", type=int, default=-1, metavar="N", help="-1: all (default)")
    context.add_argument("-ctk", "--cache-type-k", default="f16", metavar="TYPE", help="default: f16")
    context.add_argument("-ctv", "--cache-type-v", default="f16", metavar="TYPE", help="default: f16")
    context.add_argument("-fa", "--flash-attn", default="auto", metavar="on|off|auto", help="default: auto")
    add_kv_mixed(context)

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "-s", "--seed", type=int, default=-1, metavar="N", help="-1: a different one each time (default)"
    )
    sampling.add_argument(
        "--temp", type=float, default=0.8, metavar="N", help="0: the most likely token (default: 0.8)"
    )
    sampling.add_argument("--top-k", type=int, default=40, metavar="N", help="0: off (default: 40)")
    sampling.add_argument("--top-p", type=float, default=0.95, metavar="N", help="1: off (default: 0.95)")
    sampling.add_argument("--min-p", type=float, default=0.05, metavar="N", help="0: off (default: 0.05)")
    sampling.add_argument("--typical", type=float, default=1.0, metavar="N", help="1: off (default)")
    sampling.add_argument("--repeat-penalty", type=float, default=1.0, metavar="N", help="1: off (default)")
    sampling.add_argument("--repeat-last-n", type=int, default=64, metavar="N", help="default: 64")
    sampling.add_argument("--frequency-penalty", type=float, default=0.0, metavar="N", help="0: off (default)")
    sampling.add_argument("--presence-penalty", type=float, default=0.0, metavar="N", help="0: off (default)")
    sampling.add_argument("--grammar", metavar="GBNF", help="grammar that the text must follow")


def _run(args: argparse.Namespace) -> None:
    from ..context import Context
    from ..errors import ContextFullError
    from ..model import Model
    from ..params import ContextParams, SamplingParams

    start_log(args)
    context_params = {
        "n_ctx": args.ctx_size,
        "n_batch": args.batch_size,
        "n_ubatch": args.ubatch_size,
        "n_threads": args.threads,
        "n_threads_batch": args.threads_batch,
        "flash_attn": args.flash_attn,
        "type_k": args.cache_type_k,
        "type_v": args.cache_type_v,
        "kv_mixed": args.kv_mixed,
    }
    ContextParams(**context_params)  # a mistake should not have to wait for the model
    sampling = SamplingParams(
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        typical_p=args.typical,
        repeat_penalty=args.repeat_penalty,
        repeat_last_n=args.repeat_last_n,
        frequency_penalty=args.frequency_penalty,
        presence_penalty=args.presence_penalty,
        seed=None if args.seed == -1 else args.seed,
        grammar=args.grammar,
    )
    prompt = args.prompt if args.file is None else _read(args.file)

    with (
        Model(model_path(args.model), n_gpu_layers=args.n_gpu_layers) as model,
        Context(model, **context_params) as context,
    ):
        tokens = _tokens(model, prompt, args)
        unlimited = args.predict == -1
        try:
            for piece in context.generate(tokens, _UNLIMITED if unlimited else args.predict, sampling, args.stop):
                sys.stdout.write(piece)
                sys.stdout.flush()
        except ContextFullError:
            if not unlimited or context.memory.seq_pos_max() < len(tokens):
                raise
        sys.stdout.write("\n")
        if args.stats:
            _print_stats(context, len(tokens))


def _read(file: str) -> str:
    if file == "-":
        return sys.stdin.read()
    with open(file, encoding="utf-8") as stream:
        return stream.read()


def _tokens(model: Any, prompt: str, args: argparse.Namespace) -> list[int]:
    if not args.conversation:
        return model.tokenize(prompt, parse_special=True)
    messages = [{"role": "user", "content": prompt}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    return model.tokenize(model.apply_chat_template(messages), parse_special=True)


def _print_stats(context: Any, n_prompt: int) -> None:
    from rich.console import Console

    from ._tables import summary

    n_generated = context.memory.seq_pos_max() + 1 - n_prompt
    Console(stderr=True).print(summary(n_prompt, n_generated, context.perf, context.stats))
