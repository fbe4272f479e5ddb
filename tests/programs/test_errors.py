"""What goes wrong on the command line: one sentence each, about what was typed, and as early as it can be known."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command import assert_error, command, in_terminal, run
from rich.console import Console

from llamamix import Model
from llamamix.bench import machine
from llamamix.cli._flags import with_flags
from llamamix.grid import grid

COMMANDS = ("generate", "chat", "serve", "rpc-server", "info", "bench", "eval", "pull", "demo", "trace", "selftest")


def one_sentence(result: subprocess.CompletedProcess[bytes], code: int, text: str) -> None:
    assert_error((result.returncode, result.stdout.decode(), result.stderr.decode()), code, text)


#
# arguments
#


def test_nothing_at_all_shows_help(capsys: pytest.CaptureFixture) -> None:
    code, out, err = run(capsys)
    assert (code, err) == (0, "") and all(re.search(rf"^    {name}\s", out, re.M) for name in COMMANDS)


def test_unknown_arguments_show_their_command_s_usage(capsys: pytest.CaptureFixture) -> None:
    code, out, err = run(capsys, "generate", "-m", "x", "-p", "a", "--no-such", "7")
    assert (code, out) == (2, "") and err.startswith("usage: llamamix generate ")
    assert err.splitlines()[-1] == "llamamix generate: error: unrecognized arguments: --no-such 7"


@pytest.mark.parametrize("theirs", ["-fa on", "--jinja", "-ctk q8_0", "-fa on --jinja -ctv q8_0"])
def test_options_of_llama_server_go_behind_dashes(capsys: pytest.CaptureFixture, theirs: str) -> None:
    code, out, err = run(capsys, "serve", "-m", "x", *theirs.split())
    assert (code, out) == (2, "") and err.startswith("usage: llamamix serve ")
    assert err.endswith("; options of llama-server come after --, as in: llamamix serve -m MODEL -- -fa on\n")


def test_what_serve_is_given_is_looked_at_before_llama_server_is(
    capsys: pytest.CaptureFixture, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\nexit 99\n")
    program.chmod(0o755)
    monkeypatch.setenv("LLAMAMIX_SERVER", str(program))
    assert_error(run(capsys, "serve", "-m", tiny_model_path, "-c", "-7"), 2, "-c must be from 0 to")
    assert_error(run(capsys, "serve", "-m", tiny_model_path, "-t", "0"), 2, "-t must be from 1 to 512, not 0.")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_model_path.read_bytes()[:-1])
    assert_error(run(capsys, "serve", "-m", cut), 1, "cut.gguf is not complete")
    monkeypatch.setattr(machine, "memory_available", lambda: 1 << 30)
    assert_error(run(capsys, "serve", "-m", tiny_model_path, "-c", "99999999"), 1, "give a smaller -c.")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("-c -5", "-c must be from 0 to 2147483392, not -5."),
        ("-b 0", "-b must be from 1 to 2147483647, not 0."),
        ("-ub 0", "-ub must be from 1 to 2147483647, not 0."),
        ("-t 0", "-t must be from 1 to 512, not 0."),
        ("-tb 0", "-tb must be from 1 to 512, not 0."),
        ("-ngl -7", "-ngl must be from -1 to 2147483647, not -7."),
        ("-fa maybe", "-fa must be one of auto, off, on, not 'maybe'."),
        ("-ctv q3_k", "-ctv must be one of"),
        ("--kv-mixed warm=1", "--kv-mixed can not be 'warm=1': unknown key 'warm'"),
        ("-n 0", "-n must be -1, or from 1 to 2147483646, not 0."),
        ("--temp -1", "--temp must be from 0 to inf, not -1."),
        ("--typical 9", "--typical must be from 0 to 1, not 9."),
        ("-s -2", "-s must be from 0 to 4294967294, not -2."),
        ('--grammar root::="a" -j {}', "--grammar and --json-schema can not be given together."),
    ],
    ids=lambda value: value if value.startswith("-") else "",
)
def test_parameters_have_the_names_of_flags(
    capsys: pytest.CaptureFixture, tiny_model_path: Path, args: str, sentence: str
) -> None:
    assert_error(run(capsys, "generate", "-m", tiny_model_path, "-p", "x", *args.split()), 2, sentence)


def test_names_of_flags_in_sentences() -> None:
    expected = {
        "n_ubatch, n_batch and n_ctx of n_seq_max (3)": "-ub, -b and -c of n_seq_max (3)",
        "needs flash_attn='off' and kv_mixed=False.": "needs -fa off and --kv-mixed off.",
        "type_k=q4_0 stores blocks": "-ctk q4_0 stores blocks",
        "unknown key 'top_k', or \"n_ctx\"": "unknown key 'top_k', or \"n_ctx\"",  # what somebody typed
        "grammar and the grammar of a seed": "--grammar and the grammar of a seed",
        "top_keys, my_top_k and top-top_k": "top_keys, my_top_k and top-top_k",
    }
    assert {text: with_flags(text) for text in expected} == expected


#
# prompts and contexts
#


def test_a_prompt_that_does_not_fit(capsys: pytest.CaptureFixture, tiny_model_path: Path, tiny_model: Model) -> None:
    text = "x" * 5000
    n = len(tiny_model.tokenize(text))
    assert 256 < n < 8192
    expected = f"The prompt has {n} tokens, and the context holds 256; give -c {-(-(n + 9) // 256) * 256}, or a shorter"
    for name in ("generate", "trace"):
        flags = ("-m", tiny_model_path, "-t", 1, "-c", 256, "-n", 9)
        assert_error(run(capsys, name, *flags, "-p", text), 1, expected)
        assert_error(run(capsys, name, *flags[:-1], -1, "-p", text * 3), 1, "(the model was made for 8192)")


def test_a_prompt_of_nothing(capsys: pytest.CaptureFixture, tiny_model_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Model, "tokenize", lambda *_args, **_options: [])  # a model that begins texts with no token
    assert_error(run(capsys, "generate", "-m", tiny_model_path, "-p", ""), 2, "The prompt is empty.")


@pytest.mark.parametrize(
    ("spec", "n_bytes"),
    [
        # 2 layers, 2 heads of 64, K and V: 1024 bytes of F16 a token, 288 of IQ4_NL, 512 of means of K a page
        ("off", 10**9 * 1024),
        ("default", 512 * 1024 + (10**9 - 512) * 288 + (10**9 - 512) // 128 * 512),
    ],
)
def test_a_context_that_no_memory_holds(
    capsys: pytest.CaptureFixture, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, n_bytes: int
) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: 8 << 30)
    result = run(capsys, "generate", "-m", tiny_model_path, "-p", "x", "-c", 999_999_999, "--kv-mixed", spec)
    expected = f"1000000000 tokens takes {n_bytes / 2**30:.1f} GiB for its KV cache, and 8.0 GiB of memory are free"
    assert_error(result, 1, expected)

    monkeypatch.setattr(machine, "memory_available", lambda: n_bytes)
    asked = []
    monkeypatch.setattr("llamamix.context.Context", lambda *_args, **params: asked.append(params["n_ctx"]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # it would be tried
        run(capsys, "generate", "-m", tiny_model_path, "-p", "x", "-c", 999_999_999, "--kv-mixed", spec)
    assert asked == [999_999_999]


#
# files that a run writes at its end: known to be impossible before a model is looked for
#


@pytest.mark.parametrize("name", ["bench", "eval", "trace"])
def test_files_that_can_not_be_written(capsys: pytest.CaptureFixture, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    new_run = (name, "-m", "no-such-model", *(("-p", "x") if name == "trace" else ()))
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for path, reason in (
        ("no/a.png", "can not be written: No such file or directory."),
        ("file/a.png", "can not be written: Not a directory."),
        ("folder.png", "can not be written: Is a directory."),
        ("a.docx", "can not be drawn: its ending must be one of ."),
        ("a", "can not be drawn: its ending must be one of ."),
    ):
        assert_error(run(capsys, *new_run, "--plot", tmp_path / path), 1, f"{tmp_path / path} {reason}")
    assert_error(run(capsys, *new_run, "--jsonl", tmp_path / "no" / "a"), 1, "--jsonl")
    if name == "trace":
        assert_error(run(capsys, *new_run, "--svg", tmp_path / "no" / "a.svg"), 1, "No such file or directory")
        assert_error(run(capsys, *new_run, "--svg", tmp_path / "a.png"), 1, "--svg writes an SVG picture")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


#
# network
#


def test_no_network(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "LLAMAMIX_CACHE": str(tmp_path),
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",  # discard: nothing listens there
        "PIP_RETRIES": "1",  # what it says when it tries again is the reason
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    assert_error(run(capsys, "pull", "botchan"), 1, "sentencepiece==0.2.0 can not be fetched: there is no network")


#
# standard streams
#


def shell(redirection: str, *args: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    words = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command(*args)]
    return subprocess.run(words, capture_output=True, **options)


def generate(path: Path, *args: object) -> tuple:
    return ("generate", "-m", path, "-t", 1, "-c", 256, "--temp", 0, "-n", 5, *args)


def test_closed_streams(tiny_model_path: Path) -> None:
    expected = shell("", *generate(tiny_model_path, "-p", "in the")).stdout
    assert expected.endswith(b"\n")

    one_sentence(shell("<&-", *generate(tiny_model_path, "-f", "-")), 2, "Standard input is closed, and -f - reads it.")
    one_sentence(shell("<&-", "chat", "-m", tiny_model_path), 2, "Standard input is closed")
    for args in (generate(tiny_model_path, "-p", "in the"), ("--help",), ("pull", "--list")):
        one_sentence(shell(">&-", *args), 1, "Standard output is closed.")

    # nothing that is opened takes their places
    for redirection in ("<&-", "2>&-", "<&- 2>&-"):
        result = shell(redirection, *generate(tiny_model_path, "-p", "in the", "--stats", "-v"))
        assert (result.returncode, result.stdout) == (0, expected)
    assert shell("2>&-", "info", "no-such-model").stdout == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
def test_a_stdout_that_is_full(tiny_model_path: Path) -> None:
    for args in (generate(tiny_model_path, "-p", "in the"), ("info", tiny_model_path)):
        one_sentence(shell(">/dev/full", *args), 1, "The output can not be written: No space left on device.")


def test_text_that_is_not_utf_8(tiny_model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "latin-1.txt"
    file.write_bytes("Gr\u00fc\u00dfe".encode("latin-1"))
    expected = f"{file} is not UTF-8 text (byte 2 is 0xfc); convert it, for example with iconv."
    one_sentence(shell("", *generate(tiny_model_path, "-f", file)), 2, expected)
    one_sentence(shell("", "bench", "-m", tiny_model_path, "-f", file), 2, expected)
    one_sentence(shell("", "eval", "-m", tiny_model_path, "-f", file), 2, expected)
    # whatever the locale's encoding is
    for encoding in ("utf-8", "latin-1"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        result = shell("", *generate(tiny_model_path, "-f", "-"), input=file.read_bytes(), env=environment)
        one_sentence(result, 2, "Standard input is not UTF-8 text (byte 2 is 0xfc)")
    words = [*map(os.fsencode, command(*generate(tiny_model_path))), b"-p", file.read_bytes()]
    one_sentence(subprocess.run(words, capture_output=True), 2, "The text of -p is not UTF-8.")


def test_a_byte_order_mark_and_line_ends_do_not_matter(tiny_model_path: Path, tmp_path: Path) -> None:
    files = {"plain": b"in the\nof the\n", "windows": b"\xef\xbb\xbfin the\r\nof the\r\n"}
    texts = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        texts.append(shell("", *generate(tiny_model_path, "-f", tmp_path / name)).stdout)
    assert texts[0] == texts[1] != b""


def test_a_stdout_without_such_characters(tiny_model_path: Path) -> None:
    words = generate(tiny_model_path, "-p", "in the", "--grammar", 'root ::= "a\u00e9b"')
    result = shell("", *words, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stdout, result.stderr) == (0, b"a?b\n", b"")


#
# Ctrl-C
#


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_ctrl_c_keeps_the_stats(tiny_model_path: Path) -> None:
    flags = ("-t", 1, "-c", 8192, "-n", 1800, "--temp", 0, "-p", "in the", "--stats", "--grammar", 'root ::= "a"{1900}')
    words = command("generate", "-m", tiny_model_path, *flags)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    begin = process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    rows = [line.split("│") for line in err.decode().splitlines()]
    values = {row[1].strip(): row[2].strip() for row in rows if len(row) > 2}
    assert process.returncode == 130 and out.endswith(b"\n") and "Traceback" not in err.decode()
    assert int(values["tokens out"]) == len(begin + out) - 1 < 1800 and values["hot cells (f16)"].endswith("of 512")


def test_ctrl_c_in_a_prompt(tiny_model_path: Path, tmp_path: Path) -> None:
    """Its tokens that were computed are in the statistics, and nothing was generated."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("in the " * 4000)
    pressed = []

    def press(text: str, terminal: int) -> None:
        if "tokens/s" in text and not pressed:  # a ubatch is done, and others are not
            pressed.append(time.monotonic())
            os.write(terminal, b"\x03")

    flags = ("-t", 1, "-c", 32768, "-ub", 64, "--temp", 0, "--stats")
    screen = in_terminal("generate", "-m", tiny_model_path, *flags, "-f", prompt, on_text=press, columns=100)
    assert pressed and screen.code == 130
    rows = [line.split("│") for line in screen.lines]
    values = {row[1].strip(): row[2].strip() for row in rows if len(row) > 2}
    n_in = int(values["tokens in"])
    assert values["tokens out"] == "0" and 64 <= n_in < 8000 and n_in % 64 == 0


