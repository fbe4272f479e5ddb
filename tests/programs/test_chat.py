"""llamamix chat: turns, commands, and what ends what."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from helpers.command import assert_error, command, in_terminal, run
from helpers.tiny_model import write_tiny_model

from llamamix import Context, Model, SamplingParams

GREEDY = SamplingParams(temperature=0)
SPEC = "hot=32,group=8,sink=2"


def flags(path: Path, *args: object) -> tuple:
    return ("chat", "-m", path, "-t", 1, "-c", 512, "--temp", 0, "-n", 12, "--kv-mixed", SPEC, *args)


def chat(path: Path, said: str | bytes, *args: object) -> tuple[list[str], str]:
    """The lines of the answers, and what came beside them; ``said`` is stdin."""
    data = said.encode() if isinstance(said, str) else said
    result = subprocess.run(command(*flags(path, *args)), input=data, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode().splitlines(), result.stderr.decode()


class Expected:
    """The same turns by Context.chat()."""

    def __init__(self, context: Context, system: str | None = None) -> None:
        self.context = context
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.n_in = 0  # tokens that were computed

    def say(self, text: str) -> list[str]:
        self.messages.append({"role": "user", "content": text})
        answer = "".join(self.context.chat(self.messages, 12, GREEDY))
        self.messages.append({"role": "assistant", "content": answer})
        self.n_in += self.context.memory.seq_pos_max() + 1 - self.context.n_kept - 12
        return answer.splitlines()


@pytest.fixture
def context(tiny_model: Model):
    with Context(tiny_model, n_ctx=512, n_threads=1, kv_mixed=SPEC, swa_full=False) as context:
        yield context


def test_turns_are_those_of_a_context(tiny_model_path: Path, context: Context) -> None:
    expected = Expected(context, "Be brief.")
    texts = [expected.say(text) for text in ("in the", "of the\nand", "to a")]
    assert all(texts)
    kept = context.n_kept
    n_held = context.memory.seq_pos_max() + 1
    answers, err = chat(tiny_model_path, "in the\nof the\\\nand\n\nto a\n/stats\n", "-sys", "Be brief.")
    assert answers == [line for text in texts for line in text]
    (found,) = re.findall(r"last turn: (\d+) tokens kept, (\d+) computed, (\d+) generated", err)
    assert kept > 0 and list(map(int, found)) == [kept, n_held - kept - 12, 12]
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in err.splitlines() if line.startswith("│")}
    assert rows["tokens out"] == "36" and int(rows["tokens in"]) == expected.n_in
    stats = context.stats
    assert rows["cold cells (iq4_nl)"] == f"{stats.cold_used} of {stats.cold_size}" and stats.cold_used > 0
    assert rows["tokens moved"] == str(stats.n_tokens_moved)


def test_clear_undo_and_retry(tiny_model_path: Path, tiny_model: Model) -> None:
    # a plain cache: a mixed one that goes back keeps in cold what it moved, and so may answer otherwise
    with Context(tiny_model, n_ctx=512, n_threads=1, kv_mixed=False) as context:
        expected = Expected(context)
        first, second = expected.say("in the"), expected.say("of the")
    said = "in the\n/undo\nin the\nof the\n/retry\n/clear\nin the\n/undo\n/undo\n/retry\n/nope 1\n"
    answers, err = chat(tiny_model_path, said, "--kv-mixed", "off")
    assert answers == [*first, *first, *second, *second, *first]
    assert err.splitlines() == [
        "Forgotten; 0 messages are left.",
        "Forgotten.",
        "Forgotten; 0 messages are left.",
        "There is no message yet.",
        "There is no message yet.",
        "There is no /nope; /help lists what there is, and a space before it makes it a message.",
    ]


def test_trace(tiny_model_path: Path, context: Context) -> None:
    expected = Expected(context)
    expected.say("in the")
    n_migrations = context.stats.n_migrations
    _, err = chat(tiny_model_path, "/trace\nin the\n/trace\n")
    line = r"^[\d.]+ s migrate: (\d+) tokens \((\d+) to (\d+)\), \d+ µs; hot \d+, cold (\d+)$"
    moved = [tuple(map(int, match)) for match in re.findall(line, err, re.MULTILINE)]
    assert len(moved) == n_migrations > 0
    # the first two tokens are sinks, and all others move in turn
    n_cold = 0
    for n, first, last, cold in moved:
        assert (first, last, cold) == (2 + n_cold, 1 + n_cold + n, n_cold + n)
        n_cold += n
    assert n_cold == context.stats.n_tokens_moved
    assert "the cache is a plain one" in chat(tiny_model_path, "/trace\n", "--kv-mixed", "off")[1]


def test_help_and_quit(tiny_model_path: Path) -> None:
    answers, err = chat(tiny_model_path, "/help\n/quit\nin the\n")
    assert answers == []
    assert re.findall(r"^(/\w+)", err, re.MULTILINE) == [
        "/help", "/stats", "/trace", "/retry", "/undo", "/clear", "/quit",
    ]  # fmt: skip
    assert chat(tiny_model_path, "/exit\nin the\n") == chat(tiny_model_path, "/bye\nin the\n") == ([], "")
    assert chat(tiny_model_path, "") == ([], "")


def test_what_is_wrong_with_a_message_ends_nothing(tiny_model_path: Path, context: Context) -> None:
    expected = Expected(context)
    first, second = expected.say("in the"), expected.say("of the")
    answers, err = chat(tiny_model_path, b"in the\n\xff\xfe\nof the\n")
    assert answers == [*first, *second] and err == "The message is not UTF-8 text.\n"

    long = "x" * 600  # a token each
    answers, err = chat(tiny_model_path, f"in the\n{long}\nof the\n")
    assert answers == [*first, *second]
    assert err == (
        "The conversation does not fit into the context of 512 tokens: /undo or /clear makes room, -c more of it.\n"
    )


def test_an_answer_that_fills_the_context(tiny_model_path: Path) -> None:
    grammar = ("--grammar", 'root ::= "a"{400}', "-n", -1, "-c", 256)
    answers, err = chat(tiny_model_path, "in the\nof the\n/clear\nin the\n", *grammar)
    assert len(answers) == 2 and answers[0] == answers[1] and 100 < len(answers[0]) < 256
    assert err.count("does not fit into the context of 256 tokens") == 3  # both answers, and what follows the first


def test_models_without_a_template(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", chat_template=None)
    assert_error(run(capsys, *flags(path)), 1, "has no chat template")
    answers, _ = chat(path, "in the\n", "--chat-template", "chatml")
    assert answers


def test_ctrl_c_stops_the_answer_only(tiny_model_path: Path) -> None:
    steps = []

    def on_text(text: str, terminal: int) -> None:
        if not steps and "> " in text:
            steps.append("asked")
            os.write(terminal, b"in the\n")
        elif steps == ["asked"] and "aaaaa" in text:
            steps.append("stopped")
            os.write(terminal, b"\x03")
        elif steps == ["asked", "stopped"] and "(stopped)" in text and text.endswith("> "):
            steps.append("at the prompt")
            time.sleep(0.5)  # a signal just before readline waits for a key is noticed with the next key
            os.write(terminal, b"\x03")
        elif len(steps) == 3 and "(Ctrl-D or /quit ends)" in text and text.endswith("> "):
            steps.append("left")
            os.write(terminal, b"/stats\n/quit\n")

    args = ("chat", "-m", tiny_model_path, "-t", 1, "-c", 8192, "-n", 1900, "--temp", 0)
    args += ("--grammar", 'root ::= "a"{1900}')
    screen = in_terminal(*args, on_text=on_text, columns=100)
    assert (screen.code, steps) == (0, ["asked", "stopped", "at the prompt", "left"])
    n_said = max(len(run_of_a) for run_of_a in re.findall("a+", re.sub(r"\^C|\r\n", "", screen.written)))
    (n_out,) = re.findall(r"0 tokens kept, \d+ computed, (\d+) generated", screen.written)
    assert 5 <= int(n_out) == n_said < 1900


def test_ctrl_d_ends(tiny_model_path: Path) -> None:
    sent = []

    def on_text(text: str, terminal: int) -> None:
        if not sent and text.endswith("> "):
            sent.append(os.write(terminal, b"\x04"))

    screen = in_terminal(*flags(tiny_model_path), on_text=on_text)
    assert screen.code == 0 and screen.lines[0].startswith("tiny.gguf. /help lists commands")
