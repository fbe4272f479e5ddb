"""The benchmark: its arithmetic worked out by hand, what it runs in which order, and what comes out. No speeds."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamamix import Context, ContextError, Model, ParamsError
from llamamix.bench import (
    BenchError,
    BenchTest,
    Configuration,
    Plan,
    Row,
    caches,
    configurations,
    fits,
    machine,
    read_rows,
    summarise,
)
from llamamix.bench.caches import DepthCache
from llamamix.bench.plan import int_list, order
from llamamix.bench.runner import Runner, random_tokens, text_tokens
from llamamix.bench.summary import fit_line, paired_ratios
from llamamix.bench.table import fit_grid, results_grid
from llamamix.cli import main
from llamamix.stats import PromptProgress

MIXED = "hot=32,group=8,sink=2"

# 2 layers, 2 K/V heads of 64: bytes of K and V of one token
BYTES = {"f16": 2 * 2 * 128 * 2, "q8_0": 2 * 2 * 128 // 32 * 34, "q4_0": 2 * 2 * 128 // 32 * 18}
BYTES["iq4_nl"] = BYTES["q4_0"]


def run(capsys: pytest.CaptureFixture, *args: object) -> tuple[int, str, str]:
    try:
        code = main(["bench", *map(str, args)])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    return code, out, err


def assert_error(result: tuple[int, str, str], code: int, text: str) -> None:
    assert result[0] == code and result[1] == ""
    lines = result[2].splitlines()
    assert len(lines) == 1 and lines[0].startswith("llamamix: ") and text in lines[0]


def make_row(**changes: Any) -> Row:
    row = Row(
        llamamix="1.0",
        backends="CPU",
        cpu_info="some",
        gpu_info="",
        model_filename="m.gguf",
        model_type="llama 1B Q4_0",
        model_size=3 << 29,
        model_n_params=1_230_000_000,
        n_batch=2048,
        n_ubatch=512,
        n_threads=2,
        n_gpu_layers=-1,
        cache="f16",
        type_k="f16",
        type_v="f16",
        flash_attn=-1,
        kv_mixed=None,
        kv_bytes=3 << 19,
        n_ctx=256,
        seed=0,
        n_prompt=0,
        n_gen=2,
        n_depth=0,
        test_time="2026-01-01T00:00:00Z",
        samples_ns=(1000,),
        samples_token_ns=((400, 600),),
        samples_migrate_us=None,
    )
    return replace(row, **changes)


def timed(*milliseconds: tuple[float, ...], **changes: Any) -> Row:
    """A row with these times of tokens, a tuple for each repetition."""
    times = tuple(tuple(round(1e6 * ms) for ms in repetition) for repetition in milliseconds)
    values = {"n_gen": len(times[0]), "samples_token_ns": times, "samples_ns": tuple(map(sum, times))}
    return make_row(**values | changes)


#
# what is asked for
#


def test_lists_are_llama_bench_s() -> None:
    assert int_list(["512,1024", "7"], "-p") == (512, 1024, 7)
    assert int_list(["1-4", "2"], "-p") == (1, 2, 3, 4)
    assert int_list(["0-8192+2048"], "-d") == (0, 2048, 4096, 6144, 8192)
    assert int_list(["1-70*4"], "-t", 1) == (1, 4, 16, 64)
    for text in ("", "x", "-5", "1.5", "1,", "1-", "5-4", "1-4+0", "0-4*2", "1-4*1", "9999999999"):
        with pytest.raises(ParamsError, match="-d"):
            int_list([text], "-d")
    with pytest.raises(ParamsError, match="at least 1"):
        int_list(["0"], "-t", 1)


def test_configurations() -> None:
    assert [c.name for c in configurations()] == ["f16", "q8_0", "q4_0", "mixed hot=512"]
    assert configurations()[-1].context_params() == {
        "type_k": "f16",
        "type_v": "f16",
        "flash_attn": "auto",
        "kv_mixed": "hot=512",
    }
    assert configurations()[0].context_params()["kv_mixed"] is False

    def names(*args: Any) -> list[str]:
        return [c.name for c in configurations(*args)]

    assert names(["q8_0"], None, ["on"], ["off"]) == ["q8_0"]
    assert names(None, ["q8_0", "f16"], ["1"], ["1", "hot=64"]) == ["q8_0", "f16", "mixed", "mixed hot=64"]
    assert names(["f16"], ["q8_0", "f16"], ["auto"], []) == ["k=f16 v=q8_0", "f16"]
    assert names(["f16", "q8_0"], ["f16", "f16"], ["auto"], []) == ["f16", "k=q8_0 v=f16"]
    # quantised V needs flash attention; what is there by default is left out
    assert names(None, None, ["off"], ["hot=64"]) == ["f16 fa=off", "mixed hot=64 fa=off"]
    assert names(["f16", "q4_0"], None, ["on", "0", "off"], ["off"]) == ["f16", "f16 fa=off", "q4_0"]
    assert names(["f16"], None, ["-1", "on"], ["off"]) == ["f16", "f16 fa=on"]

    for args, text in {
        (("q3_k",),): "q3_k",
        (("f16", "q8_0", "q4_0"), ("f16", "q8_0")): "in pairs",
        (("q8_0",), None, ("off",)): "needs flash attention",
        (None, None, ("maybe",)): "maybe",
        (None, None, ("auto",), ("warm=1",)): "warm",
    }.items():
        with pytest.raises(ParamsError, match=text):
            configurations(*args)


def test_a_plan() -> None:
    plan = Plan(configurations()[:2], n_prompt=(8, 0), n_gen=(4,), n_depth=(0, 16), n_threads=(1, 2), repetitions=3)
    assert [(test.name, test.n_threads) for test in plan.tests(16)] == [
        ("pp8 @ d16", 1), ("tg4 @ d16", 1), ("pp8 @ d16", 2), ("tg4 @ d16", 2),
    ]  # fmt: skip
    assert [test.name for test in plan.tests(0)][:2] == ["pp8", "tg4"]
    assert BenchTest(8, 4, 2).name == "pp8+tg4 @ d2"
    assert plan.n_tokens_max == 8
    assert plan.n_steps == 2 * (2 + 2 * 4 * 3)  # two depths, with four tests each
    for options, text in (
        ({"n_prompt": (0,), "n_gen": (0,)}, "nothing to measure"),
        ({"repetitions": 0}, "repetitions"),
        ({"n_ubatch": 0}, "n_ubatch"),
        ({"n_threads": (0,)}, "n_threads"),
        ({"configurations": ()}, "no cache"),
    ):
        with pytest.raises(ParamsError, match=text):
            Plan(**{"configurations": configurations()} | options)


def test_the_order_is_balanced() -> None:
    assert [order(3, r) for r in range(5)] == [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1], [2, 0, 1]]
    assert [order(1, r) for r in range(3)] == [[0]] * 3
    for n in (2, 3, 4, 7):
        places = np.array([np.argsort(order(n, r)) for r in range(2 * n)])
        assert all(sorted(order(n, r)) == list(range(n)) for r in range(2 * n))
        # there and back: everyone's places add up to the same, in every pair of repetitions
        assert (places[::2] + places[1::2] == n - 1).all()
        assert (places[:, 0] == 0).sum() == 2  # and everyone is the first as often


#
# arithmetic
#


def test_speed_and_latency_by_hand() -> None:
    # repetitions of 10, 20 and 40 ms for two tokens: 200, 100 and 50 tokens/s
    (summary,) = summarise([timed((4, 6), (10, 10), (10, 30))])
    assert (summary.avg_ns, summary.stddev_ns) == (70_000_000 // 3, int(np.std([10e6, 20e6, 40e6], ddof=1)))
    assert summary.avg_ts == pytest.approx(350 / 3)
    assert summary.stddev_ts == pytest.approx(np.std([200, 100, 50], ddof=1))
    assert summary.median_ts == pytest.approx(100)
    assert summary.spread_ts == pytest.approx((150 - 75) / 2)  # quartiles half way between neighbours
    # sorted: 4, 6, 10, 10, 10, 30; rank 0.99 * 5 is 4.95
    assert (summary.p50_ms, summary.max_ms) == (pytest.approx(10), pytest.approx(30))
    assert summary.p99_ms == pytest.approx(10 + 0.95 * 20)
    assert (summary.ratio, summary.ratio_min, summary.ratio_max, summary.baseline) == (1, 1, 1, "f16")
    assert summary.migrate_share is None

    (single,) = summarise([make_row(n_prompt=512, n_gen=0, samples_ns=(2**31,), samples_token_ns=((),))])
    assert single.median_ts == single.avg_ts == pytest.approx(512 / 2.147483648)
    assert (single.stddev_ts, single.stddev_ns, single.spread_ts) == (0, 0, 0)
    assert (single.p50_ms, single.p99_ms, single.max_ms) == (None, None, None)


def test_ratios_are_of_pairs() -> None:
    slow = {"cache": "q4_0"}
    # the machine was three times as slow in the last repetition; the pairs do not see it
    base, other = timed((10,), (10,), (30,)), timed((20,), (25,), (60,), **slow)
    assert paired_ratios(other, base) == pytest.approx([0.5, 0.4, 0.5])
    summary = summarise([base, other])[1]
    assert (summary.ratio, summary.ratio_min, summary.ratio_max) == pytest.approx((0.5, 0.4, 0.5))
    assert summary.baseline == "f16"
    # a run that was interrupted: what has no partner does not count
    assert paired_ratios(timed((20,), (25,), **slow), base) == pytest.approx([0.5, 0.4])

    # every test, and every setting, has a baseline of its own
    rows = [
        base,
        timed((40,), (40,), (40,), n_depth=64, cache="q8_0"),
        timed((20,), (20,), (20,), n_depth=64),
        timed((20,), (20,), (20,), n_threads=4, cache="q8_0"),
        other,
    ]
    assert [(s.baseline, s.ratio) for s in summarise(rows)] == [
        ("f16", 1), ("q8_0", 1), ("q8_0", 2), ("q8_0", 1), ("f16", 0.5),
    ]  # fmt: skip


def test_the_share_of_migrations() -> None:
    row = timed((6, 4), (10, 20), cache="mixed", kv_mixed="hot=8", samples_migrate_us=(1000, 3000))
    assert summarise([row])[0].migrate_share == pytest.approx(4 / 40)


def test_a_line_through_points() -> None:
    assert fit_line([0, 1000, 3000], [5e6, 7e6, 11e6]) == pytest.approx((5e6, 2000, 1))
    # means 1 and 5/3, slope 2/2; what is left is 1/3, -2/3 and 1/3, of distances -2/3, -2/3 and 4/3 from the mean
    intercept, slope, r2 = fit_line([0, 1, 2], [1, 1, 3])
    assert (intercept, slope) == pytest.approx((2 / 3, 1))
    assert r2 == pytest.approx(1 - (6 / 9) / (24 / 9))
    assert fit_line([0, 1, 2], [4, 4, 4]) == pytest.approx((4, 0, 1))


def test_a_fit_over_depth() -> None:
    rows = [
        timed(*[(a + b * depth / 1000,) * 2] * 3, n_depth=depth, cache=name)
        for depth in (0, 1000, 4000)
        for name, a, b in (("f16", 5.0, 2.0), ("q4_0", 6.0, 3.0))
    ]
    base, other = fits([*rows, make_row(n_prompt=8, n_gen=0, samples_token_ns=((),))])
    assert (base.row.cache, base.n_depths, base.test) == ("f16", 3, "tg2")
    assert (base.base_ms, base.slope_us, base.r2, base.ratio) == pytest.approx((5, 2000, 1, 1))
    assert (other.base_ms, other.slope_us, other.ratio) == pytest.approx((6, 3000, 1.5))
    assert fits(rows[:4]) == []
    # a median over repetitions, per token
    (fit,) = fits([timed((d + 1, d + 3), (d + 2, d + 2), (99, 99), n_depth=d) for d in (0, 1, 2)])
    assert (fit.base_ms, fit.slope_us) == pytest.approx((2, 1e6))
    # nothing to compare a slope with
    falling = [timed((9 - d,), n_depth=d) for d in (0, 1, 2)]
    assert fits(falling)[0].ratio is None
    grid = fit_grid([base, other])
    assert grid.rows[1] == ("q4_0", "tg2", "3", "6.000", "3000.0", "1.500", "1.0000")
    assert "" in fit_grid([*fits(falling), base]).rows[0]


#
# tables and recordings
#


def md_rows(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert all(re.fullmatch("-+:?", cell) for cell in rule)
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_a_table_by_hand() -> None:
    rows = [
        timed((4, 6), (10, 10), (10, 30)),
        timed((8, 12), (25, 25), (20, 60), cache="mixed", kv_mixed="hot=8", samples_migrate_us=(0, 0, 5000)),
        make_row(n_prompt=8, n_gen=0, n_depth=64, samples_ns=(10**9,), samples_token_ns=((),), kv_bytes=10**6),
    ]
    text = results_grid(summarise(rows)).markdown()
    assert text.splitlines()[0] == "model: llama 1B Q4_0, size: 1.50 GiB, params: 1.23 B, backend: CPU, threads: 2"
    assert len({len(line) for line in text.splitlines()[2:]}) == 1
    first, second, third = md_rows(text)
    assert first == {
        "cache": "f16", "KV MiB": "1.5", "test": "tg2", "t/s": "100.00 ± 37.50", "× f16": "1.00", "p50 ms": "10.00",
        "p99 ms": "29.00", "migrate": "",
    }  # fmt: skip
    assert (second["× f16"], second["migrate"]) == ("0.50 (0.40–0.50)", "3.3 %")
    assert (third["test"], third["t/s"], third["KV MiB"]) == ("pp8 @ d64", "8.00 ± 0.00", "1.0")
    assert third["p50 ms"] == third["migrate"] == ""


def test_what_differs_is_a_column() -> None:
    rows = [make_row(), make_row(n_threads=4, backends="CUDA", n_ubatch=256, model_size=1 << 20, cache="a|b\x1b[2J")]
    grid = results_grid(summarise(rows))
    assert grid.caption == "model: llama 1B Q4_0, params: 1.23 B, ngl: -1"
    assert grid.columns[:5] == ("size", "backend", "threads", "n_ubatch", "cache")
    assert [row[:5] for row in grid.rows] == [
        ("1.50 GiB", "CPU", "2", "512", "f16"), ("1.00 MiB", "CUDA", "4", "256", "a|b\ufffd[2J"),
    ]  # fmt: skip
    assert "× baseline" in grid.columns and "migrate" not in grid.columns
    assert r"a\|b" in grid.markdown() and "\x1b" not in grid.markdown()


def test_recordings_come_back(tmp_path: Path) -> None:
    rows = [
        timed((4, 6), (10, 10)),
        timed((8, 12), cache="mixed", kv_mixed="hot=8", samples_migrate_us=(7,), seed=None, flash_attn=1),
        make_row(n_prompt=8, n_gen=0, samples_token_ns=((),)),
    ]
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(s.record()) + "\n" for s in summarise(rows)))
    assert read_rows(path) == rows


def test_damaged_recordings_are_refused(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    good = summarise([timed((4, 6), (10, 10))])[0].record()
    path = tmp_path / "run.jsonl"
    damages: list[tuple[dict[str, Any], str]] = [
        ({"cache": 5}, "cache must not be 5"),
        ({"n_gen": 2.5}, "n_gen must not be 2.5"),
        ({"n_gen": True}, "n_gen"),
        ({"n_depth": -2}, "n_depth"),
        ({"samples_ns": []}, "no samples"),
        ({"samples_ns": [0, 5]}, "no samples"),
        ({"samples_ns": {"a": 1}}, "samples_ns"),
        ({"samples_token_ns": [[1, 2]]}, "time of every token"),
        ({"samples_token_ns": [[1, 2], [3]]}, "time of every token"),
        ({"samples_token_ns": [[1, 2], [3, -1]]}, "less than no time"),
        ({"samples_migrate_us": [1, 2]}, "do not go together"),
        ({"kv_mixed": "hot=8", "samples_migrate_us": [1]}, "every repetition"),
    ]
    for change, text in damages:
        path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
        with pytest.raises(BenchError, match=f"line 2: the file is damaged.*{text}"):
            read_rows(path)
    for content in (b"[]\n", b"{}\n", b"x\n", b"\xff\n", b"[" * 100_000 + b"\n"):
        path.write_bytes(content)
        assert_error(run(capsys, "--replay", path), 1, "line 1: the file is no recorded benchmark")
    path.write_bytes(b"")
    assert_error(run(capsys, "--replay", path), 1, "has no measurements")
    assert_error(run(capsys, "--replay", tmp_path / "missing"), 1, "No such file")


#
# running
#


class Steps:
    def __init__(self) -> None:
        self.steps: list[str] = []
        self.notes: list[str] = []
        self.prompts: list[tuple[int, int]] = []

    def step(self, what: str) -> None:
        self.steps.append(what)

    def tokens(self, progress: PromptProgress) -> None:
        self.prompts.append((progress.n_done, progress.n_tokens))

    def note(self, text: str) -> None:
        self.notes.append(text)


def measure(model: Model, plan: Plan, **options: Any) -> tuple[list[list[Row]], Steps]:
    tests: list[list[Row]] = []
    steps = Steps()
    tokens = random_tokens(model, max(plan.n_depth) + plan.n_tokens_max, 0)
    Runner(model, plan, tokens, **{"seed": 0, "emit": tests.append, "progress": steps} | options).run()
    return tests, steps


def small(*names: str, **options: Any) -> Plan:
    made = [c for c in configurations(None, None, ["auto"], [MIXED]) if not names or c.type_k in names]
    values = {"n_prompt": (8,), "n_gen": (4,), "n_depth": (0, 40), "n_threads": (1,), "repetitions": 3}
    return Plan(tuple(made), **values | options)


def ticks() -> Callable[[], int]:
    """A clock that runs faster all the time: it says 1, 3, 6, 10, ..."""
    state = [0, 0]

    def clock() -> int:
        state[0] += 1
        state[1] += state[0]
        return state[1]

    return clock


def test_samples_are_the_clock_s(tiny_model: Model) -> None:
    plan = small(n_depth=(0,), repetitions=2, warmup=False)
    plan = replace(plan, configurations=plan.configurations[:1])
    (prompt,), (tokens,) = measure(tiny_model, plan, clock=ticks())[0]
    # two readings a prompt, five for four tokens; the n-th reading is n after the one before
    assert (prompt.samples_ns, prompt.samples_token_ns) == ((2, 4), ((), ()))
    assert tokens.samples_token_ns == ((6, 7, 8, 9), (11, 12, 13, 14))
    assert tokens.samples_ns == (30, 50)
    assert tokens.samples_migrate_us is None
    # a run before the repetitions: 2 for the prompt, 2 for a single token
    plan = replace(plan, warmup=True)
    (prompt,), (tokens,) = measure(tiny_model, plan, clock=ticks())[0]
    assert (prompt.samples_ns, tokens.samples_ns) == ((4, 6), (10 + 11 + 12 + 13, 15 + 16 + 17 + 18))


def test_long_prompts_are_watched(tiny_model: Model) -> None:
    steps = measure(tiny_model, small("f16", n_prompt=(64,), n_gen=(0,), repetitions=1, warmup=False))[1]
    # a plain and a mixed cache: their tests at depth 0, the 40 tokens of the other depth, and their tests there
    assert [(done, n) for done, n in steps.prompts if done == n] == 2 * [(64, 64)] + 2 * [(40, 40)] + 2 * [(64, 64)]
    assert all(0 <= done <= n for done, n in steps.prompts)


def test_rows_say_what_was_run(tiny_model: Model) -> None:
    tests, _ = measure(tiny_model, small(n_ubatch=16))
    assert [[(row.test, row.cache) for row in rows] for rows in tests] == [
        [(test, cache) for cache in ("f16", "q8_0", "q4_0", f"mixed {MIXED}")]
        for test in ("pp8", "tg4", "pp8 @ d40", "tg4 @ d40")
    ]
    rows = [row for test in tests for row in test]
    with Context(tiny_model, n_ctx=48, n_threads=1, kv_mixed=MIXED) as context:
        total, plain = context.stats.bytes_total, context.stats.bytes_plain
    assert plain == 256 * BYTES["f16"]
    means = 2 * 2 * 64 * 2 * 2  # of K, in two pages of 128 cells
    assert total == 32 * BYTES["f16"] + (256 - 32) * BYTES["iq4_nl"] + means
    for row in rows:
        assert (row.model_filename, row.model_type) == (str(tiny_model.path), tiny_model.desc)
        assert (row.model_size, row.model_n_params) == (tiny_model.size, tiny_model.n_params)
        assert (row.backends, row.n_threads, row.n_batch, row.n_ubatch) == (machine.backends(), 1, 2048, 16)
        assert row.cpu_info == machine.cpu_info() != ""
        assert (row.n_gpu_layers, row.flash_attn, row.seed, row.n_ctx) == (-1, -1, 0, 256)
        assert len(row.samples_ns) == 3 and min(row.samples_ns) > 0
        assert all(len(times) == row.n_gen for times in row.samples_token_ns)
        if row.n_gen:
            assert row.samples_ns == tuple(map(sum, row.samples_token_ns))
        if row.kv_mixed is None:
            assert (row.type_k, row.kv_bytes) == (row.cache, 256 * BYTES[row.cache])
        else:
            assert row.kv_mixed == "hot=32,cold=iq4_nl,group=8,threshold=0.8,sink=2,cold_size=224"
            assert (row.type_k, row.kv_bytes, len(row.samples_migrate_us)) == ("f16", total, 3)


def test_configurations_take_turns(tiny_model: Model) -> None:
    plan = small(n_prompt=(0,), n_depth=(0,))
    _, steps = measure(tiny_model, plan)
    names = [c.name for c in plan.configurations]
    assert steps.steps == [
        *(f"d0 {name}" for name in names),
        *(f"tg4 {names[i]} ({r + 1}/3)" for r in range(3) for i in order(4, r)),
    ]
    assert len(steps.steps) == plan.n_steps
    plan = small(n_threads=(1, 2), one_context=True)
    assert len(measure(tiny_model, plan)[1].steps) == plan.n_steps


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, bytes, Any]]]:
    """Of every restore(): the configuration, the sequence's last position, its state, the mixed cache's statistics."""
    seen = []
    original = DepthCache.restore

    def restore(self: DepthCache) -> Context:
        context = original(self)
        seen.append((self.configuration.name, context.memory.seq_pos_max(), context.state_save(0), context.stats))
        return context

    monkeypatch.setattr(DepthCache, "restore", restore)
    yield seen


@pytest.mark.parametrize("one_context", [False, True])
def test_every_repetition_begins_the_same(tiny_model: Model, restored: list, one_context: bool) -> None:
    depth = 40
    plan = small(n_depth=(depth,), n_gen=(12,), repetitions=3, one_context=one_context)
    measure(tiny_model, plan)
    expected = {}
    for c in plan.configurations:
        with Context(tiny_model, n_ctx=depth + 12, n_threads=1, **c.context_params()) as context:
            context.decode(random_tokens(tiny_model, depth + 12, 0)[:depth])
            expected[c.name] = (depth - 1, context.state_save(0))
    for name, value in expected.items():
        found = [(pos_max, state) for n, pos_max, state, _ in restored if n == name]
        # two tests of three repetitions with a warm-up, which every new context has
        assert len(found) >= 2 * 4 and all(item == value for item in found)

    mixed = [stats for name, _, _, stats in restored if name.startswith("mixed")]
    assert len({(stats.hot_used, stats.cold_used) for stats in mixed}) == 1 and mixed[0].cold_used > 0
    if not one_context:  # every repetition has moved as many: the last three are those of tg12
        moved = np.diff([stats.n_tokens_moved for stats in mixed])
        assert len(set(moved[-2:])) == 1 and moved[-1] > 0


def test_one_context_gives_the_same_samples(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    most = [0]

    class Counted(Context):
        def __init__(self, *args: Any, **params: Any) -> None:
            super().__init__(*args, **params)
            alive.append(id(self))
            most[0] = max(most[0], len(alive))

        def close(self) -> None:
            super().close()
            if id(self) in alive:
                alive.remove(id(self))

    monkeypatch.setattr(caches, "Context", Counted)
    outcomes = []
    for one_context, n_contexts in ((False, 4), (True, 1)):
        most[0] = 0
        # without a warm-up, as every new context has one, which this clock sees
        tests, steps = measure(tiny_model, small(one_context=one_context, warmup=False), clock=ticks())
        outcomes.append([[replace(row, test_time="", samples_migrate_us=None) for row in rows] for rows in tests])
        assert (most[0], alive, steps.notes) == (n_contexts, [], [])
    assert outcomes[0] == outcomes[1]

    # short of memory, by what the machine says
    most[0] = 0
    with monkeypatch.context() as patch:
        patch.setattr(machine, "memory_available", lambda: 0)
        tests, steps = measure(tiny_model, small())
    assert (most[0], len(steps.notes)) == (1, 1) and "Memory is short" in steps.notes[0]
    assert [len(rows) for rows in tests] == [4] * 4


def test_a_context_that_can_not_be_made_makes_others_way(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []

    class Greedy(Context):
        def __init__(self, *args: Any, **params: Any) -> None:
            if len(alive) >= 2:
                raise ContextError("The context can not be created: no memory.")
            super().__init__(*args, **params)
            alive.append(id(self))

        def close(self) -> None:
            super().close()
            if id(self) in alive:
                alive.remove(id(self))

    monkeypatch.setattr(caches, "Context", Greedy)
    tests, steps = measure(tiny_model, small(n_depth=(40,)))
    assert [len(rows) for rows in tests] == [4, 4] and len(steps.notes) == 1
    assert alive == []

    monkeypatch.setattr(caches, "Context", lambda *_args, **_params: (_ for _ in ()).throw(ContextError("No.")))
    with pytest.raises(ContextError, match=r"^f16: No\.$"):
        measure(tiny_model, small())


def test_tokens(tiny_model: Model) -> None:
    tokens = random_tokens(tiny_model, 500, 7)
    assert tokens[0] == tiny_model.bos and tokens.min() >= 0 and tokens.max() < tiny_model.n_vocab
    assert len(set(tokens.tolist())) > 200
    assert (tokens == random_tokens(tiny_model, 500, 7)).all()
    assert (tokens != random_tokens(tiny_model, 500, 8)).any()
    text = tiny_model.tokenize("the end and the")
    assert text_tokens(tiny_model, "the end and the", 5).tolist() == text[:5]
    assert text_tokens(tiny_model, "the end and the", 3 * len(text)).tolist() == text * 3


def test_interrupted(tiny_model: Model) -> None:
    """In the second repetition of the second test, when one configuration has its sample and the others do not."""
    plan = small("f16", n_depth=(0,), repetitions=4, warmup=False)
    readings = [0]

    def clock() -> int:
        readings[0] += 1
        # two configurations: 2 * 4 * 2 readings for the prompts, then five for each repetition
        if readings[0] == 16 + 3 * 5 + 2:
            raise KeyboardInterrupt
        return readings[0]

    tests: list[list[Row]] = []
    with pytest.raises(KeyboardInterrupt):
        measure(tiny_model, plan, clock=clock, emit=tests.append)
    assert [[len(row.samples_ns) for row in rows] for rows in tests] == [[4, 4], [1, 2]]
    assert all(len(row.samples_token_ns) == len(row.samples_ns) for row in tests[1])
    base, other = summarise(tests[1])
    assert (base.ratio, other.ratio) == (1, 1)  # the one repetition that both have


#
# the command
#

FLAGS = ("-p", 8, "-n", 4, "-d", "0,40", "-r", 2, "-t", 1, "--kv-mixed", MIXED)


def test_forms(capsys: pytest.CaptureFixture, tmp_path: Path, tiny_model_path: Path) -> None:
    record = tmp_path / "run.jsonl"
    code, table, err = run(capsys, "-m", tiny_model_path, *FLAGS, "--jsonl", record)
    assert (code, err) == (0, "")
    rows = md_rows(table)
    assert [(row["cache"], row["test"]) for row in rows] == [
        (cache, test)
        for test in ("pp8", "tg4", "pp8 @ d40", "tg4 @ d40")
        for cache in ("f16", "q8_0", "q4_0", f"mixed {MIXED}")
    ]
    assert {row["KV MiB"] for row in rows if row["cache"] == "f16"} == {f"{256 * BYTES['f16'] / 2**20:.1f}"}
    assert all((row["p50 ms"] != "") == row["test"].startswith("tg") for row in rows)
    assert all((row["migrate"] != "") == row["cache"].startswith("mixed") for row in rows)
    assert all(re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", row["t/s"]) for row in rows)

    # a replay shows the same, in every form
    records = [json.loads(line) for line in record.read_text().splitlines()]
    assert run(capsys, "--replay", record) == (0, table, "")
    assert run(capsys, "--replay", record, "-o", "md") == (0, table, "")
    for form in ("json", "jsonl", "csv"):
        code, out, err = run(capsys, "--replay", record, "-o", form)
        assert code == 0 and "q8_0" in err  # the table
        if form == "csv":
            flat = list(csv.DictReader(io.StringIO(out)))
            assert not any(name.startswith("samples_") for name in flat[0])
            for row, full in zip(flat, records, strict=True):
                assert row == {name: "" if full[name] is None else str(full[name]) for name in row}
        else:
            found = json.loads(out) if form == "json" else [json.loads(line) for line in out.splitlines()]
            assert found == records
    upstream = {
        "backends", "cpu_info", "gpu_info", "model_filename", "model_type", "model_size", "model_n_params", "n_batch",
        "n_ubatch", "n_threads", "type_k", "type_v", "n_gpu_layers", "flash_attn", "n_prompt", "n_gen", "n_depth",
        "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts",
    }  # fmt: skip
    ours = {"kv_mixed", "kv_bytes", "median_ts", "ratio", "p50_ms", "p99_ms", "migrate_share", "samples_token_ns"}
    assert upstream | ours <= records[0].keys()
    for full in records:
        assert full["samples_ts"] == [1e9 * (full["n_prompt"] + full["n_gen"]) / ns for ns in full["samples_ns"]]


def test_jsonl_on_stdout(capsys: pytest.CaptureFixture, tmp_path: Path, tiny_model_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the end of the and")
    code, out, _ = run(
        capsys, "-m", tiny_model_path, "-p", 0, "-n", "2,3", "-r", 1, "-ctk", "f16", "--kv-mixed", "off", "-t", "1-2",
        "-f", text, "-fa", "on,off", "-b", 64, "-ub", 32, "-o", "jsonl", "--no-warmup",
    )  # fmt: skip
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [(r["n_threads"], r["n_gen"], r["cache"], r["flash_attn"]) for r in records] == [
        (t, n, *fa) for t in (1, 2) for n in (2, 3) for fa in (("f16", 1), ("f16 fa=off", 0))
    ]
    assert {(r["seed"], r["n_batch"], r["n_ubatch"]) for r in records} == {(None, 64, 32)}


def test_fit_and_plot(
    capsys: pytest.CaptureFixture, tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    record, png, svg = tmp_path / "run.jsonl", tmp_path / "a.png", tmp_path / "a.svg"
    code, out, err = run(
        capsys, "-m", tiny_model_path, "-p", 0, "-n", 2, "-d", "0-32+16", "-r", 1, "-t", 1, "-ctk", "f16",
        "--kv-mixed", "hot=32", "--kv-mixed", "hot=32,cold=q8_0", "--fit", "--plot", png, "--jsonl", record,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert png.read_bytes().startswith(b"\x89PNG")
    speeds, fit = out.split("\n\ntime per token")
    assert len(md_rows(speeds)) == 9
    assert [(row["cache"], row["depths"]) for row in md_rows(fit)] == [
        ("f16", "3"), ("mixed hot=32", "3"), ("mixed hot=32,cold=q8_0", "3"),
    ]  # fmt: skip
    assert run(capsys, "--replay", record, "--fit", "--plot", svg) == (0, out, "")
    assert "<svg" in svg.read_text() and "matplotlib" in svg.read_text()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_args, **_options: None)
    assert run(capsys, "--replay", record, "--plot", tmp_path / "b.png")[0] == 0
    monkeypatch.undo()
    code, out, err = run(capsys, "--replay", record, "--plot", tmp_path / "a.nothing")
    assert code == 1 and "can not be drawn" in err

    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:6]))
    assert_error(run(capsys, "--replay", record, "--fit"), 2, "3 depths")
    prompt = summarise([make_row(n_prompt=8, n_gen=0, samples_token_ns=((),))])[0].record()
    record.write_text(json.dumps(prompt) + "\n")
    assert_error(run(capsys, "--replay", record, "--plot", svg), 2, "the speed of decoding")


def test_a_plot_without_matplotlib(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for args in (("-m", "missing.gguf"), ("--replay", "missing.jsonl")):
        assert_error(run(capsys, *args, "--plot", "x.png"), 1, "needs matplotlib")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ("", "required"),
        ("-m x --replay y", "not allowed"),
        ("-m x -o xml", "invalid choice"),
        ("-m x -r many", "invalid int"),
        ("-m x -r 0", "-r must be"),
        ("-m x -p 0 -n 0", "nothing to measure"),
        ("-m x -p ten", "'ten'"),
        ("-m x -n -4", "'-4'"),
        ("-m x -d 8-4", "ends before it begins"),
        ("-m x -t 0", "-t"),
        ("-m x -t 1000", "-t must be"),
        ("-m x -b 0", "-b must be"),
        ("-m x -ub 0", "-ub must be"),
        ("-m x -ngl -2", "-ngl must be"),
        ("-m x -s -1", "-s"),
        ("-m x -s 1 -f y", "-f has others"),
        ("-m x -ctk q3_k", "q3_k"),
        ("-m x -ctk f16,q8_0 -ctv f16,q8_0,q4_0", "in pairs"),
        ("-m x -ctk q8_0 -fa off", "needs flash attention"),
        ("-m x -fa maybe", "maybe"),
        ("-m x --kv-mixed warm=1", "warm"),
        ("-m x --fit", "3 depths"),
        ("-m x --fit -d 0,1,2 -n 0", "3 depths"),
        ("-m x --plot y.png -n 0", "must be over 0"),
        ("-m x --weights q9", "--weights must be of f32, f16, bf16, q8_0, "),
        ("--replay x --weights q4_0", "--weights is for a new one"),
        ("--replay x -p 5", "--n-prompt is for a new one"),
        ("--replay x --kv-mixed hot=5", "--kv-mixed"),
        ("--replay x --no-warmup", "--no-warmup"),
    ],
)
def test_bad_usage_exits_2(capsys: pytest.CaptureFixture, args: str, text: str) -> None:
    code, out, err = run(capsys, *args.split())
    assert (code, out) == (2, "") and text in err.splitlines()[-1]


def test_errors_are_one_sentence(capsys: pytest.CaptureFixture, tmp_path: Path, tiny_model_path: Path) -> None:
    assert_error(run(capsys, "-m", tmp_path / "missing.gguf"), 1, "neither a file")
    assert_error(run(capsys, "-m", tiny_model_path, "-f", tmp_path / "missing"), 1, "No such file")
    # what a context says, with the configuration that it says it of
    assert_error(run(capsys, "-m", tiny_model_path, *FLAGS[:-1], "hot=8,cold_size=8"), 1, "mixed hot=8,cold_size=8: ")
    # what was measured before it is not lost
    code, out, err = run(
        capsys, "-m", tiny_model_path, *FLAGS[:4], "-r", 1, "-t", 1, "-d", "0,300", "--kv-mixed", "hot=200,cold_size=56"
    )
    assert code == 1 and {row["test"] for row in md_rows(out)} == {"pp8", "tg4"}
    assert err.startswith("llamamix: mixed hot=200,cold_size=56: ") and len(err.splitlines()) == 1


def test_an_interrupt_keeps_what_there_is(
    capsys: pytest.CaptureFixture, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DepthCache.restore
    calls = [0]

    def restore(self: DepthCache) -> Context:
        calls[0] += 1
        if calls[0] > 4 * 3 + 2:  # the first test with its warm-up, and a little more
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(DepthCache, "restore", restore)
    code, out, err = run(capsys, "-m", tiny_model_path, *FLAGS, "--fit", "-d", 80)
    assert (code, err) == (130, "")
    assert [row["test"] for row in md_rows(out)] == ["pp8"] * 4 + ["tg4"]

    calls[0] = 1000
    assert run(capsys, "-m", tiny_model_path, *FLAGS) == (130, "", "")


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_ctrl_c(tiny_model_path: Path) -> None:
    command = [sys.executable, "-m", "llamamix", "bench", "-m", tiny_model_path, "-o", "jsonl"]
    flags = ["-p", 2, "-n", 1, "-d", "0,8000", "-r", 1, "-t", 1]  # the second depth takes longer than the test
    process = subprocess.Popen(
        list(map(str, command + flags)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(8)]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert {json.loads(line)["n_depth"] for line in lines} == {0}
    assert "Traceback" not in err and "q4_0" in err  # the table of what there is


def test_progress_and_a_table_on_a_terminal(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    from rich.console import Console

    grid = results_grid(summarise([timed((4, 6), cache="mixed hot=8,[b]")]))
    console = Console(width=100, file=io.StringIO())
    console.print(grid.rich())
    text = console.file.getvalue()
    assert "mixed hot=8,[b]" in text and "200.00 ± 0.00" in text and "model: llama 1B Q4_0" in text


def test_a_configuration_knows_its_context() -> None:
    mixed = Configuration("mixed", "f16", "f16", "on", "hot=64")
    assert mixed.context_params()["kv_mixed"] == "hot=64"
