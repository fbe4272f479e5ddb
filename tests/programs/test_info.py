"""llamamix info: bytes worked out by hand, and how they are shown."""

from __future__ import annotations

import csv
import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from helpers.command import assert_error, in_terminal, run
from helpers.tiny_model import write_tiny_model

from llamamix import PRESETS, Context, Model
from llamamix.display import n_bytes


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
    assert run(capsys, "info", tiny_model_path)[1] == forms["md"]  # no terminal

    assert len(json.loads(run(capsys, "info", tiny_model_path, "-o", "json", "--kv-mixed", "off")[1])) == 3


def test_info_in_units(capsys: pytest.CaptureFixture, tiny_model_path: Path) -> None:
    # 2 layers, 2 KV heads of 64: a token has 512 elements
    caption, _, *table = run(capsys, "info", tiny_model_path, "-c", 1 << 20)[1].splitlines()
    size = n_bytes(tiny_model_path.stat().st_size)
    assert caption == f"tiny: llama, {size}, 2 layers, 4 heads, 2 of K and V"
    assert len(table) == 2 + 3 + len(PRESETS) and len({len(line) for line in table}) == 1
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0] == ["KV cache", "a token", "1048576 tokens", "of f16"]
    assert rows[2:5] == [
        ["f16", "1.0 KiB", "1.0 GiB", "1.000"],
        ["q8_0", "544 B", "544.0 MiB", "0.531"],
        ["q4_0", "288 B", "288.0 MiB", "0.281"],
    ]
    assert [row[0] for row in rows[5:]] == [f"mixed {name}" for name in PRESETS]


def test_units() -> None:
    expected = {
        0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 23040: "22.5 KiB", 1023948: "999.9 KiB", 1023949: "1.0 MiB",
        10**6: "976.6 KiB", 2**30: "1.0 GiB", 15 * 2**39: "7.5 TiB", 2**60: "1024.0 PiB",
    }  # fmt: skip
    assert {n: n_bytes(n) for n in expected} == expected


@pytest.mark.parametrize("columns", [40, 80])
def test_info_fits_the_terminal(tiny_model_path: Path, columns: int) -> None:
    screen = in_terminal("info", tiny_model_path, columns=columns)
    assert screen.code == 0 and max(map(len, screen.lines)) <= columns
    # 8192 tokens; numbers are not broken
    assert any(line.split() == ["q8_0", "544", "B", "4.2", "MiB", "0.531"] for line in screen.lines)


def test_info_reads_no_weights_and_no_python_reader(tiny_model_path: Path, gemma3_path: Path) -> None:
    """What took seconds: Python's reader of GGUF files goes through the vocabulary, here one of 262 thousand tokens."""
    code = (
        "import sys; from llamamix.cli import main; code = main(['info', sys.argv[1]]);"
        " assert 'gguf' not in sys.modules; sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-c", code, gemma3_path], check=True, stdout=subprocess.DEVNULL)
    # 0.8 s of an Intel Xeon at 2.1 GHz, of which 0.5 are libllama's vocabulary; it was 10 s
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 3


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
    content = tiny_model_path.read_bytes()
    for n in (0, 4, 20, 100, 5000):
        (tmp_path / "cut.gguf").write_bytes(content[:n])
        assert_error(run(capsys, "info", tmp_path / "cut.gguf"), 1, "not a GGUF file")
    (tmp_path / "cut.gguf").write_bytes(content[:-1])
    expected = f"is not complete: it has {len(content) - 1} bytes of {len(content)}"
    assert_error(run(capsys, "info", tmp_path / "cut.gguf"), 1, expected)
    assert_error(run(capsys, "generate", "-m", tmp_path / "cut.gguf", "-p", "x"), 1, expected)