#
# narrow terminals
#


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_in_40_columns(name: str) -> None:
    screen = in_terminal(*name.split(), "--help", columns=40)
    assert screen.code == 0 and screen.lines[0].startswith("usage: llamamix")
    assert [line for line in screen.lines[1:] if len(line) > 40] == []


def test_tables_in_40_columns(tiny_model_path: Path) -> None:
    screen = in_terminal(*generate(tiny_model_path, "-p", "in the", "--stats"), columns=40)
    table = [line for line in screen.lines if line.startswith(("│", "┌", "├", "└"))]
    assert screen.code == 0 and max(map(len, table)) <= 40
    assert any(line.startswith("│ time per migration") for line in table) and "…" not in screen.written

    screen = in_terminal("pull", "--list", columns=40)
    assert screen.code == 0 and max(map(len, screen.lines)) <= 40 and "…" not in screen.written


def test_a_table_that_does_not_fit() -> None:
    """Names are folded first, then headings; then a row becomes lines. Numbers stay whole."""
    table = grid("it", [
        ("cache", False, ["mixed hot=512", "f16"]),
        ("tokens per second", True, ["1234.5", "99.0"]),
        ("of all", True, ["", "0.125"]),
    ])  # fmt: skip

    def lines(width: int) -> list[str]:
        console = Console(width=width, file=io.StringIO())
        console.print(table.rich(width))
        printed = console.file.getvalue().splitlines()
        assert max(map(len, printed)) <= width
        return [" ".join(line.split()) for line in printed if line.strip(" \u2500")]

    assert lines(80) == lines(42) == ["it", "cache tokens per second of all", "mixed hot=512 1234.5", "f16 99.0 0.125"]
    # 7 for the longest word of a name, 17 and 6, and two for each
    folded = ["it", "cache tokens per second of all", "mixed 1234.5", "hot=512", "f16 99.0 0.125"]
    assert lines(41) == lines(36) == folded
    assert lines(35)[-2:] == ["mixed hot=512 1234.5", "f16 99.0 0.125"] and "cache second all" in lines(35)
    assert lines(24)[-3:] == ["mixed 1234.5", "hot=512", "f16 99.0 0.125"]
    narrow = lines(23)
    assert {"cache f16", "of all 0.125"} <= set(narrow) and any(line.endswith("1234.5") for line in narrow)
