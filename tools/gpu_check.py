#!/usr/bin/env python3
"""Checks and times the mixed cache on a GPU: one table, and everything seen as JSON.

    cmake --preset cuda && cmake --build build/cuda --target llamamix device-run
    python tools/gpu_check.py --out gpu.json

correctness  attention by our kernels, by the join in front of ggml_flash_attn_ext(), and composed of ggml's
             operations, each against float64 with a bound derived from the case's data
             (tests/helpers/attention_f16.py), and against each other; the join and migration against the CPU; the same
             results with CUDA graphs and without
times        attention alone in the shape of Llama-3-8B (32 heads, 8 KV heads of 128 values, 512 hot cells)
model        llama-bench on a model of that shape with random weights, which is written first (4 GB)

Some four minutes on an H100, most of it for the model; --quick takes a minute. Libraries, device-run and llama-bench
are those in LLAMAMIX_LIB_PATH or build/cuda/bin. Every part writes what it has seen to the file, so that a run that is
cut off leaves that. The exit status is 1 where something is wrong; times are reported, whatever they are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("correctness", "times", "model")
WAYS = ("node", "join", "compose")
OURS = (*WAYS, "migrate", "move")  # of a mixed cache
N_HEAD, N_HEAD_KV, N_EMBD, N_LAYER = 32, 8, 128, 32  # Llama-3-8B
GROUP = 128  # rows that a migration moves

Record = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is timed."""

    n_hot: int = 512
    depths: tuple[int, ...] = (512, 4096, 32768, 131072)
    deep: int = 32768
    n_prompt: int = 512
    n_gen: int = 64
    model_depths: tuple[int, ...] = (0, 8192, 32768)
    n_bytes: int = 256 << 20  # of rows at least, far more than a GPU's caches hold
    n_attn: int = N_LAYER  # in a graph, whose start takes its time too


# what a CPU does in seconds, to see that all of this works
SMALL = Sizes(64, (64, 256, 512), 512, 32, 8, (0, 512), 4 << 20, 4)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--device", metavar="NAME", help="as ggml names it, e.g. CUDA1 or CPU (default: the first GPU)")
    add("--only", choices=PARTS, help="this part alone (default: all)")
    add("--quick", action="store_true", help="an eighth of the cases, no depth of 128k, one repetition")
    add("--sanitize", action="store_true", help="some small cases under compute-sanitizer, nothing else")
    add("--out", type=Path, default=Path("gpu_check.json"), metavar="FILE", help="default: %(default)s")
    add("--seconds", type=float, default=0.15, metavar="S", help="how long a time is measured (default: %(default)s)")
    add("--model-seconds", type=float, default=180.0, metavar="S", help="for all of llama-bench (default: %(default)s)")
    return parser.parse_args(argv)


_START = time.monotonic()

ENVIRONMENT = dict(os.environ)  # of the programs; this process keeps away from GPUs, see main()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _START:6.1f} s] {text}", file=sys.stderr, flush=True)


#
# the programs
#


def library_dir() -> Path:
    return Path(os.environ.get("LLAMAMIX_LIB_PATH") or ROOT / "build" / "cuda" / "bin").resolve()


def program(name: str) -> str:
    """Raises FileNotFoundError."""
    path = library_dir() / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: cmake --build build/cuda --target {name}")
    return str(path)


@contextlib.contextmanager
def opened(name: str | None, prefix: Sequence[str] = (), **options: Any) -> Iterator[Any]:
    """A Device. prefix: of the command."""
    from helpers.device_checks import Device

    device = Device([*prefix, program("device-run")], name, env=ENVIRONMENT, **options)
    try:
        yield device
    finally:
        device.close()


#
# correctness
#


def get_ways(device: str) -> dict[str, str]:
    from helpers.device_checks import WAYS, WAYS_ON_CPU

    return WAYS_ON_CPU if device == "CPU" else WAYS


def get_moves(device: str) -> list[str]:
    """Ways to migrate: by nodes of ours, which the CPU has none of, and by ggml's operations."""
    return ["migrate"] if device == "CPU" else ["move", "migrate"]


def start_worker() -> None:
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})


