"""llamamix serve: llama-server with the mixed KV cache."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ._options import add_command, add_kv_mixed, add_model, add_rpc, add_threads, model_path
from ._session import check_memory

if TYPE_CHECKING:
    from ..server import Server

# what asks a program to end, where it exists
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def register(commands: Any) -> None:
    parser = add_command(
        commands, "serve", "Run llama-server with the mixed KV cache; its URL goes to stdout when it is ready.",
        usage="-m MODEL [OPTION ...] [-- ARG ...]",
    )
    parser.set_defaults(run=_run)
    parser.hint = "; options of llama-server come after --, as in: llamamix serve -m MODEL -- -fa on"
    add_model(parser, required=True)
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="0: a free one (default: 8080)")
    parser.add_argument("-c", "--ctx-size", type=int, metavar="N", help="of all slots (default: from the model)")
    parser.add_argument("-np", "--parallel", type=int, metavar="N", help="slots (default: llama-server's)")
    add_threads(parser)
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, metavar="N", help="default: all")
    add_rpc(parser)
    add_kv_mixed(parser)
    parser.add_argument("args", nargs="*", metavar="-- ARG", help="more arguments, for llama-server")


def _run(args: argparse.Namespace) -> int:
    from ..errors import ParamsError
    from ..gguf_file import GgufFile
    from ..params import ContextParams, resolve_kv_mixed
    from ..rpc import check_answers, parse_endpoints
    from ..server import Server, find_server
    from ..shape import ModelShape

    if not 0 <= args.port <= 65535:
        raise ParamsError(f"--port must be 0 to 65535, not {args.port}.")
    kv_mixed = resolve_kv_mixed(args.kv_mixed)  # a mistake should not have to wait for the model
    ContextParams(n_ctx=args.ctx_size or 0, n_threads=args.threads)
    servers = parse_endpoints(args.rpc) if args.rpc else ()
    program = find_server()
    path = model_path(args.model)
    file = GgufFile(path)
    if args.ctx_size and not args.args and not servers:  # who gives llama-server more of its options may mean anything
        check_memory(ModelShape.of(file, path), {"n_ctx": args.ctx_size, "kv_mixed": kv_mixed or False})
    command = ["-m", str(path), "--host", args.host, "--port", str(args.port)]
    for flag, value in (("-c", args.ctx_size), ("-np", args.parallel), ("-t", args.threads), ("-ngl", args.n_gpu_layers)):
        if value is not None:
            command += [flag, str(value)]
    if servers:
        check_answers(servers)
        command += ["--rpc", ",".join(servers)]

    def show(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with (
        Server([*command, *args.args], kv_mixed, program=program, on_line=show if args.verbose else None) as server,
        _pass_on(server),
    ):
        url = server.wait_ready()
        prefix = _value_of("--api-prefix", args.args)
        if server.has_page(prefix):
            show(f"llamamix: chat in a browser at {url}{prefix}/; the API is at {url}{prefix}/v1.")
        else:
            show(f"llamamix: this llama-server has no web page; the API is at {url}{prefix}/v1.")
        print(url, flush=True)
        return server.wait()


def _value_of(flag: str, args: Sequence[str]) -> str:
    """What follows the last such flag, "" without one."""
    values = [value for name, value in zip(args, args[1:]) if name == flag]
    return values[-1] if values else ""


@contextmanager
def _pass_on(server: Server) -> Iterator[None]:
    """Let the server decide what a signal means."""

    def handler(number: int, _frame: object) -> None:
        server.send_signal(number)

    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
