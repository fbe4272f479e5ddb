"""llamamix demo: a long prompt through the mixed KV cache."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ._options import add_command, add_kv_mixed, add_threads, model_path, start_log


def register(commands: Any) -> None:
    parser = add_command(
        commands, "demo", "Continue some pages of a novel through the mixed KV cache, and show what the cache did."
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "-m", "--model", default="smollm2", metavar="MODEL", help="default: smollm2, pulled when needed"
    )
    parser.add_argument("-p", "--n-prompt", type=int, default=3000, metavar="N", help="prompt tokens (default: 3000)")
    parser.add_argument("-n", "--predict", type=int, default=128, metavar="N", help="tokens to generate (default: 128)")
    parser.add_argument("-c", "--ctx-size", type=int, default=8192, metavar="N", help="context (default: 8192)")
    add_threads(parser)
    add_kv_mixed(parser)


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..demo import run
    from ..errors import ParamsError
    from ..params import resolve_kv_mixed
    from ..pull import console_progress, pull
    from ._tables import summary

    start_log(args)
    kv_mixed = resolve_kv_mixed(args.kv_mixed)
    if kv_mixed is None:
        raise ParamsError("The demo is about the mixed KV cache; --kv-mixed can not be off.")
    if args.n_prompt < 1:
        raise ParamsError(f"--n-prompt must be at least 1, not {args.n_prompt}.")
    model = model_path(args.model)
    with console_progress() as progress:
        text = pull("botchan", progress)

    def emit(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    result = run(
        model,
        text,
        emit,
        n_prompt=args.n_prompt,
        n_predict=args.predict,
        n_ctx=args.ctx_size,
        kv_mixed=kv_mixed,
        n_threads=args.threads,
    )
    sys.stdout.write("\n\n")
    Console().print(summary(result.n_prompt, result.n_generated, result.perf, result.stats))
