#!/usr/bin/env python3
"""A model here and on ggml-rpc servers, with a plain and a mixed cache: speed, and what crosses the wire.

    python tools/rpc_table.py -m MODEL                             # here, 1 and 2 servers, depths 0, 2048 and 4096
    python tools/rpc_table.py -m MODEL -d 4096 -s 2 -n 64 -r 5
    python tools/rpc_table.py -m MODEL --bytes                     # no times: a machine that has other things to do

All servers are processes on this machine, on the loopback interface. Speeds are medians of repetitions that the caches
take in turn. Bytes are counted in a run of their own, by a relay between client and server. The table is Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import raw
from helpers.rpc import Relay, RpcServer

from llamamix import Context, Model
from llamamix.pull import resolve

CACHES = {"plain": False, "mixed": True}


class Setup:
    """A model on so many servers, 0: here, and a context with each cache."""

    def __init__(self, path: Path, n_servers: int, n_ctx: int, n_threads: int, count: bool) -> None:
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [
            self._stack.enter_context(RpcServer(folder / f"log{i}", n_threads=n_threads)) for i in range(n_servers)
        ]
        self.relays = [self._stack.enter_context(Relay(server.endpoint)) for server in servers] if count else []
        model = self._stack.enter_context(Model(path, rpc=[each.endpoint for each in self.relays or servers]))
        self.contexts = {
            name: self._stack.enter_context(Context(model, n_ctx=n_ctx, n_threads=n_threads, kv_mixed=kv_mixed))
            for name, kv_mixed in CACHES.items()
        }

    def kv_bytes(self, cache: str) -> list[int]:
        """Bytes of the cache on each server, here when there is none."""
        with self.contexts[cache]._handle as ctx:
            found = raw.context_by_buffer(ctx) or {}
        there = [n for name, n in found.items() if name.startswith("RPC")]
        return there or [n for name, n in found.items() if not name.startswith("RPC")]

    def n_bytes(self) -> tuple[int, int]:
        return sum(relay.n_sent for relay in self.relays), sum(relay.n_received for relay in self.relays)

    def close(self) -> None:
        self._stack.close()


def decode(context: Context, tokens: np.ndarray) -> None:
    for token in tokens:
        context.decode([token])
        _ = context.logits


def rewind(context: Context, depth: int) -> None:
    context.memory.seq_rm(0, depth, -1)


def measure(args: argparse.Namespace, path: Path, n_servers: int) -> list[list[str]]:
    n_ctx = max(args.depths) + args.n_gen + 256
    tokens = np.random.default_rng(0).integers(3, 400, n_ctx)
    rows = []
    timed = None if args.bytes else Setup(path, n_servers, n_ctx, args.threads, count=False)
    speeds: dict[tuple[str, int], float] = {}
    for depth in args.depths if timed else ():
        samples: dict[str, list[float]] = {name: [] for name in CACHES}
        for context in timed.contexts.values():
            context.memory.clear()
            if depth:
                context.decode(tokens[:depth])
            decode(context, tokens[:4])
            rewind(context, depth)
        for _ in range(args.repetitions):
            for name, context in timed.contexts.items():
                start = time.perf_counter()
                decode(context, tokens[: args.n_gen])
                samples[name].append(args.n_gen / (time.perf_counter() - start))
                rewind(context, depth)
        speeds |= {(name, depth): statistics.median(values) for name, values in samples.items()}
    if timed:
        timed.close()

    counted = Setup(path, n_servers, n_ctx, args.threads, count=True)
    for depth in args.depths:
        for name, context in counted.contexts.items():
            context.memory.clear()
            if depth:
                context.decode(tokens[:depth])
            decode(context, tokens[:2])  # what the prompt's graph leaves to do
            before = counted.n_bytes()
            decode(context, tokens[: args.n_gen])
            sent, received = ((b - a) / args.n_gen for a, b in zip(before, counted.n_bytes(), strict=True))
            kv = " + ".join(f"{n / 2**20:.1f}" for n in counted.kv_bytes(name))
            speed = f"{speeds[name, depth]:.1f}" if speeds else ""
            where = "here" if n_servers == 0 else f"{n_servers}"
            wire = ["", ""] if n_servers == 0 else [f"{sent / 1024:.1f}", f"{received / 1024:.1f}"]
            rows.append([where, name, str(depth), speed, *wire, kv])
    counted.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-s", "--servers", default="0,1,2", metavar="N,..", help="0: here (default: 0,1,2)")
    parser.add_argument("-d", "--depths", default="0,2048,4096", metavar="N,..", help="tokens in the cache before")
    parser.add_argument("-n", "--n-gen", type=int, default=32, metavar="N", help="tokens to decode (default: 32)")
    parser.add_argument("-r", "--repetitions", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("-t", "--threads", type=int, default=1, metavar="N", help="of everybody (default: 1)")
    parser.add_argument("--bytes", action="store_true", help="no times")
    args = parser.parse_args()
    args.depths = [int(n) for n in args.depths.split(",")]
    path = resolve(args.model)

    head = ["servers", "cache", "depth", "t/s", "KiB sent per token", "KiB received per token", "KV MiB per server"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}", flush=True)
    for n in args.servers.split(","):
        for row in measure(args, path, int(n)):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
