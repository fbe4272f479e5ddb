"""Options that several commands have, named as llama.cpp names them."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from ..params import SamplingParams

UNLIMITED = 2**31 - 1
MODEL_HELP = "a GGUF file, a name that 'pull' knows, or hf:ORG/REPO[:FILE or QUANT]"


class Parser(argparse.ArgumentParser):
    """A parser whose errors about arguments can end with a hint."""

    hint = ""

    def error(self, message: str) -> NoReturn:
        super().error(message if message.startswith("the following arguments are required") else message + self.hint)


def add_command(commands: Any, name: str, text: str, usage: str | None = None) -> Parser:
    """A sub-command.

    text   what it does; its first sentence in the list of commands
    usage  arguments that are needed, or that there is more to know about than that they are options; None: all of them
    """
    parser: Parser = commands.add_parser(
        name, help=text.partition(". ")[0].rstrip("."), description=text, allow_abbrev=False,
        usage=None if usage is None else f"llamamix {name} {usage}",
    )  # fmt: skip
    parser.set_defaults(parser=parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="show llama.cpp's log on stderr")
    return parser


def add_model(parser: argparse._ActionsContainer, **options: Any) -> None:
    parser.add_argument("-m", "--model", metavar="MODEL", **({"help": MODEL_HELP} | options))


def add_kv_mixed(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--kv-mixed", metavar="SPEC", default=True,
        help="the mixed KV cache: a preset (default, quality, memory), parameters such as"
        " hot=512,cold=q4_0,group=128,threshold=0.8,sink=4, or both: quality,hot=1024; off: a plain cache (default: default)",
    )  # fmt: skip


def add_threads(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: as many as there are CPUs)")


def add_rpc(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--rpc", metavar="HOST:PORT,..", help="servers that have layers of the model, see rpc-server: only in a network"
        " that you trust, there is neither authentication nor encryption",
    )  # fmt: skip


def model_params(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of ModelParams that were given. Raises ParamsError."""
    from ..params import ModelParams

    params = {"n_gpu_layers": args.n_gpu_layers, "rpc": args.rpc}
    params = {name: value for name, value in params.items() if value is not None}
    ModelParams(**params)
    return params


def add_prompt(parser: argparse.ArgumentParser, required: bool) -> None:
    prompt = parser.add_mutually_exclusive_group(required=required)
    prompt.add_argument("-p", "--prompt", metavar="TEXT")
    prompt.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file (-: stdin)")


def read_prompt(args: argparse.Namespace) -> str:
    """Raises ParamsError for what is not UTF-8, and when there is nothing to read."""
    if args.file is None:
        return check_text(args.prompt, "-p")
    return read_text(args.file)


def check_text(text: str, flag: str) -> str:
    """An argument, unless the bytes that were given are not UTF-8: Python has made surrogates of them then."""
    from ..errors import ParamsError

    try:
        text.encode()
    except UnicodeEncodeError:
        raise ParamsError(f"The text of {flag} is not UTF-8.") from None
    return text


def read_text(file: str) -> str:
    """A UTF-8 file, "-": stdin. Raises ParamsError for what is not UTF-8 and for a closed stdin, OSError."""
    from ..errors import ParamsError
    from ..text import decode_utf8

    if file != "-":
        return decode_utf8(Path(file).read_bytes(), file)
    if sys.stdin is None:
        raise ParamsError("Standard input is closed, and -f - reads it.")
    return decode_utf8(sys.stdin.buffer.read(), "Standard input")


def add_length(
    parser: argparse.ArgumentParser,
    what: str = "tokens to generate, -1: until the model or the context ends",
    default: int = 128,
) -> None:
    parser.add_argument(
        "-n", "--predict", type=int, default=default, metavar="N", help=f"{what} (default: {default})"
    )  # fmt: skip
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")


def max_tokens(args: argparse.Namespace) -> int:
    """How many to generate. Raises ParamsError."""
    from ..errors import ParamsError

    n: int = args.predict
    if n != -1 and not 1 <= n < UNLIMITED:
        raise ParamsError(f"-n must be -1, or from 1 to {UNLIMITED - 1}, not {n}.")
    return UNLIMITED if n == -1 else n


def add_context(parser: argparse.ArgumentParser) -> None:
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
    add_rpc(context)
    context.add_argument("-ctk", "--cache-type-k", default="f16", metavar="TYPE", help="default: f16")
    context.add_argument("-ctv", "--cache-type-v", default="f16", metavar="TYPE", help="default: f16")
    context.add_argument("-fa", "--flash-attn", default="auto", metavar="MODE", help="on, off or auto (default)")
    add_kv_mixed(context)


def context_params(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of ContextParams. Raises ParamsError."""
    from ..params import ContextParams

    params = {
        "n_ctx": args.ctx_size,
        "n_batch": args.batch_size,
        "n_ubatch": args.ubatch_size,
        "n_threads": args.threads,
        "n_threads_batch": args.threads_batch,
        "flash_attn": args.flash_attn,
        "type_k": args.cache_type_k,
        "type_v": args.cache_type_v,
        "kv_mixed": args.kv_mixed,
        "swa_full": False,  # as llama.cpp's programs have it: text is only added
    }
    ContextParams(**params)
    return params


def add_sampling(parser: argparse.ArgumentParser) -> None:
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
    sampling.add_argument("-j", "--json-schema", metavar="SCHEMA", help="JSON schema that the text must follow")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Raises ParamsError."""
    from ..params import SamplingParams

    return SamplingParams(
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
        json_schema=args.json_schema,
    )


def start_log(args: argparse.Namespace) -> None:
    """Send llama.cpp's log to stderr when asked to."""
    if args.verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")


def model_path(name: str) -> Path:
    """A model given by its path or its name, pulled when needed."""
    from ..pull import console_progress, resolve

    with console_progress() as progress:
        return resolve(name, progress)
