"""llamamix bench --weights: what is measured, and that its file is made once, or not at all."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from helpers.command import assert_error, in_terminal, run
from helpers.tiny_model import write_tiny_model

from llamamix import Model
from llamamix.bench import read_rows


@pytest.fixture
def q4_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, and a cache folder with nothing in it."""
    monkeypatch.setenv("LLAMAMIX_CACHE", str(tmp_path / "cache"))
    return write_tiny_model(tmp_path / "tiny.Q4_1.gguf", weight_type=gguf.GGMLQuantizationType.Q4_1)


ONE_TEST = ("-p", 0, "-n", 1, "-r", 1, "-t", 1, "-ctk", "f16", "--kv-mixed", "off")


def test_requantised_weights(capsys: pytest.CaptureFixture, tmp_path: Path, q4_1: Path) -> None:
    record = tmp_path / "run.jsonl"
    before = q4_1.read_bytes()
    code, table, err = run(capsys, "bench", "-m", q4_1, *ONE_TEST, "--weights", "q4_0", "--jsonl", record)
    assert (code, err) == (0, "")
    (made,) = (tmp_path / "cache" / "models").iterdir()
    (measured,) = read_rows(record)
    with Model(made) as model:
        assert (measured.model_filename, measured.model_size) == (str(made), model.size)
        assert measured.model_type == model.desc == "llama ?B Q4_0"
    assert table.startswith("model: llama ?B Q4_0, size: ")
    n_bytes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(q4_1).tensors}
    # 18 bytes of a block instead of 20, and 34 in the output matrix
    norms = sum(n for name, n in n_bytes.items() if "norm" in name)
    output = n_bytes["output.weight"]
    others = sum(n_bytes.values()) - norms - output
    assert measured.model_size == norms + output // 20 * 34 + others // 20 * 18

    # the same file again, and the one that was given without the option
    changed = made.stat().st_mtime_ns
    assert run(capsys, "bench", "-m", q4_1, *ONE_TEST, "--weights", "Q4_0", "--jsonl", record)[0] == 0
    assert read_rows(record)[0].model_filename == str(made) and made.stat().st_mtime_ns == changed
    assert run(capsys, "bench", "-m", q4_1, *ONE_TEST, "--jsonl", record)[0] == 0
    assert read_rows(record)[0].model_filename == str(q4_1)
    assert q4_1.read_bytes() == before and list(made.parent.iterdir()) == [made]


def test_requantising_is_shown_on_a_terminal(q4_1: Path) -> None:
    screen = in_terminal("bench", "-m", q4_1, *ONE_TEST, "--weights", "q4_0", columns=120)
    assert screen.code == 0
    assert any("requantising tiny.Q4_1.gguf to q4_0" in line for line in screen.lines)
    assert not any("converting" in line for line in screen.lines)


def test_weights_that_can_not_be_had(
    capsys: pytest.CaptureFixture, tmp_path: Path, q4_1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*ONE_TEST, "--weights", "q4_0")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(q4_1.read_bytes()[:-1000])
    assert_error(run(capsys, "bench", "-m", bad, *flags), 1, "bad.gguf is not complete")
    with monkeypatch.context() as patch:
        patch.setattr("llamamix.weights._quantise", lambda *_args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(capsys, "bench", "-m", q4_1, *flags) == (130, "", "")
    assert list((tmp_path / "cache" / "models").iterdir()) == []