def prepared(cases: Sequence[Any], ways: Sequence[str]) -> Iterator[Any]:
    """Data and bounds of cases, made by other processes where there are processors for them."""
    from helpers.device_cases import prepare

    n = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 12) - 1
    if n < 3:
        yield from (prepare(case, ways) for case in cases)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n, context, initializer=start_worker) as pool:
        futures = [pool.submit(prepare, case, ways) for case in cases]
        for case, future in zip(cases, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield prepare(case, ways)


def correctness(args: argparse.Namespace, sizes: Sizes, records: list[Record], save: Callable[[], None]) -> None:
    from helpers.device_cases import cases
    from helpers.device_checks import check_case, check_migrations

    todo = cases(args.quick)
    ways, ends = get_ways(args.device), Counter()
    with opened(args.device, repetitions=4) as graphs, opened(args.device, graphs=False) as plain:
        for i, item in enumerate(prepared(todo, list(ways.values()))):
            check_case(item, ways, {"graphs": graphs, "plain": plain}, records, ends)
            if i % 40 == 39:
                say(f"correctness: {i + 1} of {len(todo)} cases")
                save()
        check_migrations(graphs, args.quick, records)
    for record in records:
        if not record["ok"]:
            print(f"wrong: {record['what']}: {record['case']}: {record.get('why') or record}", flush=True)
    for what in dict.fromkeys(r["what"] for r in records):
        mine = [r for r in records if r["what"] == what]
        refused = Counter(r["refused"] for r in mine if "refused" in r)
        failed = sum(not r["ok"] for r in mine)
        print(f"{what}: {len(mine) - failed - refused.total()} right, {failed} wrong, {refused.total()} not there")
        for reason, n in refused.most_common():
            print(f"    {n} ×: {reason}", flush=True)


#
# times
#


def specs(sizes: Sizes, quick: bool, moves: list[str]) -> list[Record]:
    """What matters most comes first. moves: ways to migrate. how: one of OURS; f16, q4_0, q8_0: a cache that is all of that type."""

    def spec(
        how: str, cold: str = "q4_0", depth: int = 0, n_gqa: int = 4, n_tokens: int = 1, graphs: bool = True
    ) -> Record:
        depth = depth or sizes.deep
        n_head_kv = N_HEAD // n_gqa if n_gqa < 4 else N_HEAD_KV
        return {
            "how": how, "cold": cold if how in OURS else "", "depth": depth, "n_head": n_head_kv * n_gqa,
            "n_head_kv": n_head_kv, "n_tokens": n_tokens, "graphs": graphs,
        }  # fmt: skip

    n = sizes.n_prompt
    depths = [depth for depth in sizes.depths if depth <= sizes.deep or not quick]
    res = [spec(how, depth=depth) for depth in depths[::-1] for how in ("node", "f16", "q4_0", "compose")]
    res += [spec(how, n_tokens=n) for how in ("join", "f16", "compose")]
    res += [spec(how, cold) for how in moves for cold in ("q4_0", "iq4_nl", "q8_0")]
    if quick:
        return res
    res += [spec("node", cold, depth) for cold in ("q8_0", "iq4_nl") for depth in depths[1:]]
    res += [spec("q8_0", depth=depth) for depth in depths]
    res += [spec(how, n_gqa=n_gqa) for n_gqa in (1, 8) for how in ("node", "f16", "q4_0")]
    res += [spec(how, n_tokens=n) for n in (2, 4, 8, 16) for how in ("node", "f16", "q4_0", "compose")]
    res += [spec("join", cold, n_tokens=n) for cold in ("iq4_nl", "q8_0")]
    for depth in (sizes.n_hot, sizes.deep):
        res += [spec(how, depth=depth, graphs=False) for how in ("node", "f16", "q4_0", "compose")]
    return res


def measure(device: Any, s: Record, sizes: Sizes, seconds: float) -> Record:
    """Adds microseconds to a spec. Raises Refused and Stopped."""
    from helpers.requests import TIME

    from llamamix import ggml
    from llamamix.formats import FORMATS

    ours = s["how"] in OURS
    hot = "f16" if ours else s["how"]
    n_hot = min(sizes.n_hot, s["depth"]) if ours else s["depth"]
    n_cold = s["depth"] - n_hot
    n_bytes = n_hot * ggml.row_size(hot, N_EMBD) + n_cold * ggml.row_size(s["cold"] or hot, N_EMBD)
    n_bytes *= 2 * s["n_head_kv"]
    n_sets = max(2, min(sizes.n_attn, -(-sizes.n_bytes // n_bytes)))
    n_tokens = GROUP if s["how"] in ("migrate", "move") else s["n_tokens"]
    n_rot = (N_EMBD, 64) if ours and n_cold else (0, 0)  # as the cache rotates K and V
    cold, hot_type = FORMATS[s["cold"] or hot].type, FORMATS[hot].type
    request = struct.pack(
        "15qd", s["n_head"], s["n_head_kv"], N_EMBD, n_cold, n_hot, n_tokens, cold, cold, hot_type, hot_type, *n_rot,
        sizes.n_attn, n_sets, 5, seconds,
    )  # fmt: skip
    how = s["how"] if ours else "plain"
    answer = device.ask(lambda p: p.ask(how, TIME, request))
    times = sorted(struct.unpack(f"{len(answer) // 8}d", answer))
    return s | {
        "us": statistics.median(times), "least": times[0], "p90": times[len(times) * 9 // 10], "n": len(times),
        "sets": n_sets, "GB/s": n_bytes / statistics.median(times) / 1e3,
    }  # fmt: skip


def times(args: argparse.Namespace, sizes: Sizes, records: list[Record], save: Callable[[], None]) -> None:
    from helpers.requests import Refused, Stopped

    with opened(args.device) as graphs, opened(args.device, graphs=False) as plain:
        for s in specs(sizes, args.quick, get_moves(args.device)):
            device = graphs if s["graphs"] else plain
            try:
                record = measure(device, s, sizes, args.seconds)
                seen = f"{record['us']:.1f} µs"
            except Refused as reason:
                record = s | {"refused": str(reason)}
                seen = f"not there: {reason}"
            except Stopped as reason:
                record = s | {"why": str(reason)}
                seen = f"failed: {reason}"
            records.append(record)
            save()
            say(" ".join(f"{k}={v}" for k, v in s.items() if v != "") + f": {seen}")


#
# a model
#


def model(args: argparse.Namespace, sizes: Sizes, records: list[Record], save: Callable[[], None]) -> None:
    from helpers.large_model import LLAMA_3_8B, Shape, write_large_model

    small = args.device == "CPU"  # to see that it works
    shape = Shape(n_layer=2, n_head=8, n_head_kv=2, n_embd=1024, n_ff=2048) if small else LLAMA_3_8B
    depths = sizes.model_depths[:-1] if args.quick else sizes.model_depths
    tests = ["-p", str(sizes.n_prompt), "-n", str(sizes.n_gen), "-d", ",".join(map(str, depths))]
    prompt = ["-p", str(sizes.n_prompt), "-n", "0", "-d", str(depths[-1])]
    hot, f16 = f"hot={sizes.n_hot}", ["-ctk", "f16", "-ctv", "f16", "--kv-mixed"]
    runs = [
        (tests, [*f16, f"off;{hot},cold=q4_0"], {}),
        (tests, ["-ctk", "q4_0", "-ctv", "q4_0", "--kv-mixed", "off"], {}),
        # hot has room for a whole ubatch there
        (prompt, [*f16, "off;cold=q4_0"], {"f16": "f16 beside default", "mixed": "default"}),
        (tests, [*f16, f"{hot},cold=q4_0,attn=compose"], {}),
    ]
    device = ["-dev", "none"] if small else ["-dev", args.device]
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > shape.n_bytes + (1 << 30)
    deadline = time.monotonic() + args.model_seconds
    with tempfile.TemporaryDirectory(dir=memory if fits else None) as folder:
        path = write_large_model(Path(folder, "model.gguf"), shape)
        say(f"model: {path} written")
        for of, run, names in runs:
            command = [
                program("llama-bench"), "-m", str(path), "-ngl", "99", "-fa", "1", "-r", "1" if args.quick else "3",
                "-o", "jsonl", *device, *of, *run,
            ]  # fmt: skip
            bench(command, names, deadline, records, save)


def bench(
    command: list[str], names: dict[str, str], deadline: float, records: list[Record], save: Callable[[], None]
) -> None:
    """Adds what llama-bench writes, line by line. names: of caches that are called by others."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=errors, text=True)
        timer = threading.Timer(max(deadline - time.monotonic(), 1), process.kill)
        timer.start()
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            seen = json.loads(line)
            mixed = seen.get("kv_mixed", "off")
            cache = "compose" if "compose" in mixed else "mixed" if mixed != "off" else seen["type_k"]
            record = {
                "cache": names.get(cache, cache),
                "test": f"tg{seen['n_gen']}" if seen["n_gen"] else f"pp{seen['n_prompt']}", "depth": seen["n_depth"],
                "t/s": seen["avg_ts"], "stddev": seen["stddev_ts"], "samples": seen["samples_ts"], "kv_mixed": mixed,
            }  # fmt: skip
            records.append(record)
            save()
            say(f"model: {record['cache']} {record['test']} @ d{record['depth']}: {record['t/s']:.2f} t/s")
        status = process.wait()
        timer.cancel()
        if status != 0:
            errors.seek(0)
            tail = errors.read()[-2000:]
            say(f"model: llama-bench ended with status {status}:\n{tail}")
            records.append({"why": f"llama-bench ended with status {status}", "command": command[1:], "stderr": tail})


#
# under compute-sanitizer
#


def sanitize(args: argparse.Namespace, sizes: Sizes, records: list[Record], save: Callable[[], None]) -> None:
    from helpers.device_cases import SMALL as CASES
    from helpers.device_cases import judge_migration, prepare
    from helpers.device_checks import check_case
    from helpers.requests import Refused, Stopped

    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        raise FileNotFoundError("there is no compute-sanitizer: put its folder on the PATH (it comes with CUDA)")
    all_ways = get_ways(args.device)
    for kind, cases, ways in (("memcheck", CASES, all_ways), ("racecheck", CASES[:1], {"node": all_ways["node"]})):
        record: Record = {"what": kind, "ok": False, "cases": len(cases)}
        records.append(record)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            prefix = [tool, "--tool", kind, "--error-exitcode", "99", "--log-file", str(log)]
            with opened(args.device, prefix, graphs=False, timeout=150.0) as device:
                for case in cases:
                    check_case(prepare(case, ways.values()), ways, {"plain": device}, records, Counter())
                    say(f"{kind}: {case}")
                if kind == "memcheck":
                    try:
                        how = get_moves(args.device)[0]
                        device.ask(lambda p, how=how: judge_migration(p, how, "f16", "q4_0", 128, True, n_rows=128))
                    except (Refused, Stopped) as reason:
                        record["why"] = str(reason)
                status = device.close()
            text = log.read_text() if log.is_file() else ""
        record |= {"ok": status == 0 and "why" not in record, "status": status, "log": text[-4000:]}
        print(f"{kind}: {'clean' if record['ok'] else f'status {status}: {text[-1500:]}'}", flush=True)
        save()


#
# the table
#


def find(records: Sequence[Record], key: str, **wanted: Any) -> float | None:
    """The number of the record that has these values."""
    for record in records:
        if key in record and all(record.get(name) == value for name, value in wanted.items()):
            return record[key]
    return None


def ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f} ×" if a and b else "not there"


def describe(record: Record) -> str:
    """What was timed."""
    what = f"{record['how']} {record['cold']}" if record["how"] in OURS else f"all {record['how']}"
    res = [what, f"{record['depth']} cells"]
    if record["n_tokens"] > 1:
        res.append(f"{record['n_tokens']} tokens")
    if record["n_head"] // record["n_head_kv"] != N_HEAD // N_HEAD_KV:
        res.append(f"{record['n_head'] // record['n_head_kv']} heads to a KV head")
    return ", ".join(res if record["graphs"] else [*res, "no CUDA graphs"])


def against(record: Record, timed: Sequence[Record]) -> str:
    """How many times faster it is than an attention over F16 and Q4_0 rows alone, and bytes of rows by time."""
    if record["how"] in ("migrate", "move"):
        return f"{GROUP} tokens of a layer"
    same = {name: record[name] for name in ("depth", "n_head", "n_head_kv", "n_tokens", "graphs")}
    found = {name: find(timed, "us", how=how, **same) for how, name in (("f16", "F16"), ("q4_0", "Q4_0"))}
    seen = [f"{ratio(other, record['us'])} {name}" for name, other in found.items() if other and record["how"] in WAYS]
    return ", ".join([*seen, f"{record['GB/s']:.0f} GB/s"])


def rows(result: Record, sizes: Sizes) -> list[tuple[str, str, str]]:
    """What it is, what is wanted, what is seen."""
    checked, timed, benched = (result.get(part, []) for part in PARTS)
    deep, n_hot, n_prompt = sizes.deep, sizes.n_hot, sizes.n_prompt

    def us(how: str, **wanted: Any) -> float | None:
        shape = {"depth": deep, "n_tokens": 1, "n_head": N_HEAD, "n_head_kv": N_HEAD_KV, "graphs": True}
        return find(timed, "us", how=how, **shape | ({"cold": "q4_0"} if how in OURS else {}) | wanted)

    def ts(cache: str, kind: str, depth: int) -> float | None:
        n = sizes.n_gen if kind == "tg" else sizes.n_prompt
        return find(benched, "t/s", cache=cache, test=f"{kind}{n}", depth=depth)

    res = []
    for what in dict.fromkeys(r["what"] for r in checked):
        there = [r for r in checked if r["what"] == what and "refused" not in r]
        n_wrong = sum(not r["ok"] for r in there)
        res.append((f"{what}: cases that are wrong", "0", f"{n_wrong} of {len(there)}" if there else "not there"))
    if timed:
        at_once, both = {"n_tokens": n_prompt}, f"{n_prompt} tokens at {deep}, join and attention"
        res += [
            (f"attention at {deep} against F16", "≥ 1.5 ×", ratio(us("f16"), us("node"))),
            (f"attention at {deep} against uniform Q4_0", "≥ 1.2 ×", ratio(us("q4_0"), us("node"))),
            ("attention at depth ≤ hot against F16", "≥ 1.0 ×", ratio(us("f16", depth=n_hot), us("node", depth=n_hot))),
            (f"{both}, against F16", "≥ 0.95 ×", ratio(us("f16", **at_once), us("join", **at_once))),
            (f"composed attention at {deep} against F16", "", ratio(us("f16"), us("compose"))),
        ]
        res += [(describe(r), "", f"{r['us']:.1f} µs, {against(r, timed)}") for r in timed if "us" in r]
    for depth in sorted({r["depth"] for r in benched if "depth" in r}):
        for name, cache, kind, other, wanted in (
            ("decode", "mixed", "tg", "f16", "≥ 1.0 ×" if depth <= n_hot else ""),
            ("decode", "mixed", "tg", "q4_0", ""),
            ("prompt", "mixed", "pp", "f16", "≥ 0.95 ×" if depth == deep else ""),
            ("composed decode", "compose", "tg", "f16", ""),
        ):
            title = f"{name} at depth {depth} against {'F16' if other == 'f16' else 'uniform Q4_0'}"
            res.append((title, wanted, ratio(ts(cache, kind, depth), ts(other, kind, depth))))
        default = ts("default", "pp", depth)
        if default:
            title = f"prompt at depth {depth} with the default hot against F16"
            res.append((title, "≥ 0.95 ×", ratio(default, ts("f16 beside default", "pp", depth))))
    move, per_second = us("move"), ts("mixed", "tg", deep)
    if move:  # a token makes a row of every layer move
        move *= N_LAYER / GROUP
        seen = f"{move * per_second / 1e6:.2%}" if per_second else f"{move:.2f} µs a token"
        res.append((f"migration, of the time of a token at depth {deep}", "≤ 1 %", seen))
    return res


def print_table(result: Record, sizes: Sizes) -> None:
    table = [("", "wanted", "seen"), *rows(result, sizes)]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    print(f"\n{result.get('about', {}).get('description', 'no device')}\n")
    for i, row in enumerate(table):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|", flush=True)


def card() -> list[str]:
    """What nvidia-smi says of the cards now, where it is there."""
    query = "name,driver_version,pstate,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return result.stdout.splitlines()


def is_wrong(result: Record) -> bool:
    records = [r for part in (*PARTS, "sanitize") for r in result.get(part, [])]
    return bool(result["failed"]) or any("why" in r or not r.get("ok", True) for r in records)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.environ["LLAMAMIX_LIB_PATH"] = str(library_dir())
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for this process and its workers, not for the programs
    arguments = {name: str(value) for name, value in vars(args).items()}
    result: Record = {"failed": {}, "arguments": arguments, "seconds": {}, "card": [card()]}

    def save() -> None:
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    try:
        with opened(args.device) as device:
            result["about"] = device.about()
    except Exception as error:
        print(f"gpu_check.py: {error}", file=sys.stderr)
        return 2
    args.device = result["about"]["device"]
    sizes = SMALL if args.device == "CPU" else Sizes()
    result["sizes"] = asdict(sizes)
    say(f"{result['about']}")

    todo: dict[str, Callable[..., None]] = {"correctness": correctness, "times": times, "model": model}
    if args.only:
        todo = {args.only: todo[args.only]}
    if args.sanitize:
        todo = {"sanitize": sanitize}
    for part, run in todo.items():
        records: list[Record] = []
        result[part] = records
        start = time.monotonic()
        say(part)
        try:
            run(args, sizes, records, save)
        except Exception as error:  # whatever it is, the other parts are wanted
            result["failed"][part] = f"{type(error).__name__}: {error}"
            say(f"{part} failed: {result['failed'][part]}")
        result["seconds"][part] = time.monotonic() - start
        result["card"].append(card())
        say(f"{part}: {time.monotonic() - start:.1f} s")
        save()
    result["table"] = rows(result, sizes)
    save()
    print_table(result, sizes)
    return 1 if is_wrong(result) else 0


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.exit(main())
