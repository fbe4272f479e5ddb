"""The command line: what goes where, exit codes, and numbers worked out by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command import assert_error, command, run

import llamamix.pull
from llamamix import Context, Model, PerfData, SamplingParams
from llamamix.cli.demo import difference
from llamamix.demo import DemoRun

GREEDY = SamplingParams(temperature=0)


#
# the command itself
#


def test_help_and_version_need_no_library(tmp_path: Path, tiny_model_path: Path) -> None:
    environment = os.environ | {"LLAMAMIX_LIB_PATH": str(tmp_path)}
    expected = {
        "": "usage: llamamix",
        "--help": "usage: llamamix",
        "--version": "llamamix ",
        "pull --list": "smollm2",
        "generate --help": "--temp",
    }
    for args, text in expected.items():
        result = subprocess.run(command(*args.split()), env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "") and text in result.stdout
    result = subprocess.run(
        command("generate", "-m", tiny_model_path, "-p", "x"), env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1 and f"is in none of {tmp_path}" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("no-such-command",),
        ("--no-such-flag",),
        ("generate",),
        ("generate", "-m", "x"),
        ("generate", "-m", "x", "-p", "a", "-f", "b"),
        ("generate", "-m", "x", "-p", "a", "-n", "many"),
        ("generate", "-m", "x", "-p", "a", "--no-such-flag"),
        ("generate", "-m", "x", "-p", "a", "--temp", "-1"),
        ("generate", "-m", "x", "-p", "a", "-c", "-5"),
        ("generate", "-m", "x", "-p", "a", "-t", "0"),
        ("generate", "-m", "x", "-p", "a", "-ctk", "q3_k"),
        ("generate", "-m", "x", "-p", "a", "-fa", "maybe"),
        ("info",),
        ("info", "x", "-o", "xml"),
        ("pull",),
        ("demo", "--kv-mixed", "off"),
        ("demo", "-p", "0"),
    ],
    ids=" ".join,
)
def test_bad_usage_exits_2(capsys: pytest.CaptureFixture, args: tuple) -> None:
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "") and err


def test_errors_are_one_sentence(capsys: pytest.CaptureFixture, tmp_path: Path, tiny_model_path: Path) -> None:
    missing = tmp_path / "missing.gguf"
    assert_error(
        run(capsys, "generate", "-m", missing, "-p", "x"), 1, f"{missing} is neither a file nor one of the models"
    )
    assert_error(run(capsys, "generate", "-m", tmp_path, "-p", "x"), 1, "is a directory")
    assert_error(run(capsys, "generate", "-m", tiny_model_path, "-f", missing), 1, "No such file")
    assert_error(run(capsys, "pull", "nothing"), 1, "'nothing'")
    assert_error(run(capsys, "info", missing), 1, "neither a file")
    assert_error(run(capsys, "info", tmp_path), 1, "is a directory")
    assert_error(
        run(capsys, "generate", "-m", tiny_model_path, "-p", "x", "--kv-mixed", "warm=1"), 2, "unknown key 'warm'"
    )
    assert_error(
        run(capsys, "generate", "-m", tiny_model_path, "-p", "x" * 5000, "-c", 256, "-t", 1), 1, "the context holds"
    )


def test_debug_shows_where_an_error_comes_from(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LLAMAMIX_DEBUG", "1")
    code, _, err = run(capsys, "info", tmp_path / "missing.gguf")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("llamamix: ")


#
# generate
#


@pytest.fixture(scope="module")
def expected(tiny_model: Model) -> str:
    with Context(tiny_model, n_ctx=256, n_threads=1) as context:
        return "".join(context.generate("in the", 20, GREEDY))


def generate(path: Path, *args: object) -> tuple:
    return ("generate", "-m", path, "-t", 1, "-c", 256, "--temp", 0, "-n", 20, *args)


def test_generate(capsys: pytest.CaptureFixture, tiny_model_path: Path, tmp_path: Path, expected: str) -> None:
    assert run(capsys, *generate(tiny_model_path, "-p", "in the")) == (0, expected + "\n", "")

    file = tmp_path / "prompt.txt"
    file.write_text("in the", encoding="utf-8")
    assert run(capsys, *generate(tiny_model_path, "-f", file)) == (0, expected + "\n", "")

    stop = expected[5:7]
    code, out, _ = run(capsys, *generate(tiny_model_path, "-p", "in the", "--stop", "never", "--stop", stop))
    assert (code, out) == (0, expected[: expected.index(stop)] + "\n")


def test_generate_reads_stdin(tiny_model_path: Path, expected: str) -> None:
    result = subprocess.run(
        command(*generate(tiny_model_path, "-f", "-")),
        input=b"in the",
        capture_output=True,
        env=os.environ | {"PYTHONUTF8": "1"},
    )
    assert (result.returncode, result.stdout.decode(), result.stderr) == (0, expected + "\n", b"")


def test_flags_reach_the_context(capsys: pytest.CaptureFixture, tiny_model_path: Path, monkeypatch) -> None:
    made = {}
    original = Context.__init__

    def record(self: Context, model: Model, **params: object) -> None:
        made.update(params, n_gpu_layers=model.params.n_gpu_layers)
        original(self, model, **params)

    monkeypatch.setattr(Context, "__init__", record)
    flags = "-c 512 -b 128 -ub 64 -t 1 -tb 2 -ngl 0 -ctk f32 -ctv f32 -fa off --kv-mixed off -n 1 -s 7"
    code, _, _ = run(capsys, "generate", "-m", tiny_model_path, "-p", "x", *flags.split())
    assert code == 0
    assert made == {
        "n_ctx": 512,
        "n_batch": 128,
        "n_ubatch": 64,
        "n_threads": 1,
        "n_threads_batch": 2,
        "n_gpu_layers": 0,
        "type_k": "f32",
        "type_v": "f32",
        "flash_attn": "off",
        "kv_mixed": "off",
        "swa_full": False,
    }


def test_sampling_flags(capsys: pytest.CaptureFixture, tiny_model_path: Path) -> None:
    def text(*args: object) -> str:
        code, out, err = run(
            capsys, "generate", "-m", tiny_model_path, "-t", 1, "-c", 256, "-n", 20, "-p", "in the", *args
        )
        assert (code, err) == (0, "")
        return out

    hot = ("--temp", 2, "--top-k", 0, "--top-p", 1, "--min-p", 0)
    assert text(*hot, "-s", 1) == text(*hot, "--seed", 1) != text(*hot, "-s", 2)
    for only_the_first in (("--temp", 0), ("--top-k", 1), ("--top-p", 0), ("--min-p", 1)):
        assert text(*hot, "-s", 1, *only_the_first) == text("--temp", 0)
    assert text("--temp", 0, "--repeat-penalty", 5) != text("--temp", 0)
    assert text("--temp", 0, "--presence-penalty", 50) != text("--temp", 0)
    assert text("--temp", 0, "--grammar", 'root ::= "of the"') == "of the\n"
    for flag in ("--json-schema", "-j"):
        assert text("--temp", 0, flag, '{"const": "of the"}') == '"of the"\n'


def test_a_conversation(capsys: pytest.CaptureFixture, tiny_model_path: Path, tiny_model: Model) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "in the"}]
    with Context(tiny_model, n_ctx=256, n_threads=1) as context:
        answer = "".join(context.chat(messages, 20, GREEDY))
    result = run(capsys, *generate(tiny_model_path, "-cnv", "-sys", "Be brief.", "-p", "in the"))
    assert result == (0, answer + "\n", "")


def test_stats_go_to_stderr(
    capsys: pytest.CaptureFixture, tiny_model_path: Path, expected: str, tiny_model: Model
) -> None:
    code, out, err = run(
        capsys, *generate(tiny_model_path, "-p", "in the", "--stats", "--kv-mixed", "hot=16,group=4,sink=0")
    )
    assert code == 0 and out.count("\n") >= 1
    rows = {row.split("│")[1].strip(): row.split("│")[2].strip() for row in err.splitlines() if row.startswith("│")}
    n_prompt = len(tiny_model.tokenize("in the"))
    assert (rows["tokens in"], rows["tokens out"]) == (str(n_prompt), "20")
    hot, cold = (
        int(rows[f"{name} cells ({kv_type})"].split()[0]) for name, kv_type in (("hot", "f16"), ("cold", "iq4_nl"))
    )
    assert hot + cold == n_prompt + 20
    assert rows["tokens moved"] == str(cold)

    _, out, err = run(capsys, *generate(tiny_model_path, "-p", "in the", "--stats", "--kv-mixed", "off"))
    assert out == expected + "\n" and "plain" in err


def test_until_the_context_ends(capsys: pytest.CaptureFixture, tiny_model_path: Path, tiny_model: Model) -> None:
    # the grammar keeps the model from ending the text itself
    flags = ("-c", 256, "-t", 1, "--temp", 0, "-p", "in the", "--grammar", 'root ::= "a"{300}')
    # the logits of the last token that fits give one more
    n_out = 256 - len(tiny_model.tokenize("in the")) + 1
    assert run(capsys, "generate", "-m", tiny_model_path, *flags, "-n", -1) == (0, "a" * n_out + "\n", "")
    result = run(capsys, "generate", "-m", tiny_model_path, *flags, "-n", 300)
    n_in = 256 - n_out + 1
    # all 256 cells, and the token that came of the last one's logits
    what = f"it holds 256 tokens, {n_in} of the prompt and {n_out - 1} generated; give a larger -c, or -n -1"
    assert result == (1, "a" * n_out + "\n", f"llamamix: The context is full: {what} to end there.\n")


def test_the_log_is_shown_on_request(tiny_model_path: Path) -> None:
    result = subprocess.run(command(*generate(tiny_model_path, "-p", "x", "-v")), capture_output=True)
    assert result.returncode == 0
    assert b"llama_model_loader" in result.stderr and b"llama_model_loader" not in result.stdout


#
# pull and demo
#


def test_pull_lists_and_prints_the_path(capsys: pytest.CaptureFixture, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMAMIX_CACHE", str(tmp_path))
    code, out, err = run(capsys, "pull", "--list", "-o", "json")
    assert (code, err) == (0, "")
    assert [(r["name"], r["kind"], r["bytes"], r["path"]) for r in json.loads(out)] == [
        ("smollm2-135m", "model", 98_362_432, ""),
        ("gemma3-270m", "model", 253_113_024, ""),
        ("botchan", "text", 278_779, ""),
    ]
    monkeypatch.setattr(llamamix.pull, "pull", lambda name, progress: tmp_path / f"{name}.file")
    assert run(capsys, "pull", "botchan") == (0, f"{tmp_path}/botchan.file\n", "")


def test_pull_list_in_units(capsys: pytest.CaptureFixture) -> None:
    lines = run(capsys, "pull", "--list")[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert rows[0][:4] == ["name", "kind", "size", "license"]
    # 98362432, 253113024 and 278779 bytes
    assert [row[:3] for row in rows[2:]] == [
        ["smollm2-135m (smollm2)", "model", "93.8 MiB"],
        ["gemma3-270m (gemma3)", "model", "241.4 MiB"],
        ["botchan", "text", "272.2 KiB"],
    ]


def table_rows(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return {name: cells for name, *cells in lines}


def test_demo(capsys: pytest.CaptureFixture, smollm2_path: Path, botchan_path: Path) -> None:
    flags = ("-p", 300, "-n", 8, "-c", 512, "-t", 1)
    code, out, err = run(capsys, "demo", *flags, "--kv-mixed", "hot=128,group=32")
    assert (code, err) == (0, "")
    text, said_of_it, tables = out.split("\n\n", 2)
    assert text.strip()
    rows = table_rows(tables)
    assert rows["tokens in"] == ["300", "300", ""]
    n_out, n_out_plain = map(int, rows["tokens out"][:2])
    n_same = int(rows["the same"][0])
    assert 1 <= n_out <= 8 and 1 <= n_out_plain <= 8 and 0 <= n_same <= min(n_out, n_out_plain)
    hot, hot_size = map(int, rows["hot cells (f16)"][0].split(" of "))
    cold, cold_size = map(int, rows["cold cells (iq4_nl)"][0].split(" of "))
    assert (hot_size, cold_size) == (128, 512 - 128) and hot + cold == 300 + n_out
    assert rows["tokens moved"] == [str(cold)] and int(rows["migrations"][0]) >= cold / 32
    # 30 layers, 3 heads of 64: 23040 bytes a token in F16, 6480 in IQ4_NL, 11520 of means for each page of 128 cells
    expected, plain = 128 * 23040 + 384 * 6480 + 3 * 11520, 512 * 23040
    assert rows["KV MiB"] == [f"{expected / 2**20:.1f}", f"{plain / 2**20:.1f}", f"× {expected / plain:.2f}"]

    with Model(smollm2_path) as model:
        tokens = model.tokenize(botchan_path.read_text(encoding="utf-8"))[:300]
        with Context(model, n_ctx=512, n_threads=1, kv_mixed=False) as context:
            for _ in context.generate(tokens, 8, SamplingParams(temperature=0, repeat_penalty=1.1)):
                pass
            rest = model.detokenize(context.memory.held.tokens(0)[300 + n_same :]).strip()
    assert said_of_it.lstrip("\n") == f"A plain cache continues with the same {n_same} tokens" + (
        f", and then otherwise: {rest}" if rest else "."
    )


def test_the_difference_in_words(tiny_model: Model) -> None:
    perf = PerfData(1, 1, 0, 0.0, 1.0, 1.0)
    the, of, to = (tiny_model.tokenize(word, add_special=False)[-1] for word in ("the", "of", "to"))

    def words(mixed: list[int], plain: list[int]) -> str:
        runs = (DemoRun(9, tuple(tokens), perf, None) for tokens in (mixed, plain))
        return difference(tiny_model, *runs)

    assert words([the, of], [the, of]) == "A plain cache continues with the same 2 tokens.\n\n"
    rest = tiny_model.detokenize([to, the]).strip()
    expected = f"A plain cache continues with the same 1 tokens, and then otherwise: {rest}\n\n"
    assert words([the, of], [the, to, the]) == expected
    assert words([the, of], [the]) == "A plain cache continues with the same 1 tokens, and ends there.\n\n"


#
# how it ends
#


def start(tiny_model_path: Path, **options: object) -> subprocess.Popen:
    flags = ("-t", 1, "-c", 8192, "-n", 8000, "--temp", 0, "-p", "in the")
    return subprocess.Popen(command("generate", "-m", tiny_model_path, *flags), stdout=subprocess.PIPE, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_ctrl_c(tiny_model_path: Path) -> None:
    process = start(tiny_model_path, stderr=subprocess.PIPE)
    assert process.stdout.read(1)  # it is generating
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, b"")


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes like these")
def test_a_reader_that_goes_away(tiny_model_path: Path) -> None:
    process = start(tiny_model_path, stderr=subprocess.PIPE)
    assert process.stdout.read(1)
    process.stdout.close()
    started = time.monotonic()
    err = process.stderr.read()
    assert (process.wait(20), err) == (141, b"")
    assert time.monotonic() - started < 20
    process.stderr.close()
