"""tools/gpu_check.py on devices that need no GPU: the CPU, where our nodes are host functions, and one that lacks them.

Its bounds are held against a kernel in numpy that rounds as kernels for GPUs do, right and with faults.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers import attention_f16, device_cases
from helpers.attention_cases import Case, Data, by_cell, rotations
from helpers.attention_reference import by_kv_head, reference, slopes, to_out
from helpers.device_checks import WAYS_ON_CPU, check_case
from helpers.large_model import Shape, write_large_model
from helpers.processes import find_program, library_dir
from helpers.requests import ABOUT, ATTN, Program, Refused, Stopped
from helpers.tools import load_tool

from llamamix import Model, ggml

#
# the bounds
#


def f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float64)


def kernel(data: Data, fault: str = "") -> np.ndarray:
    """Attention as a kernel for GPUs computes it, with all roundings to F16 that it may do."""
    c = data.case
    q, k, v = by_kv_head(data, data.q)
    q = q * data.scale * (1.02 if fault == "scale" else 1)
    rot_k, rot_v = rotations(c)
    cold, hot = slice(0, c.n_cold), slice(c.n_cold, c.n_cold + c.n_hot)
    mean = 0.0 if data.means is None else by_cell(data.means, c.n_cold).transpose(0, 2, 3, 1)[:, :, None]
    k_cold = f16(f16(rot_k @ k[..., cold] - mean) + (0 if fault == "mean" else mean))
    q_cold = q if fault == "query" else q @ rot_k
    x = np.concatenate([f16(q_cold) @ k_cold, f16(q) @ f16(k[..., hot])], axis=-1)
    x = c.logit_softcap * np.tanh(x / c.logit_softcap) if c.logit_softcap and fault != "cap" else x
    if data.mask is not None:
        mask = np.roll(data.mask, 1, axis=-1) if fault == "mask" else data.mask
        slope = np.ones(c.n_gqa * c.n_head_kv) if fault == "slope" else slopes(c.n_gqa * c.n_head_kv, c.max_bias)
        x = x + slope.reshape(c.n_head_kv, c.n_gqa, 1, 1) * mask[:, None, None].astype(np.float64)
    if fault == "last cell":
        x[..., -1] = -np.inf
    m = x.max(axis=-1, keepdims=True)
    if data.sinks is not None:
        sinks = data.sinks.astype(np.float64).reshape(c.n_head_kv, c.n_gqa, 1, 1)
        m = np.maximum(m, sinks)
    m = np.where(m == -np.inf, 0, m)
    p = np.exp(x - m)
    total = p.sum(axis=-1, keepdims=True)
    if data.sinks is not None and fault != "sinks":
        total += np.exp(sinks - m)
    p = f16(p / 8) * 8  # what is left of weights relative to 8 times the largest one
    v_cold = f16(v[..., cold, :] @ rot_v)
    o = p[..., cold] @ v_cold @ (np.eye(c.n_embd_v) if fault == "output" else rot_v) + p[..., hot] @ f16(v[..., hot, :])
    if fault == "head":
        o = np.roll(o, 1, axis=1)
    return to_out(c, o / np.where(total == 0, 1, total)).astype(np.float32)


ROTATED = {"n_embd_k": 128, "n_embd_v": 128, "n_rot_k": 128, "n_rot_v": 64, "mask": "causal"}
KERNEL_CASES = [
    Case(**ROTATED),
    Case(
        cold_k="q5_0", cold_v="iq4_nl", mean=1.0, sinks=True, n_tokens=5, hot_v="bf16",
        **ROTATED | {"mask": "sparse"},
    ),
    Case(**ROTATED, cold_k="q8_0", cold_v="q4_1", max_bias=8.0, n_stream=2, n_cold=129, n_hot=31),
    Case(cold_k="f16", cold_v="f16", n_cold=3, n_hot=1, logit_softcap=20.0, q_size=8.0),
    Case(**ROTATED, n_gqa=16, n_head_kv=1, n_cold=3000, q_size=0.3),
    Case(n_cold=0, hot_k="bf16", n_tokens=17, mask="sequences"),
]  # fmt: skip


def judged(data: Data, actual: np.ndarray, how: str = "node") -> attention_f16.Judgement:
    expected = reference(data)
    return attention_f16.judge(actual, data, expected, attention_f16.bounds(data, expected, how), how)


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_what_f16_does_is_within_the_bounds(case: Case) -> None:
    """And not far below what is to be expected, or the bounds would find nothing."""
    data = attention_f16.as_f16(device_cases.make_data(case))
    seen = judged(data, kernel(data))
    assert seen.ok, str(seen)
    assert seen.typical > 0.2


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        ("scale", 0), ("query", 0), ("output", 0), ("last cell", 0), ("head", 0), ("mean", 1), ("mask", 1),
        ("sinks", 1), ("slope", 2), ("cap", 3), ("last cell", 3), ("mask", 5),
    ],
)  # fmt: skip
def test_faults_are_not_within_the_bounds(fault: str, case: int) -> None:
    data = attention_f16.as_f16(device_cases.make_data(KERNEL_CASES[case]))
    assert not judged(data, kernel(data, fault)).ok


def test_an_output_that_is_not_a_number_is_wrong() -> None:
    data = attention_f16.as_f16(device_cases.make_data(Case(mask="sparse", n_tokens=17, seed=3)))
    expected = reference(data)
    actual = kernel(data)
    dead = attention_f16.sees_nothing(expected)
    assert dead.any() and judged(data, actual).ok
    for place in (np.argwhere(dead)[0], np.argwhere(~dead)[0]):
        wrong = actual.copy()
        wrong[(*place, 7)] = np.nan
        assert not judged(data, wrong).ok
        # where a token sees nothing, ggml_flash_attn_ext() may do what it wants
        assert judged(data, wrong, "compose").ok == bool(dead[tuple(place)])


@pytest.mark.parametrize("axis", device_cases.AXES)
def test_every_value_is_among_the_cases(axis: str) -> None:
    name = "n_embd_k" if axis == "n_embd" else axis
    assert {getattr(case, name) for case in device_cases.cases()} >= set(device_cases.AXES[axis])


#
# the program that runs on the device
#


@pytest.fixture(scope="module")
def device_run() -> str:
    return str(find_program("device-run"))


@pytest.mark.parametrize("how", ["node", "join", "compose"])
def test_several_repetitions_are_one_result(device_run: str, how: str) -> None:
    """Rows lie among NaN, in which none of them looks."""
    data = attention_f16.as_f16(device_cases.make_data(KERNEL_CASES[1]))
    results = []
    for repetitions in ("1", "3"):
        program = Program([device_run, "CPU", repetitions])
        results.append(program.attention(how, data.q, data.segments, **data.options))
        assert program.close() == 0
    assert results[0].tobytes() == results[1].tobytes()
    assert judged(data, results[0], "host" if how == "node" else how).ok


def test_what_it_refuses(device_run: str) -> None:
    program = Program([device_run, "CPU"])
    assert program.names == ["node", "join", "compose", "plain", "migrate", "move"]
    assert program.ask("", ABOUT).decode().split("\n")[0::3] == ["CPU", "1"]
    data = device_cases.make_data(Case(n_cold=5, n_hot=0))
    with pytest.raises(Refused, match="attention without hot rows is not computed on a device"):
        program.attention("node", data.q, data.segments, **data.options)
    data = device_cases.make_data(Case(n_cold=5, n_hot=1))
    with pytest.raises(Refused, match="by node, join, compose or plain, not by magic"):
        program.attention("magic", data.q, data.segments, **data.options)
    with pytest.raises(Stopped, match="has ended .exit status 1"):
        program.ask("node", ATTN + 77)
    with pytest.raises(Stopped, match="does not start .exit status 1"):
        Program([device_run, "GPU77"])


def test_what_hangs_is_ended(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho name\nexec sleep 60\n")
    program.chmod(0o755)
    start = time.monotonic()
    with pytest.raises(Stopped, match="has ended .exit status -9"):
        Program([str(program)], timeout=1.0).ask("name", ABOUT)
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(Stopped, match="does not start .exit status -9"):
        Program([str(program)], timeout=1.0)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("has_means", [False, True])
@pytest.mark.parametrize("cold", ["q4_0", "q8_0", "iq4_nl", "q5_1"])
def test_a_migration_is_judged(device_run: str, cold: str, has_means: bool) -> None:
    """Rows of another rotation are wrong ones, and so are those with a digit that is another one."""
    program = Program([device_run, "CPU"])
    seen = device_cases.judge_migration(program, "migrate", "f16", cold, 64, has_means)
    assert seen.ok and seen.same > 0.99
    assert (seen.mean > 0) == has_means

    class Other:
        """Answers as a device that does something else."""

        def __init__(self, change: Callable[..., tuple[np.ndarray, np.ndarray]], n_rot: int = 64) -> None:
            self.change, self.n_rot = change, n_rot

        def migrate(self, how: str, src: ggml.Tensor, kv_type: str, n_rot: int, n_page: int) -> tuple[np.ndarray, np.ndarray]:
            return self.change(*program.migrate(how, src, kv_type, self.n_rot, n_page))

    wrong = [
        Other(lambda rows, means: (rows, means), 128),
        Other(lambda rows, means: (np.roll(rows, 1, axis=0), means)),
        Other(lambda rows, means: (rows ^ 16, means)),
    ]
    if has_means:  # of the page beside, and one that is not the mean of its own
        wrong += [
            Other(lambda rows, means: (rows, np.roll(means, 1, axis=0))),
            Other(lambda rows, means: (rows, means * np.float16(1.01))),
        ]
    for other in wrong:
        assert not device_cases.judge_migration(other, "migrate", "f16", cold, 64, has_means).ok


def test_a_join_is_judged(device_run: str) -> None:
    program = Program([device_run, "CPU"])
    data = device_cases.make_data(KERNEL_CASES[1])
    right = [device_cases.judge_join(program, data, which) for which in (0, 1)]
    assert max(right) <= 1

    class Other:
        def join(self, *args: Any) -> np.ndarray:
            res = program.join(*args).copy()
            res[1 % len(res), -1, 1, 5] *= np.float16(1.003)  # six roundings
            return res

    assert all(device_cases.judge_join(Other(), data, which) > 1 for which in (0, 1))


def test_a_large_model(tmp_path: Path) -> None:
    shape = Shape(n_layer=1, n_head=4, n_head_kv=2, head_size=32, n_embd=128, n_ff=256, n_vocab=400)
    n = sum(n_out * n_in for _, n_out, n_in, _ in shape.matrices)
    assert n == 2 * 400 * 128 + 128 * (128 + 64 + 64 + 128) + 3 * 128 * 256
    assert shape.n_bytes == n // 32 * 18
    with Model(write_large_model(tmp_path / "model.gguf", shape)) as model:
        assert model.n_params == n + 3 * 128


#
# the tool
#


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, device_run: str) -> ModuleType:
    res = load_tool("gpu_check")
    monkeypatch.setattr(res, "program", lambda name: str(find_program(name)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which the tool sets
    monkeypatch.setenv("LLAMAMIX_LIB_PATH", str(library_dir()))
    return res


def test_all_of_it(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert tool.main(["--device", "CPU", "--quick", "--seconds", "0.01", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["failed"] == {}
    assert result["about"]["device"] == "CPU"
    assert set(result["seconds"]) == {"correctness", "times", "model"} and len(result["card"]) == 4

    kinds = Counter(r["what"] for r in result["correctness"])
    n = len(device_cases.cases(quick=True))
    assert kinds["node"] == kinds["join"] == kinds["compose"] == kinds["node, compose"] == n
    assert kinds["migration, composed"] == 2 * sum(ggml.is_quantized(cold) for cold in device_cases.COLD)
    assert all(r["ok"] for r in result["correctness"])
    assert {r["what"] for r in result["correctness"] if "refused" in r} == {"migration"}  # by nodes, which it lacks

    timed = {(r["how"], r["depth"], r["n_tokens"]): r["us"] for r in result["times"] if r["cold"] in ("", "q4_0")}
    assert {how for how, *_ in timed} == {"node", "f16", "q4_0", "compose", "join", "migrate"}
    assert all(0 < r["least"] <= r["us"] <= r["p90"] and r["n"] >= 5 for r in result["times"])
    speeds = {(r["cache"], r["test"], r["depth"]): r["t/s"] for r in result["model"]}
    caches = ("f16", "mixed", "q4_0", "compose")
    beside = {(cache, "pp32", 0) for cache in ("f16 beside default", "default")}
    assert set(speeds) == {(cache, test, 0) for cache in caches for test in ("pp32", "tg8")} | beside

    rows = {what: (wanted, seen) for what, wanted, seen in result["table"]}
    assert rows["attention at 512 against F16"] == ("≥ 1.5 ×", f"{timed['f16', 512, 1] / timed['node', 512, 1]:.2f} ×")
    node, f16, q4_0 = (timed[how, 256, 1] for how in ("node", "f16", "q4_0"))
    seen = f"{node:.1f} µs, {f16 / node:.2f} × F16, {q4_0 / node:.2f} × Q4_0, "
    assert rows["node q4_0, 256 cells"][1].startswith(seen)
    seen = f"{speeds['mixed', 'tg8', 0] / speeds['f16', 'tg8', 0]:.2f} ×"
    assert rows["decode at depth 0 against F16"] == ("≥ 1.0 ×", seen)
    seen = f"{speeds['default', 'pp32', 0] / speeds['f16 beside default', 'pp32', 0]:.2f} ×"
    assert rows["prompt at depth 0 with the default hot against F16"] == ("≥ 0.95 ×", seen)
    assert rows["node: cases that are wrong"] == ("0", f"0 of {n}")
    printed = capsys.readouterr().out
    assert all(f"| {what} " in printed for what in rows)


def test_a_device_without_our_nodes(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the first GPU, with memory of its own (own_memory.cpp): what it lacks is said, and nothing is wrong."""
    plugin = str(find_program("own-memory.so", "own-memory"))
    monkeypatch.setattr(tool, "ENVIRONMENT", tool.ENVIRONMENT | {"GGML_BACKEND_PATH": plugin})
    out = tmp_path / "out.json"
    assert tool.main(["--quick", "--only", "correctness", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["about"] | {"memory": 0} == {
        "device": "OwnMemory0", "description": "a device for tests", "memory": 0, "nodes": False,
    }  # fmt: skip
    reason = "OwnMemory0 has no kernels for nodes of the mixed cache"
    assert {r.get("refused") for r in result["correctness"] if r["what"] == "node"} == {reason}
    assert not any("refused" in r for r in result["correctness"] if r["what"] in ("compose", "migration, composed"))
    assert dict((what, seen) for what, _, seen in result["table"])["node: cases that are wrong"] == "not there"
    assert f"×: {reason}" in capsys.readouterr().out


def test_a_device_with_some_of_our_nodes(device_run: str) -> None:
    """It is asked for its reasons, by the name that they have; what it computes is in its memory."""
    plugin = str(find_program("own-memory.so", "own-memory"))
    program = Program([device_run, "OwnMemory0"], os.environ | {"GGML_BACKEND_PATH": plugin, "OWN_MEMORY_NODES": "1"})
    assert program.ask("", ABOUT).decode().split("\n")[3] == "1"
    data = device_cases.make_data(KERNEL_CASES[1])
    actual = program.attention("node", data.q, data.segments, **data.options)
    assert judged(data, actual, "host").ok
    for ask in (
        lambda: program.attention("join", data.q, data.segments, **data.options),
        lambda: device_cases.judge_join(program, data, 0),
    ):
        with pytest.raises(Refused, match="this device computes attention nodes only"):
            ask()


def test_without_a_gpu(tool: ModuleType, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert tool.main(["--out", str(tmp_path / "out.json")]) == 2
    assert "there is no GPU; devices: CPU" in capfd.readouterr().err
    assert not (tmp_path / "out.json").exists()


class Faulty:
    """A device that changes the results of one way, or ends."""

    def __init__(self, program: Program, how: str, change: Callable[[np.ndarray], np.ndarray] | None) -> None:
        self.program, self.how, self.change = program, how, change

    def ask(self, f: Callable[[Any], Any]) -> Any:
        return f(self)

    def attention(self, how: str, *args: Any, **kwargs: Any) -> np.ndarray:
        out = self.program.attention(how, *args, **kwargs)
        if how != self.how:
            return out
        if self.change is None:
            raise Stopped("it has ended")
        return self.change(out)

    def join(self, *args: Any) -> np.ndarray:
        return self.program.join(*args)


def check(device_run: str, devices: dict[str, tuple[str, Any]], n: int = 1) -> list[dict[str, Any]]:
    program = Program([device_run, "CPU"])
    records: list[dict[str, Any]] = []
    ends: Counter[str] = Counter()
    for _ in range(n):
        item = device_cases.prepare(KERNEL_CASES[0], WAYS_ON_CPU.values())
        faulty = {name: Faulty(program, *fault) for name, fault in devices.items()}
        check_case(item, WAYS_ON_CPU, faulty, records, ends)
    return records


def wrong(records: list[dict[str, Any]]) -> dict[str, str]:
    return {r["what"]: r.get("why", "") for r in records if not r["ok"]}


def test_faults_are_found(device_run: str) -> None:
    right, off = ("", None), ("node", lambda x: x * np.float32(1.1))
    assert wrong(check(device_run, {"graphs": right, "plain": right})) == {}
    seen = wrong(check(device_run, {"graphs": off, "plain": off}))
    assert set(seen) == {"node", "node, compose"} and "rms to be expected" in seen["node"]
    a_bit = ("join", lambda x: np.nextafter(x, np.float32(9)))
    seen = wrong(check(device_run, {"graphs": right, "plain": a_bit}))
    assert seen == {"join": "other results without CUDA graphs"}


def test_a_way_that_ends_the_process_is_given_up(device_run: str) -> None:
    records = check(device_run, {"graphs": ("node", None)}, n=6)
    node = [r.get("why") for r in records if r["what"] == "node"]
    assert node == ["it has ended"] * 4 + ["not tried after it ended the process 4 times"] * 2
    assert all(r["ok"] for r in records if r["what"] != "node")


def test_a_part_that_fails_leaves_the_others(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tool.specs(tool.SMALL, quick=True, moves=["migrate"])[0] | {"us": math.pi, "GB/s": 1.0}

    def no_times(args: Any, sizes: Any, records: list[Any], save: Any) -> None:
        records.append(seen)
        raise RuntimeError("the card is gone")

    def no_model(args: Any, sizes: Any, records: list[Any], save: Any) -> None:
        records.append({"cache": "f16", "test": "tg8", "depth": 0, "t/s": 2.0})

    monkeypatch.setattr(tool, "correctness", lambda *args: None)
    monkeypatch.setattr(tool, "times", no_times)
    monkeypatch.setattr(tool, "model", no_model)
    out = tmp_path / "out.json"
    assert tool.main(["--device", "CPU", "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert result["failed"] == {"times": "RuntimeError: the card is gone"}
    assert result["times"] == [seen]
    assert result["model"][0]["t/s"] == 2.0


@pytest.mark.parametrize("part", ["correctness", "times", "model", "sanitize"])
def test_what_could_not_be_seen_is_wrong(tool: ModuleType, part: str) -> None:
    assert not tool.is_wrong({"failed": {}, part: [{"ok": True}, {"us": 2.0}, {"refused": "no kernel", "ok": True}]})
    assert tool.is_wrong({"failed": {}, part: [{"us": 2.0, "why": "the program has ended"}]})
    assert tool.is_wrong({"failed": {}, part: [{"ok": False}]})
    assert tool.is_wrong({"failed": {part: "RuntimeError"}})


def test_a_benchmark_that_takes_too_long_leaves_what_it_has(tool: ModuleType, tmp_path: Path) -> None:
    seen = {"n_prompt": 0, "n_gen": 64, "n_depth": 8, "type_k": "f16", "avg_ts": 50.0, "stddev_ts": 1.0}
    seen |= {"samples_ts": [50.0]}
    program = tmp_path / "llama-bench"
    program.write_text(f"#!/bin/sh\necho '{json.dumps(seen)}'\necho 'no memory' >&2\nexec sleep 60\n")
    program.chmod(0o755)
    records: list[dict[str, Any]] = []
    start = time.monotonic()
    tool.bench([str(program), "-r", "3"], {"f16": "mine"}, start + 0.1, records, lambda: None)
    assert time.monotonic() - start < 30
    assert [records[0][k] for k in ("cache", "test", "depth", "t/s")] == ["mine", "tg64", 8, 50.0]
    assert records[1] == {"why": "llama-bench ended with status -9", "command": ["-r", "3"], "stderr": "no memory\n"}


def test_the_sanitizer_has_to_be_there(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "out.json"
    assert tool.main(["--device", "CPU", "--sanitize", "--out", str(out)]) == 1
    assert "there is no compute-sanitizer" in json.loads(out.read_text())["failed"]["sanitize"]


@pytest.mark.parametrize("status", [0, 99])
def test_under_a_sanitizer(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """One that writes its log and runs the program; with errors it exits with another status."""
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(
        f'#!/bin/sh\nlog=$6\nshift 6\n"$@"\necho "========= ERROR SUMMARY: {status} errors" > "$log"\nexit {status}\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    out = tmp_path / "out.json"
    assert tool.main(["--device", "CPU", "--sanitize", "--out", str(out)]) == (1 if status else 0)
    records = json.loads(out.read_text())["sanitize"]
    tools = [r for r in records if r["what"] in ("memcheck", "racecheck")]
    assert [(r["what"], r["ok"], r["cases"], r["status"]) for r in tools] == [
        ("memcheck", not status, 4, status),
        ("racecheck", not status, 1, status),
    ]
    assert all(f"{status} errors" in r["log"] for r in tools)
    assert all(r["ok"] for r in records if r["what"] in ("node", "join", "compose"))
