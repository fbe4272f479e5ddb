"""Recorded runs: events as JSON, the command that records and replays them, and what is drawn of them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.traces import N_LAYER, ROW_F16, SPEC, THRESHOLD_LINES, cache_of, migrations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from llamamix import (
    Context,
    SamplingParams,
    Trace,
    TraceError,
)
from llamamix.cli import main
from llamamix.trace import End, Event, EventKind, Header, LayerError, Progress, Summary, Trigger, read_recording
from llamamix.trace.view import svg, view

#
# JSON
#

finite = st.floats(0, 1e30)
errors = st.one_of(st.none(), finite)
naturals = st.integers(0, 2**32 - 1)
any_event = st.builds(
    Event,
    id=st.integers(0, 2**64 - 1),
    t=finite,
    kind=st.sampled_from(EventKind),
    trigger=st.one_of(st.none(), st.sampled_from(Trigger)),
    stream=st.one_of(st.none(), naturals),
    seq_ids=st.lists(st.integers(0, 255), unique=True).map(sorted).map(tuple),
    pos_min=st.one_of(st.none(), naturals),
    pos_max=st.one_of(st.none(), naturals),
    n_tokens=naturals,
    hot_used=naturals,
    hot_size=naturals,
    cold_used=naturals,
    cold_size=naturals,
    duration=finite,
    bytes_in=naturals,
    bytes_out=naturals,
    rmse_k=errors,
    max_k=errors,
    rmse_v=errors,
    max_v=errors,
    rms_k=errors,
    rms_v=errors,
    layers=st.lists(st.builds(LayerError, naturals, *[finite] * 6), max_size=3).map(tuple),
)


@given(any_event)
@settings(max_examples=200, deadline=None)
def test_events_come_back_from_json(event: Event) -> None:
    line = event.to_json()
    assert "\n" not in line and json.loads(line)["record"] == "event"
    assert Event.from_json(line) == event


def test_json_of_other_things() -> None:
    for line in ("", "7", "{}", End(1.0, 0, False).to_json(), '{"record": "event"}'):
        with pytest.raises(ValueError, match="this is|missing"):
            Event.from_json(line)


def test_events_are_frozen() -> None:
    with cache_of() as cache, Trace(cache) as trace:
        (event,) = trace.read()
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.id = 1


#
# the command
#


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    try:
        code = main(["trace", *map(str, args)])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    return code, out, err


def assert_error(result: tuple[int, str, str], code: int, text: str) -> None:
    assert (result[0], result[1]) == (code, "")
    lines = result[2].splitlines()
    assert len(lines) == 1 and lines[0].startswith("llamamix: ") and text in lines[0]


@pytest.fixture(scope="module")
def model_args(tiny_model_path: Path) -> tuple[object, ...]:
    return ("-m", tiny_model_path, "-t", 1, "-c", 512, "-s", 1, "--kv-mixed", SPEC)


@pytest.fixture(scope="module")
def recording(model_args: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded run of 6 tokens and 40 more."""
    path = tmp_path_factory.mktemp("runs") / "run.jsonl"
    args = (*model_args, "-p", "in the end", "-n", 40, "--layers", "--jsonl", path, "-o", "jsonl")
    assert main(["trace", *map(str, args)]) == 0
    return path


def summed(path: Path) -> Summary:
    header, records = read_recording(path)
    summary = Summary(header)
    for record in records:
        summary.add(record)
    return summary


