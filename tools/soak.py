#!/usr/bin/env python3
"""Keeps a llama-server with the mixed KV cache busy with requests of all kinds, and checks what is left of it.

    python tools/soak.py -m smollm2 -n 2000 --seconds 1500

It starts the server itself, on the loopback interface. Requests are drawn from a seed: short and long prompts, prompts
that begin like others, answers that are cut short, answers that outgrow the context (which shifts), clients that go away
in the middle, prompts that are refused as too long. The first of two limits ends it, -n or --seconds. After that

idle      no slot works on anything
probe     in every slot a prompt gives the text that it gave before the first request, migrations included
capacity  all slots at once are filled to the last cell: none was lost, and each still begins with its expected text
memory    the server's RSS has not grown by more than --rss-slack MiB since it was warm: after a tenth of the requests,
          or half of them where a tenth is less than 100
log       the server has logged no error but one for each prompt that was too long

The bound on RSS: by then every buffer of the cache and the graphs exists, and the server's own prompt cache (--cache-ram)
is full. What still grows is the allocator's, as threads come and go, by some MiB and then no more, with a plain cache as
with a mixed one. Requests that would leave their rows behind take 50 kB each with a tiny model, 90 MB in 1,800 of them.

stdout carries the table; everything said along the way goes to stderr. Exits 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llamamix import LlamamixError, Model
from llamamix.cli._errors import exit_code
from llamamix.cli._output import FORMS, render
from llamamix.params import resolve_kv_mixed
from llamamix.pull import resolve
from llamamix.server import Server

_TIMEOUT = 120.0  # seconds that one request may take
_N_PROBE = 48  # tokens of a probe's answer
_N_WARM = 100  # requests
_KINDS = {"short": 30, "long": 20, "prefix": 25, "cut": 10, "shift": 2, "cancel": 10, "too long": 3}  # of a hundred


@dataclass(frozen=True)
class Request:
    kind: str
    prompt: list[int]
    n_out: int
    n_read: int | None = None  # tokens after which the client goes away


@dataclass
class Result:
    """What has happened so far; several threads add to it."""

    n_done: int = 0
    n_cancelled: int = 0
    n_refused: int = 0
    n_tokens_in: int = 0
    n_tokens_out: int = 0
    seconds: list[float] = field(default_factory=list)  # of requests that were answered to the end
    rss: dict[int, float] = field(default_factory=dict)  # MiB after so many hundredths of the requests
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def draw(rng: np.random.Generator, n_vocab: int, n_ctx: int, prefixes: Sequence[list[int]]) -> Request:
    """One request for slots of n_ctx tokens."""

    def tokens(low: float, high: float) -> list[int]:
        return rng.integers(3, n_vocab, int(rng.integers(max(1, int(low)), max(2, int(high))))).tolist()

    kind = rng.choice(list(_KINDS), p=np.array(list(_KINDS.values())) / sum(_KINDS.values()))
    n_out = int(rng.integers(1, max(2, n_ctx // 10)))
    if kind == "short":
        return Request(kind, tokens(2, n_ctx / 16), n_out)
    if kind == "long":
        return Request(kind, tokens(n_ctx / 4, n_ctx * 0.85), n_out)
    if kind == "prefix":
        return Request(kind, prefixes[rng.integers(len(prefixes))] + tokens(1, n_ctx / 8), n_out)
    if kind == "cut":
        return Request(kind, tokens(2, n_ctx / 2), int(rng.integers(1, 4)))
    if kind == "shift":
        return Request(kind, tokens(2, n_ctx / 4), int(n_ctx * 1.2))
    if kind == "cancel":
        n_read = int(rng.integers(0, n_ctx // 8))
        return Request(kind, tokens(2, n_ctx * 0.8), 100 * n_ctx, n_read)
    return Request(kind, tokens(n_ctx, n_ctx * 1.5), 1)


class Soak:
    """A server under load, and the checks of it."""

    def __init__(self, server: Server, n_slots: int, n_ctx: int, n_vocab: int, seed: int, client: Any, log: list[str]):
        self.result = Result()
        self._server = server
        self._n_slots, self._n_ctx, self._n_vocab = n_slots, n_ctx, n_vocab
        self._seed = seed
        self._client = client
        self._log = log
        self._warm = 10
        rng = np.random.default_rng(seed)
        self._prefixes = [rng.integers(3, n_vocab, n_ctx // 3).tolist() for _ in range(3)]
        self._probe = rng.integers(3, n_vocab, n_ctx // 3).tolist()
        self._expected = self._probe_text(0)

    def run(self, n: int, seconds: float, say: Callable[[str], None]) -> None:
        """Up to n requests, begun within so many seconds, from half as many clients more than there are slots."""
        end = time.monotonic() + seconds
        requests = iter(range(n))
        begun = threading.Lock()
        self._warm = 10 if n * 10 // 100 >= _N_WARM else 50

        def work() -> None:
            while time.monotonic() < end and not self.result.errors:
                with begun:
                    i = next(requests, None)
                if i is None:
                    return
                self._ask(draw(np.random.default_rng([self._seed, i]), self._n_vocab, self._n_ctx, self._prefixes))
                with self.result.lock:
                    self.result.n_done += 1
                    self._sample(n, say)

        n_clients = self._n_slots + self._n_slots // 2
        with ThreadPoolExecutor(n_clients) as pool:
            for future in [pool.submit(work) for _ in range(n_clients)]:
                future.result()
        self.result.rss[100] = self._rss()

    def checks(self, rss_slack: float) -> dict[str, str]:
        """What is wrong at the end, by check; "" where nothing is."""
        found = {"idle": "" if self._wait_idle() else "a slot still works"}
        texts = [self._probe_text(slot) for slot in range(self._n_slots)]
        wrong = [slot for slot, text in enumerate(texts) if text != self._expected]
        found["probe"] = f"slots {wrong} give another text than at the start" if wrong else ""
        found["capacity"] = self._check_capacity()
        growth = self.result.rss[100] - self.result.rss.get(self._warm, self.result.rss[100])
        found["memory"] = f"RSS has grown by {growth:.1f} MiB" if growth > rss_slack else ""
        errors = [line for line in self._log if re.match(r"^[\d.]+ E ", line)]
        unexpected = [line for line in errors if "exceeds the available context size" not in line]
        if unexpected:
            found["log"] = unexpected[0]
        elif len(errors) > self.result.n_refused:
            found["log"] = f"{len(errors)} prompts were logged as too long, not {self.result.n_refused}"
        else:
            found["log"] = ""
        return found

    def _ask(self, request: Request) -> None:
        import openai

        started = time.monotonic()
        n_out = 0
        try:
            stream = self._client.completions.create(
                model="soak", prompt=request.prompt, max_tokens=request.n_out, temperature=0.7, stream=True,
                seed=len(request.prompt), stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
            )  # fmt: skip
            with stream:
                for chunk in stream:
                    if chunk.usage:
                        n_out = chunk.usage.completion_tokens
                    elif request.n_read is not None:
                        n_out += 1
                        if n_out > request.n_read:
                            break
        except openai.BadRequestError as error:
            with self.result.lock:
                if request.kind == "too long" and error.type == "exceed_context_size_error":
                    self.result.n_refused += 1
                else:
                    self.result.errors.append(f"{request.kind}: {error}")
            return
        except openai.OpenAIError as error:
            with self.result.lock:
                self.result.errors.append(f"{request.kind}: {error}")
            return
        with self.result.lock:
            self.result.n_tokens_in += len(request.prompt)
            self.result.n_tokens_out += n_out
            if request.n_read is not None:
                self.result.n_cancelled += 1
            elif n_out != request.n_out:
                self.result.errors.append(f"{request.kind}: {n_out} tokens instead of {request.n_out}")
            else:
                self.result.seconds.append(time.monotonic() - started)

    def _sample(self, n: int, say: Callable[[str], None]) -> None:
        done = self.result.n_done
        for percent in (10, 50):
            if done == max(1, n * percent // 100):
                self.result.rss[percent] = self._rss()
        if done % max(1, n // 10) == 0:
            say(f"{done} of {n} requests, {self.result.n_tokens_out} tokens, RSS {self._rss():.1f} MiB")

    def _text(self, slot: int, prompt: list[int], n_out: int) -> str:
        answer = self._client.completions.create(
            model="soak", prompt=prompt, max_tokens=n_out, temperature=0,
            extra_body={"id_slot": slot, "cache_prompt": False, "ignore_eos": True},
        )  # fmt: skip
        return answer.choices[0].text

    def _probe_text(self, slot: int) -> str:
        return self._text(slot, self._probe, _N_PROBE)

    def _check_capacity(self) -> str:
        """Fill all slots together: the probe, what it is followed by, and other tokens up to the last cell."""
        import openai

        rng = np.random.default_rng(self._seed)
        n_fill = self._n_ctx - 2  # one token is left to generate, and one is never decoded
        prompts = [[*self._probe, *rng.integers(3, self._n_vocab, n_fill - len(self._probe)).tolist()]] * self._n_slots
        try:
            with ThreadPoolExecutor(self._n_slots) as pool:
                texts = list(pool.map(self._text, range(self._n_slots), prompts, [2] * self._n_slots))
        except openai.OpenAIError as error:
            return f"a slot can not be filled: {error}"
        held = sum(self._held(slot) for slot in range(self._n_slots))
        if held < self._n_slots * n_fill:
            return f"{held} tokens are held instead of {self._n_slots * n_fill}"
        return "" if len(set(texts)) == 1 else "slots that hold the same give different texts"

    def _held(self, slot: int) -> int:
        return self._slots()[slot]["n_prompt_tokens"]

    def _slots(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self._server.url}/slots", timeout=_TIMEOUT) as answer:
            return json.load(answer)

    def _wait_idle(self) -> bool:
        end = time.monotonic() + _TIMEOUT
        while any(slot["is_processing"] for slot in self._slots()):
            if time.monotonic() > end:
                return False
        return True

    def _rss(self) -> float:
        """MiB."""
        command = ["ps", "-o", "rss=", "-p", str(self._server.pid)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


def record(result: Result, seconds: float) -> dict[str, Any]:
    latency = np.array(result.seconds or [np.nan])
    return {
        "requests": result.n_done,
        "cancelled": result.n_cancelled,
        "refused": result.n_refused,
        "errors": len(result.errors),
        "tokens in": result.n_tokens_in,
        "tokens out": result.n_tokens_out,
        "seconds": round(seconds, 1),
        "p50 ms": round(float(np.percentile(latency, 50)) * 1e3, 1),
        "p99 ms": round(float(np.percentile(latency, 99)) * 1e3, 1),
        **{f"RSS at {p} % (MiB)": round(result.rss.get(p, float("nan")), 1) for p in (10, 50, 100)},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Requests of all kinds for a llama-server with the mixed KV cache.")
    parser.add_argument("-m", "--model", default="smollm2", help="a GGUF file or a name (default: smollm2)")
    parser.add_argument("-n", "--requests", type=int, default=2000, metavar="N", help="default: 2000")
    parser.add_argument("--seconds", type=float, default=1800, metavar="S", help="begin none after so many (1800)")
    parser.add_argument("-np", "--parallel", type=int, default=4, metavar="N", help="slots (default: 4)")
    parser.add_argument("-c", "--ctx-size", type=int, default=512, metavar="N", help="of one slot (default: 512)")
    parser.add_argument("--kv-mixed", default="hot=64,group=16,sink=4", metavar="SPEC", help="off: a plain cache")
    parser.add_argument("-t", "--threads", type=int, default=1, metavar="N", help="of the server (default: 1)")
    parser.add_argument("--cache-ram", type=int, default=4, metavar="MIB", help="for prompts (default: 4)")
    parser.add_argument("-s", "--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--rss-slack", type=float, default=8, metavar="MIB", help="default: 8")
    parser.add_argument("-o", "--output", choices=FORMS, default="md", help="default: md")
    return parser


def _run(args: argparse.Namespace) -> None:
    try:
        import openai
    except ImportError:
        raise LlamamixError("The soak needs the openai package: pip install openai.") from None

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    path = resolve(args.model)
    with Model(path, vocab_only=True) as model:
        n_vocab = model.n_vocab
    flags = {
        "-m": path, "-c": args.ctx_size * args.parallel, "-np": args.parallel, "-t": args.threads, "-tb": args.threads,
        "--port": 0, "--cache-ram": args.cache_ram,
    }  # fmt: skip
    command = [str(part) for flag in flags.items() for part in flag]
    log: list[str] = []
    with Server([*command, "--context-shift"], resolve_kv_mixed(args.kv_mixed), on_line=log.append) as server:
        url = server.wait_ready(_TIMEOUT)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=_TIMEOUT, max_retries=0)
        with client:
            soak = Soak(server, args.parallel, args.ctx_size, n_vocab, args.seed, client, log)
            started = time.monotonic()
            soak.run(args.requests, args.seconds, say)
            seconds = time.monotonic() - started
            checks = soak.checks(args.rss_slack)
    result = soak.result
    checks = {"requests": result.errors[0] if result.errors else ""} | checks
    for name, problem in checks.items():
        say(f"{name}: {problem or 'ok'}")
    print(render([record(result, seconds)], args.output), end="")
    failed = [name for name, problem in checks.items() if problem]
    if failed:
        raise LlamamixError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}.")


if __name__ == "__main__":
    sys.exit(exit_code(_run, _parser().parse_args()))
