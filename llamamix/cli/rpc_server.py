"""llamamix rpc-server: memory and processors of this machine for models of others."""

from __future__ import annotations

import argparse
import ipaddress
import os
import subprocess
import sys
from typing import Any

from ._options import add_command

_WARNING = (
    "The protocol has neither authentication nor encryption: who reaches the port can use, read and crash the server."
    " Only in a network that you trust."
)


def register(commands: Any) -> None:
    parser = add_command(
        commands, "rpc-server",
        "Run ggml-rpc-server, which has layers of a model that a client on another machine runs. It has one client at a"
        f" time. {_WARNING}",
    )  # fmt: skip
    parser.set_defaults(run=_run)
    parser.add_argument("-H", "--host", default="127.0.0.1", metavar="ADDRESS",
                        help="IPv4 address to listen at (default: 127.0.0.1, this machine alone)")  # fmt: skip
    parser.add_argument("-p", "--port", type=int, metavar="N", help="default: 50052")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads (default: half as many as CPUs)")
    parser.add_argument("-d", "--device", metavar="NAME,..", help="devices (default: the GPUs, else the CPU)")
    parser.add_argument("-c", "--cache", action="store_true", help="keep large tensors in a file for the next client")


def _run(args: argparse.Namespace) -> int:
    from ..errors import ParamsError
    from ..rpc import DEFAULT_PORT, find_rpc_server

    port = DEFAULT_PORT if args.port is None else args.port
    if not 1 <= port <= 65535:
        raise ParamsError(f"-p must be 1 to 65535, not {port}.")
    if args.threads is not None and not 1 <= args.threads <= 512:
        raise ParamsError(f"-t must be 1 to 512, not {args.threads}.")
    try:
        address = ipaddress.IPv4Address(args.host)
    except ValueError:
        raise ParamsError(f"-H must be an IPv4 address of this machine, not {args.host!r}.") from None

    program = find_rpc_server()
    command = [str(program), "-H", str(address), "-p", str(port)]
    for flag, value in (("-t", args.threads), ("-d", args.device)):
        if value is not None:
            command += [flag, str(value)]
    if args.cache:
        command.append("-c")
    if not address.is_loopback:
        print(f"llamamix: {address} is not this machine alone. {_WARNING}", file=sys.stderr, flush=True)
    if sys.platform == "win32":  # there, exec leaves the shell without the program
        return subprocess.run(command).returncode
    sys.stdout.flush()
    os.execv(program, command)
