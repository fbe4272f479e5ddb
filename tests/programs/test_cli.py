"""The command line: what goes where, exit codes, and numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
from helpers.tiny_model import write_tiny_model

import llamamix.pull
from llamamix import PRESETS, Context, Model, SamplingParams
from llamamix.cli import main

GREEDY = SamplingParams(temperature=0)


def run(capsys: pytest.CaptureFixture, *args: object) -> tuple[int, str, str]:
    try:
        code = main([str(a) for a in args])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    return code, out, err


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "llamamix", *map(str, args)]


def assert_error(result: tuple[int, str, str], code: int, text: str) -> None:
    assert result[0] == code and result[1] == ""
    lines = result[2].splitlines()
    assert len(lines) == 1 and lines[0].startswith("llamamix: ") and text in lines[0]


#
# the command itself
#


def test_help_and_version_need_no_library(tmp_path: Path, tiny_model_path: Path) -> None:
    environment = os.environ | {"LLAMAMIX_LIB_PATH": str(tmp_path)}
    expected = {
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
        (),
        ("no-such-command",),
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
    assert_error(run(capsys, "info", tmp_path), 1, "can not be read")
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
    code, out, err = run(capsys, "generate", "-m", tiny_model_path, *flags, "-n", 300)
    assert (code, out) == (1, "a" * n_out) and "the context holds" in err


def test_the_log_is_shown_on_request(tiny_model_path: Path) -> None:
    result = subprocess.run(command(*generate(tiny_model_path, "-p", "x", "-v")), capture_output=True)
    assert result.returncode == 0
    assert b"llama_model_loader" in result.stderr and b"llama_model_loader" not in result.stdout


#
# info
#


def test_info_by_hand(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    # 3 layers, 2 KV heads of 64: a token has 3 * 2 * (64 + 64) = 768 elements
    path = write_tiny_model(tmp_path / "m.gguf", n_layer=3, n_head=4, n_head_kv=2, head_size=64, n_ctx_train=2048)
    per_token = {"f16": 768 * 2, "q8_0": 768 // 32 * 34, "q4_0": 768 // 32 * 18}
    code, out, err = run(
        capsys, "info", path, "-c", 1000, "-o", "json", "--kv-mixed", "hot=200,cold_k=q8_0,cold_v=q4_0"
    )
    assert (code, err) == (0, "")
    records = json.loads(out)
    shape = {"arch": "llama", "n_layer": 3, "n_head": 4, "n_head_kv": 2, "head_k": 64, "head_v": 64, "n_ctx": 1024}
    assert all({key: record[key] for key in shape} == shape for record in records)
    assert {r["kv_cache"]: (r["bytes_per_token"], r["bytes"]) for r in records[:3]} == {
        name: (n, n * 1024) for name, n in per_token.items()
    }
    cold = 3 * 2 * (64 // 32 * 34 + 64 // 32 * 18)
    means = 3 * 2 * 64 * 2 * 7  # of K, in as many pages of 128 cells
    total = 200 * per_token["f16"] + 824 * cold + means
    assert records[3]["kv_cache"] == "mixed hot=200,cold_k=q8_0,cold_v=q4_0,group=128,threshold=0.8,sink=4"
    assert (records[3]["bytes_per_token"], records[3]["bytes"]) == (cold, total)
    assert records[3]["ratio"] == total / (per_token["f16"] * 1024)

    with (
        Model(path) as model,
        Context(model, n_ctx=1000, n_threads=1, kv_mixed="hot=200,cold_k=q8_0,cold_v=q4_0") as context,
    ):
        assert context.stats.bytes_total == total
        assert context.stats.bytes_plain == records[0]["bytes"]


def test_info_forms(capsys: pytest.CaptureFixture, tiny_model_path: Path) -> None:
    forms = {form: run(capsys, "info", tiny_model_path, "-o", form)[1] for form in ("md", "json", "jsonl", "csv")}
    records = json.loads(forms["json"])
    assert records[0]["n_ctx"] == 8192 and len(records) == 3 + len(PRESETS)
    assert [json.loads(line) for line in forms["jsonl"].splitlines()] == records
    assert "\r" not in forms["csv"]
    rows = list(csv.DictReader(io.StringIO(forms["csv"])))
    assert rows == [{key: str(value) for key, value in record.items()} for record in records]
    lines = forms["md"].splitlines()
    assert len(lines) == 2 + 3 + len(PRESETS) and len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == list(records[0])

    assert len(json.loads(run(capsys, "info", tiny_model_path, "-o", "json", "--kv-mixed", "off")[1])) == 3


def test_info_of_other_shapes(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    def info(name: str, **keys: object) -> list[dict]:
        path = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, "some")
        writer.add_context_length(256)
        writer.add_embedding_length(512)
        for key, value in keys.items():
            if isinstance(value, list):
                writer.add_array(f"some.{key}", value)
            else:
                writer.add_uint32(f"some.{key}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return json.loads(run(capsys, "info", path, "-o", "json")[1])

    # layers without attention keep no K and V; the head size comes from the embedding
    hybrid = info("hybrid", **{"block_count": 4, "attention.head_count": 8, "attention.head_count_kv": [0, 2, 0, 4]})
    assert hybrid[0]["bytes_per_token"] == (2 + 4) * (64 + 64) * 2
    # as many KV heads as heads when the file does not say
    plain = info("plain", **{"block_count": 2, "attention.head_count": 8})
    assert plain[0]["bytes_per_token"] == 2 * 8 * 128 * 2
    # the last layers use the K and V of others
    shared = info("shared", **{"block_count": 4, "attention.head_count": 8, "attention.shared_kv_layers": 3})
    assert shared[0]["bytes_per_token"] == 8 * 128 * 2
    # with MLA, V is a part of K
    mla = {"attention.key_length": 576, "attention.value_length": 512, "attention.key_length_mla": 192}
    mla = info("mla", **{"block_count": 2, "attention.head_count": 8, "attention.head_count_kv": 1} | mla)
    assert mla[0]["bytes_per_token"] == 2 * 576 * 2
    recurrent = info("recurrent", **{"block_count": 2, "attention.head_count": 0})
    assert [r["bytes"] for r in recurrent] == [0] * (3 + len(PRESETS))


def test_info_of_heads_that_blocks_do_not_divide(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", n_layer=1, head_size=48)
    assert_error(run(capsys, "info", path), 1, "a head of 48")


def test_info_of_what_is_no_model(capsys: pytest.CaptureFixture, tmp_path: Path, tiny_model_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("This is not a model.")
    assert_error(run(capsys, "info", tmp_path / "text.gguf"), 1, "not a GGUF file")
    for n_bytes in (0, 4, 20, 100, 5000):
        (tmp_path / "cut.gguf").write_bytes(tiny_model_path.read_bytes()[:n_bytes])
        assert_error(run(capsys, "info", tmp_path / "cut.gguf"), 1, "not a GGUF file")


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


def test_demo(capsys: pytest.CaptureFixture, smollm2_path: Path, botchan_path: Path) -> None:
    code, out, err = run(capsys, "demo", "-p", 300, "-n", 8, "-c", 512, "--kv-mixed", "hot=128,group=32")
    assert (code, err) == (0, "")
    text, _, table = out.partition("\n\n")
    assert text.strip()
    rows = {row.split("│")[1].strip(): row.split("│")[2].strip() for row in table.splitlines() if row.startswith("│")}
    n_out = int(rows["tokens out"])
    assert rows["tokens in"] == "300" and 1 <= n_out <= 8
    hot, hot_size = map(int, rows["hot cells (f16)"].split(" of "))
    cold, cold_size = map(int, rows["cold cells (iq4_nl)"].split(" of "))
    assert (hot_size, cold_size) == (128, 512 - 128) and hot + cold == 300 + n_out
    assert rows["tokens moved"] == str(cold) and int(rows["migrations"]) >= cold / 32
    mixed, plain = (float(rows[name].split()[0]) for name in ("KV cache", "all of it in f16"))
    # 30 layers, 3 heads of 64: 23040 bytes a token in F16, 6480 in IQ4_NL, 11520 of means for each page of 128 cells
    expected = 128 * 23040 + 384 * 6480 + 3 * 11520
    assert plain == round(512 * 23040 / 2**20, 1)
    assert mixed == round(expected / 2**20, 1)
    assert float(rows["ratio"]) == pytest.approx(expected / (512 * 23040), abs=5e-4)


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
