"""Checks of a device by its results (device_run.cpp), as records: what, case, ok, and numbers or why not."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llamamix import ggml

from . import attention_f16
from .device_cases import COLD, Prepared, judge_join, judge_migration
from .requests import ABOUT, Program, Refused, Stopped

Record = dict[str, Any]

N_ENDS = 4

MIGRATIONS = {"migrate": "migration, composed", "move": "migration"}  # by ggml's operations, by nodes of ours

# how attention is computed, and what attention_f16.bounds() calls it
WAYS = {"node": "node", "join": "join", "compose": "compose"}
WAYS_ON_CPU = WAYS | {"node": "host"}


class Device:
    """device-run, which is started again where it has ended: a fault on a GPU ends the process.

    name         as ggml names it, None for the first GPU
    repetitions  of every computation, before its result is read
    graphs       whether ggml may use CUDA graphs
    timeout      seconds after which a request ends the program
    """

    N_STARTS = 30

    def __init__(
        self,
        command: Sequence[str],
        name: str | None,
        repetitions: int = 1,
        graphs: bool = True,
        env: Mapping[str, str] = os.environ,
        timeout: float = 40.0,
    ) -> None:
        self._env = {**env} if graphs else {**env, "GGML_CUDA_DISABLE_GRAPHS": "1"}
        self._command = [*command, *([name, str(repetitions)] if name else [])]
        self._timeout = timeout
        self._program: Program | None = None
        self._n_starts = 0

    def ask(self, f: Callable[[Program], Any]) -> Any:
        """f of the program. Raises Refused and Stopped."""
        if self._program is None:
            if self._n_starts == self.N_STARTS:
                raise Stopped(f"it is not started again after {self.N_STARTS} times")
            self._n_starts += 1
            self._program = Program(self._command, self._env, timeout=self._timeout)
        try:
            return f(self._program)
        except Stopped:
            self._program.close()
            self._program = None
            raise

    def close(self) -> int:
        """The exit status."""
        res = self._program.close() if self._program else 0
        self._program = None
        return res

    def about(self) -> Record:
        """Name, description, bytes of memory, and whether it has kernels for our nodes."""
        name, description, memory, nodes = self.ask(lambda p: p.ask("", ABOUT)).decode().split("\n")
        return {"device": name, "description": description, "memory": int(memory), "nodes": nodes == "1"}


def check_case(
    item: Prepared,
    ways: dict[str, str],
    devices: dict[str, Device],
    records: list[Record],
    ends: Counter[str],
) -> None:
    """Attention in every way, and the join.

    devices  of which all have the same results; the first one's are judged
    ends     how often a way has ended the process: after N_ENDS it is not tried again
    """
    data, expected = item.data, item.expected
    first = next(iter(devices.values()))
    results: dict[str, np.ndarray] = {}
    for how, bound in ways.items():
        record: Record = {"what": how, "case": str(data.case), "ok": False}
        records.append(record)
        if ends[how] == N_ENDS:
            record["why"] = f"not tried after it ended the process {N_ENDS} times"
            continue
        try:
            outs = {
                key: device.ask(lambda p, how=how: p.attention(how, data.q, data.segments, **data.options))
                for key, device in devices.items()
            }
        except Refused as reason:
            record |= {"ok": True, "refused": str(reason)}
            continue
        except Stopped as reason:
            record["why"] = str(reason)
            ends[how] += 1
            continue
        out = results[how] = next(iter(outs.values()))
        judgement = attention_f16.judge(out, data, expected, item.limits[bound], bound)
        record |= {"ok": judgement.ok, "worst": judgement.worst, "typical": judgement.typical}
        if not judgement.ok:
            record["why"] = str(judgement)
        elif any(other.tobytes() != out.tobytes() for other in outs.values()):
            record |= {"ok": False, "why": "other results without CUDA graphs"}
    if "node" in results and "compose" in results:
        seen = ~attention_f16.sees_nothing(expected)
        difference = (results["node"] - results["compose"])[seen] if seen.any() else np.zeros(1)
        rms = float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
        limit = attention_f16.CHANCE * float(np.hypot(item.limits[ways["node"]][1], item.limits[ways["compose"]][1]))
        record = {"what": "node, compose", "case": str(data.case), "ok": rms <= limit, "rms": rms, "limit": limit}
        records.append(record)
    if data.case.n_cold == 0:
        return
    for which, name in enumerate("KV"):
        record = {"what": f"join of {name}", "case": str(data.case), "ok": False}
        records.append(record)
        try:
            share = first.ask(lambda p, which=which: judge_join(p, data, which))
            record |= {"ok": share <= 1, "worst": share}
        except Refused as reason:
            record |= {"ok": True, "refused": str(reason)}
        except Stopped as reason:
            record["why"] = str(reason)


def check_migrations(device: Device, quick: bool, records: list[Record]) -> None:
    """From F16 and BF16 to every type; quick: in one way."""
    for how, hot in itertools.product(("migrate", "move"), ("f16", "bf16")):
        for cold in COLD:
            for n_rot, has_means in ((128, True),) if quick else ((0, False), (64, False), (64, True), (128, True)):
                if has_means and not ggml.is_quantized(cold):
                    continue
                case = f"{hot} to {cold}, rotated by {n_rot}{', less means' if has_means else ''}"
                record: Record = {"what": MIGRATIONS[how], "case": case, "ok": False}
                records.append(record)
                try:
                    seen = device.ask(lambda p, x=(how, hot, cold, n_rot, has_means): judge_migration(p, *x))
                    record |= {"ok": seen.ok, "same": seen.same, "rms": seen.rms, "mean": seen.mean}
                except Refused as reason:
                    record |= {"ok": True, "refused": str(reason)}
                except Stopped as reason:
                    record["why"] = str(reason)