def table_of(text: str) -> dict[str, str]:
    """The rows of the summary in what a command wrote."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    cells = (line.strip("│").split("│") for line in text.splitlines() if line.startswith("│") and line.count("│") == 3)
    return {name.strip(): value.strip() for name, value in cells}


def test_plain_lines_and_the_summary(capsys: pytest.CaptureFixture[str], model_args: tuple[object, ...]) -> None:
    level = logging.getLogger("llamamix").level
    # 13 tokens: the threshold is passed with the tokens 9, 11 and 13
    code, out, err = run(capsys, *model_args, "-p", "in the end", "-n", 7, "--temp", 0)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    n_log = sum(line.startswith(("[MIXED_CACHE", "llama_kv_cache_mixed: ")) for line in lines)
    assert lines[:n_log] == [
        "llama_kv_cache_mixed: creating hot KV cache (FP16), size = 10 cells",
        "llama_kv_cache_mixed: creating cold KV cache (quantized), size = 502 cells",
        "[MIXED_CACHE_DEBUG] initialized: hot=0/10 (0.0%), cold=0/502 (0.0%)",
        *THRESHOLD_LINES * 3,
    ]
    assert lines[n_log].strip() == "llamamix trace"

    table = table_of(out)
    assert (table["tokens in"], table["tokens out"]) == ("6", "7")
    assert (table["hot cells (f16)"], table["cold cells (q4_0)"]) == ("7 of 10", "6 of 502")
    assert (table["migrations"], table["tokens moved"], table["records dropped"]) == ("3", "6", "0")
    n_bytes = 2 * N_LAYER * 6 * ROW_F16 / 2**20
    assert table["bytes moved"] == f"{n_bytes:.2f} MiB became {n_bytes * 18 / 64:.2f} MiB"
    assert table["error of K"].startswith("RMSE 0.0") and table["error of V"].startswith("RMSE 0.0")
    # the log is as before
    assert logging.getLogger("llamamix").level == level


def test_the_summary_adds_up(recording: Path) -> None:
    summary = summed(recording)
    events = [record for record in read_recording(recording)[1] if isinstance(record, Event)]
    moves = migrations(events)
    assert (summary.n_migrations, summary.n_tokens_moved) == (len(moves), 2 * len(moves)) == (19, 38)
    assert (summary.hot_used, summary.cold_used) == (8, 38)
    assert summary.time_moving == pytest.approx(sum(e.duration for e in moves))
    assert summary.time_max == max(e.duration for e in moves)
    # two tokens each time: the plain mean of the squares
    assert summary.error_k.rmse == pytest.approx(math.sqrt(np.mean([e.rmse_k**2 for e in moves])))
    assert (summary.error_k.max, summary.error_v.max) == (max(e.max_k for e in moves), max(e.max_v for e in moves))
    assert moves[-1].max_k < summary.error_k.max
    # relative to the rows: of a Q4_0 block's 32 values some 5 to 15 %
    rms = math.sqrt(np.mean([e.rms_k**2 for e in moves]))
    assert summary.error_k.relative == pytest.approx(summary.error_k.rmse / rms)
    assert 0.05 < summary.error_k.relative < 0.15
    of_layer = [[e.layers[il].rmse_v for e in moves] for il in range(N_LAYER)]
    assert summary.layers[1][1].rmse == pytest.approx(math.sqrt(np.mean(np.square(of_layer[1]))))
    mean = math.sqrt(np.mean([summary.layers[il][1].rmse ** 2 for il in range(N_LAYER)]))
    assert summary.error_v.rmse == pytest.approx(mean)
    rows = dict(row for section in summary.rows() for row in section)
    assert rows["time in migrations"] == f"{100 * summary.time_moving / summary.t:.1f} %"
    cache = summary.header.cache
    assert cache.bytes_plain == 512 * N_LAYER * 2 * ROW_F16
    saved = 1 - (cache.bytes_hot + cache.bytes_cold) / cache.bytes_plain
    assert rows["memory saved"].endswith(f"({100 * saved:.1f} %)")


def new_summary(n_seq_max: int = 1) -> tuple[Summary, Event]:
    """That of a run in which nothing happened yet, and its first event."""
    with cache_of(n_seq_max=n_seq_max, unified=False) as cache, Trace(cache) as trace:
        (init,) = trace.read()
        return Summary(Header("llamamix-trace", 2, "", None, trace.params.spec(), None, trace.cache)), init


def test_a_stream_is_not_the_whole() -> None:
    for n_seq_max, hot_used in ((1, 3), (2, 0)):
        summary, init = new_summary(n_seq_max)
        summary.add(dataclasses.replace(init, stream=0, hot_used=3))
        assert summary.hot_used == hot_used
        summary.add(dataclasses.replace(init, hot_used=5, cold_used=1))
        summary.add(Progress(0.1, 6, 0, 6, 1, 0.0, 0.0, ""))
        assert (summary.hot_used, summary.cold_used) == (6, 1)


def test_errors_are_weighted_by_tokens() -> None:
    summary, init = new_summary()
    measured = {"rmse_v": 0.0, "max_v": 0.0, "rms_v": 0.0}
    for n_tokens, error, rms in ((1, 2.0, 10.0), (3, 4.0, 30.0)):
        move = {"kind": EventKind.MIGRATE, "n_tokens": n_tokens, "rmse_k": error, "max_k": error, "rms_k": rms}
        summary.add(dataclasses.replace(init, **measured | move))
    assert summary.error_k.rmse == pytest.approx(math.sqrt((4 + 3 * 16) / 4))
    assert summary.error_k.relative == pytest.approx(math.sqrt((4 + 3 * 16) / (100 + 3 * 900)))
    assert str(summary.error_k) == "RMSE 3.6056 (13.6 %), max 4.000"
    assert (summary.error_k.max, summary.error_v.rmse, summary.error_v.max) == (4.0, 0.0, 0.0)
    assert summary.error_v.relative == 0.0  # rows of nothing but zeros


def test_a_recorded_run_is_that_run(
    capsys: pytest.CaptureFixture[str],
    model_args: tuple[object, ...],
    make_context: Callable[..., Context],
    tmp_path: Path,
) -> None:
    context = make_context(kv_mixed=SPEC)
    generated = "".join(context.generate("in the end", 40, SamplingParams(seed=1)))
    assert len(generated) > 20
    path = tmp_path / "run.jsonl"
    code, live, _ = run(capsys, *model_args, "-p", "in the end", "-n", 40, "--layers", "--jsonl", path)
    assert code == 0
    code, replayed, err = run(capsys, "--replay", path)
    assert (code, err) == (0, "")
    assert live.endswith(replayed) and replayed.splitlines()[0].strip() == "llamamix trace"
    assert "error by layer" in replayed

    header, (*records, end) = read_recording(path)
    assert (header.model, header.n_ctx, header.cache.n_layer) == ("tiny", 512, N_LAYER)
    assert header.kv_mixed == "hot=10,cold=q4_0,group=4,threshold=0.8,sink=0,cold_size=502"
    assert end == End(end.t, 0, False)
    times = [r.t for r in records]
    assert times == sorted(times) and times[-1] <= end.t
    progress = [r for r in records if isinstance(r, Progress)]
    assert "".join(r.text for r in progress) == generated
    assert (progress[-1].n_in, progress[-1].n_out) == (6, 40)
    assert (progress[-1].hot_used, progress[-1].cold_used) == (8, 38)
    assert [r.id for r in records if isinstance(r, Event)] == list(range(39))


def test_records_on_stdout(capsys: pytest.CaptureFixture[str], recording: Path, tmp_path: Path) -> None:
    code, out, err = run(capsys, "--replay", recording, "-o", "jsonl")
    assert code == 0 and table_of(err)["migrations"] == "19"
    assert out == recording.read_text()

    code, out, _ = run(capsys, "--replay", recording, "-o", "json")
    events = [record for record in read_recording(recording)[1] if isinstance(record, Event)]
    assert [(e["id"], e["kind"], e["t"]) for e in json.loads(out)] == [(e.id, e.kind, e.t) for e in events]
    code, out, _ = run(capsys, "--replay", recording, "-o", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["id"], row["kind"], row["hot_used"]) for row in rows] == [
        (str(e.id), e.kind.value, str(e.hot_used)) for e in events
    ]
    assert [(row["trigger"], row["seq_ids"]) for row in rows[:2]] == [("", ""), ("threshold", "0")]
    code, out, _ = run(capsys, "--replay", recording, "-o", "md")
    assert out.splitlines()[4].count("|") == out.splitlines()[0].count("|") == 23


def test_records_as_they_come(model_args: tuple[object, ...]) -> None:
    process = start(*model_args, *ENDLESS, "-p", "in", "-o", "jsonl", "--kv-mixed", "hot=4096", stderr=subprocess.PIPE)
    first = [json.loads(process.stdout.readline()) for _ in range(4)]
    assert [r["record"] for r in first] == ["header", "event", "progress", "progress"]
    process.send_signal(signal.SIGINT)
    rest, err = process.stdout.read(), process.stderr.read()
    assert process.wait(20) == 130 and table_of(err)["migrations"] == "0"
    assert len(rest.splitlines()) < 15  # nothing waited until there was more of it


@pytest.mark.parametrize("during", ["prompt", "generation"])
@pytest.mark.parametrize("form", [("-o", "jsonl"), ("--plain",)])
def test_the_reader_goes(model_args: tuple[object, ...], tmp_path: Path, during: str, form: tuple[str, ...]) -> None:
    (tmp_path / "prompt.txt").write_text(" the" * (30_000 if during == "prompt" else 1))
    process = start(*model_args, *ENDLESS, "-f", tmp_path / "prompt.txt", *form, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(('{"record": "header"', "llama_kv_cache_mixed: creating"))
    process.stdout.close()
    assert (process.wait(10), process.stderr.read()) == (141, "")


#
# Ctrl-C
#


# a generation that no token ends
ENDLESS = ("-c", 100_000, "-n", -1, "--grammar", "root ::= [a-z] root")


def start(*args: object, stderr: Any = subprocess.STDOUT) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llamamix", "trace", *map(str, args)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)


@pytest.mark.parametrize("during", ["prompt", "generation"])
def test_ctrl_c(model_args: tuple[object, ...], tmp_path: Path, during: str) -> None:
    n_words = 10_000 if during == "prompt" else 1
    (tmp_path / "prompt.txt").write_text(" the" * n_words)
    path = tmp_path / "run.jsonl"
    process = start(*model_args, *ENDLESS, "-f", tmp_path / "prompt.txt", "--jsonl", path)
    line = ""
    while "Quantizing" not in line:
        line = process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "llamamix trace (interrupted)" in out and "Traceback" not in out
    table = table_of(out)
    assert int(table["migrations"]) > 0
    n_in, n_out = int(table["tokens in"]), int(table["tokens out"])
    assert (n_in < n_words and n_out == 0) if during == "prompt" else (n_in == 3 and n_out > 0)

    summary = summed(path)
    assert summary.end.interrupted
    assert (summary.progress.n_in, summary.progress.n_out) == (n_in, n_out)
    assert summary.hot_used + summary.cold_used == n_in + n_out


#
# files that are no recorded run
#


def test_damaged_files(capsys: pytest.CaptureFixture[str], recording: Path, tmp_path: Path) -> None:
    lines = recording.read_bytes().splitlines(keepends=True)
    n = len(lines)
    path = tmp_path / "run.jsonl"

    def assert_line(number: int, content: bytes, what: str) -> None:
        path.write_bytes(content)
        assert_error(run(capsys, "--replay", path), 1, f"{path}, line {number}: the file {what}")

    for content in (b"", b"\n", b"GGUF\x03\0\0\0", b"\xff\xfe\n", b"a text\n", b"[]\n", b'{"a": 1}\n', b"[" * 100_000):
        assert_line(1, content, "is not a recorded trace" if content else "is cut off")
    assert_line(1, lines[0].replace(b"llamamix-trace", b"other-trace"), "is not a recorded trace (its format")
    assert_line(1, lines[0].replace(b'"version": 2', b'"version": 1'), "is not a recorded trace (its version is 1")
    assert_line(1, lines[0].replace(b'"q4_0"', b'"[/q]"', 1), "is not a recorded trace (a type is unknown")
    assert_line(1, lines[1], "is not a recorded trace (no event")

    # every end but the right one
    for i in (1, 2, 10, n - 1):
        assert_line(i + 1, b"".join(lines[:i]), "is cut off (the end of the run is missing)")
        assert_line(i + 1, b"".join(lines[:i]) + lines[i][:20], "is damaged (this is not JSON)")
    assert_line(n + 1, b"".join([*lines, lines[-1]]), "is damaged (no end belongs here)")
    assert_line(3, b"".join([*lines[:2], lines[0]]), "is damaged (no header belongs here)")
    assert_line(4, b"".join([*lines[:2], lines[10], lines[2]]), "is damaged (time goes backwards)")

    # (on a busy machine a record of the progress may be before it)
    at = next(i for i, line in enumerate(lines) if b'"kind": "trigger"' in line)
    event = lines[at]
    for old, new, what in (
        (b'"n_tokens": 2', b'"n_tokens": "2"', "n_tokens must not be '2'"),
        (b'"n_tokens": 2', b'"n_tokens": true', "n_tokens must not be True"),
        (b'"n_tokens": 2', b'"n_tokens": -2', "n_tokens is out of bounds"),
        (b'"n_tokens": 2', b'"n_tokens": 2' + b"0" * 30, "n_tokens is out of bounds"),
        (b'"n_tokens": 2', b'"n_tokens": 2' + b"0" * 5000, "this is not JSON"),
        (b'"n_tokens": 2', b'"n_token": 2', "n_token"),
        (b'"n_tokens": 2, ', b"", "n_tokens is missing"),
        (b'"duration": 0.0', b'"duration": NaN', "duration is out of bounds"),
        (b'"duration": 0.0', b'"duration": Infinity', "duration is out of bounds"),
        (b'"kind": "trigger"', b'"kind": "triggered"', "'triggered' is not a valid EventKind"),
        (b'"rmse_k": null', b'"rmse_k": "0.5"', "rmse_k must not be '0.5'"),
        (b'"seq_ids": [0]', b'"seq_ids": 0', "seq_ids must be a list"),
        (b'"layers": []', b'"layers": [7]', "7 is no object"),
        (b'"record": "event"', b'"record": "events"', "it is of an unknown kind"),
        (b'"record": "event"', b'"record": ["event"]', "it is of an unknown kind"),
    ):
        assert old in event
        damaged = b"".join([*lines[:at], event.replace(old, new), *lines[at + 1 :]])
        assert_line(at + 1, damaged, f"is damaged ({what}")

    assert_error(run(capsys, "--replay", tmp_path / "missing"), 1, "No such file")
    assert_error(run(capsys, "--replay", tmp_path), 1, "directory")
    with pytest.raises(TraceError, match="line 1"):
        read_recording(__file__)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_anywhere(data: st.DataObject, recording: Path, tmp_path: Path) -> None:
    """Whatever is done to a file, it is shown or refused."""
    content = bytearray(recording.read_bytes()[:6000])
    content += recording.read_bytes().splitlines()[-1] if data.draw(st.booleans()) else b""
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3) | st.just(b"9" * 40))
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    try:
        summary = summed(path)
    except TraceError as error:
        assert str(error).startswith(f"{path}, line ")
    else:
        Console(file=io.StringIO()).print(view(summary), *summary.tables())


#
# what is drawn
#


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_the_view_of_every_state(recording: Path, width: int) -> None:
    header, records = read_recording(recording)
    summary = Summary(header)
    heights = set()
    for record in records:
        summary.add(record)
        out = io.StringIO()
        Console(file=out, width=width).print(view(summary))
        lines = out.getvalue().splitlines()
        assert all(len(line) <= width for line in lines)
        heights.add(len(lines))
        if width >= 80:
            assert f"{summary.hot_used}/10" in lines[1] and f"{summary.cold_used}/502" in lines[2]
            if isinstance(record, Event) and record.kind is EventKind.TRIGGER:
                assert f"moving 2 tokens ({record.pos_min} to {record.pos_max}), over the threshold" in out.getvalue()
    if width >= 80:
        assert heights == {21, 23}  # the lines about the layers come with the first migration


def test_the_view_does_not_control_the_terminal(recording: Path) -> None:
    summary = summed(recording)
    summary.add(dataclasses.replace(summary.progress, text="\x1b[2J\a[/bold]\x9b\r end"))
    summary.header = dataclasses.replace(summary.header, model="\x1b]0;title\a[red]\udce9")
    out = io.StringIO()
    Console(file=out, width=80).print(view(summary))
    text = out.getvalue()
    assert not any(c in text for c in "\x1b\a\x9b\r\udce9")
    assert "[/bold]" in text and "[red]" in text


def test_the_picture_of_the_view(capsys: pytest.CaptureFixture[str], recording: Path, tmp_path: Path) -> None:
    path = tmp_path / "view.svg"
    assert run(capsys, "--replay", recording, "--svg", path)[0] == 0
    picture = path.read_text()
    assert picture.startswith("<svg") and "migrate" in picture and "8/10" in picture
    assert "@font-face" not in picture and "url(" not in picture.replace("url(#", "")  # it needs nothing from elsewhere
    assert picture == svg(summed(recording))


def test_on_a_terminal(recording: Path, model_args: tuple[object, ...]) -> None:
    for args in (("--replay", recording, "--speed", 0), (*model_args, "-p", "in the end", "-n", 20)):
        ours, its = pty.openpty()
        command = [sys.executable, "-m", "llamamix", "trace", *map(str, args)]
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "50"}
        with subprocess.Popen(command, stdout=its, stderr=subprocess.PIPE, env=environment) as process:
            os.close(its)
            out = b""
            while chunk := read_or_end(ours):
                out += chunk
            assert (process.wait(), process.stderr.read()) == (0, b"")
        os.close(ours)
        text = out.decode()
        assert "\x1b[?25l" in text and "last migration: 2 tokens" in text
        assert "[MIXED_CACHE" not in text
        end = text.index("llamamix trace")
        assert text.index("last migration") < end and "memory saved" in text[end:]


def read_or_end(file: int) -> bytes:
    try:
        return os.read(file, 4096)
    except OSError:  # a terminal that nobody has open any more
        return b""


def test_a_replay_takes_its_time(
    capsys: pytest.CaptureFixture[str], recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the second half of the run is ten seconds later
    lines = [json.loads(line) for line in recording.read_text().splitlines()]
    for line in lines[25:]:
        line["t"] += 10
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    duration = lines[-1]["t"] - 10

    waits: list[float] = []
    monkeypatch.setattr("llamamix.cli.trace.time.sleep", waits.append)
    assert run(capsys, "--replay", path)[0] == 0
    assert waits == []  # no terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(capsys, "--replay", path, "--speed", 0)[0] == 0
    assert waits == []
    assert run(capsys, "--replay", path)[0] == 0
    assert max(waits) == 2.0 and duration + 1.9 < sum(waits) <= duration + 2.0  # a long pause is cut short
    waits.clear()
    assert run(capsys, "--replay", path, "--speed", 100)[0] == 0
    assert sum(waits) == pytest.approx((duration + 10) / 100)

    def interrupt(_seconds: float) -> None:
        waits.append(0.0)
        if len(waits) == 20:
            raise KeyboardInterrupt

    waits.clear()
    monkeypatch.setattr("llamamix.cli.trace.time.sleep", interrupt)
    code, out, err = run(capsys, "--replay", path)
    assert (code, err) == (130, "")
    n_shown = sum(line.get("kind") == "migrate" for line in lines[1:20])  # behind the header, 19 records before
    assert table_of(out)["migrations"] == str(n_shown) and n_shown > 0


def test_a_plot_without_matplotlib(
    capsys: pytest.CaptureFixture[str], recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "run.png"
    for args in (("--replay", recording), ("-m", "no such model", "-p", "a")):
        assert_error(run(capsys, *args, "--plot", path), 1, "needs matplotlib")
    assert not path.exists()


def test_a_plot(capsys: pytest.CaptureFixture[str], recording: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    odd = tmp_path / "odd.jsonl"  # a name that is no text, and what would be a formula
    odd.write_text(recording.read_text().replace('"model": "tiny"', '"model": "$\\\\frac \\udce9 $ $"'))
    assert run(capsys, "--replay", odd, "--plot", tmp_path / "odd.png")[0] == 0
    for name, start in (("run.png", b"\x89PNG"), ("run.svg", b"<?xml")):
        assert run(capsys, "--replay", recording, "--plot", tmp_path / name)[0] == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    code, _, err = run(capsys, "--replay", recording, "--plot", tmp_path / "run.docx")
    assert code == 1 and "run.docx can not be drawn: its ending must be one of" in err and len(err.splitlines()) == 1


#
# bad usage
#


def test_bad_usage(capsys: pytest.CaptureFixture[str], model_args: tuple[object, ...], recording: Path) -> None:
    for args in (
        (),
        ("-p", "a"),
        ("-m", "a", "--replay", "b"),
        (*model_args, "-p", "a", "-f", "b"),
        (*model_args, "-p", "a", "-o", "xml"),
        (*model_args, "-p", "a", "-o", "jsonl", "--plain"),
        (*model_args, "-p", "a", "--speed", "fast"),
    ):
        code, out, err = run(capsys, *args)
        assert (code, out) == (2, "") and "usage: llamamix trace" in err
    for args, text in (
        (model_args, "A prompt is needed"),
        (("--replay", recording, "-p", "a"), "--replay shows a run that is over"),
        (("--replay", recording, "--jsonl", recording), "--replay shows a run that is over"),
        (("--replay", recording, "--speed", -1), "--speed must be 0 or more"),
        (("--replay", recording, "--speed", "nan"), "--speed must be 0 or more"),
        ((*model_args, "-p", "a", "--kv-mixed", "off"), "--kv-mixed can not be off"),
        ((*model_args, "-p", "a", "--kv-mixed", "hot=0"), "hot"),
        ((*model_args, "-p", "a", "--temp", -1), "--temp must be"),
        ((*model_args, "-p", "a", "-n", 0), "-n must be -1, or from 1 to"),
    ):
        assert_error(run(capsys, *args), 2, text)
    assert recording.stat().st_size > 0


def test_what_goes_wrong_during_a_run(
    capsys: pytest.CaptureFixture[str], model_args: tuple[object, ...], tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    code, out, err = run(capsys, *model_args, "-p", "in the end", "-c", 256, *ENDLESS[2:], "-n", 400, "--jsonl", path)
    assert code == 1 and len(err.splitlines()) == 1 and "The context is full: it holds 256 tokens" in err
    assert table_of(out)["hot cells (f16)"] == "10 of 10" and "(interrupted)" in out
    assert summed(path).end.interrupted

    files = [("--jsonl", tmp_path, "directory"), ("--svg", tmp_path / "no" / "x.svg", "No such file")]
    files += [("--jsonl", "/dev/full", "No space left")] if os.path.exists("/dev/full") else []
    for option, file, reason in files:
        code, _, err = run(capsys, *model_args, "-p", "a", option, file)
        assert code == 1 and reason in err and len(err.splitlines()) == 1
