"""llamamix demo: a long prompt through the mixed KV cache, and through a plain one."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ._options import add_command, add_kv_mixed, add_model, add_threads, model_path, start_log
from ._progress import PromptBar
from ._session import check_prompt, open_context

if TYPE_CHECKING:
    from ..demo import DemoRun
    from ..model import Model


def register(commands: Any) -> None:
    parser = add_command(
        commands, "demo", "Continue some pages of a novel through the mixed KV cache and then through a plain one, and"
        " show what the mixed one did, and the difference.",
        usage="[OPTION ...]",
    )  # fmt: skip
    parser.set_defaults(run=_run)
    add_model(parser, default="smollm2", help="default: smollm2, pulled when needed; any that -m takes elsewhere")
    parser.add_argument("-p", "--n-prompt", type=int, default=3000, metavar="N", help="prompt tokens (default: 3000)")
    parser.add_argument("-n", "--predict", type=int, default=128, metavar="N", help="tokens to generate (default: 128)")
    parser.add_argument("-c", "--ctx-size", type=int, default=8192, metavar="N", help="context (default: 8192)")
    add_threads(parser)
    add_kv_mixed(parser)


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..errors import ParamsError
    from ..model import Model
    from ..params import ContextParams, resolve_kv_mixed
    from ..pull import console_progress, pull
    from ._tables import comparison

    start_log(args)
    kv_mixed = resolve_kv_mixed(args.kv_mixed)
    if kv_mixed is None:
        raise ParamsError("The demo is about the mixed KV cache; --kv-mixed can not be off.")
    if args.n_prompt < 1:
        raise ParamsError(f"--n-prompt must be at least 1, not {args.n_prompt}.")
    if args.predict < 1:
        raise ParamsError(f"-n must be at least 1, not {args.predict}.")
    params = {"n_ctx": args.ctx_size, "n_threads": args.threads}
    ContextParams(**params)
    path = model_path(args.model)
    with console_progress() as progress:
        text = pull("botchan", progress).read_text(encoding="utf-8")

    with Model(path) as model:
        tokens = model.tokenize(text)[: args.n_prompt]
        mixed = _continue(model, params | {"kv_mixed": kv_mixed}, tokens, args.predict, is_shown=True)
        sys.stdout.write("\n\n")
        sys.stdout.flush()
        plain = _continue(model, params | {"kv_mixed": False}, tokens, args.predict, is_shown=False)
        sys.stdout.write(difference(model, mixed, plain))
    console = Console()
    for table in comparison(mixed, plain):
        console.print(table)


def _continue(model: Model, params: dict[str, Any], tokens: list[int], n_predict: int, is_shown: bool) -> DemoRun:
    from ..demo import run

    with open_context(model, params) as context:
        check_prompt(context, len(tokens), n_predict)
        with PromptBar(context, "prompt" if is_shown else "plain cache, prompt") as bar:

            def emit(piece: str) -> None:
                if is_shown:
                    bar.stop()
                    sys.stdout.write(piece)
                    sys.stdout.flush()

            return run(context, tokens, n_predict, emit)


def difference(model: Model, mixed: DemoRun, plain: DemoRun) -> str:
    """In words, what a plain cache makes of the text."""
    n_same = mixed.n_same(plain)
    same = f"A plain cache continues with the same {n_same} tokens"
    if mixed.tokens == plain.tokens:
        return f"{same}.\n\n"
    rest = model.detokenize(plain.tokens[n_same:]).strip()
    return f"{same}, and then otherwise: {rest}\n\n" if rest else f"{same}, and ends there.\n\n"
