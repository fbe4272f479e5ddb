"""--kv-mixed and its variables in llama.cpp's programs, and what the flags for the cache's types mean beside it."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import environment, find_program, library_dir
from helpers.tiny_model import write_tiny_model

from llamamix import PRESETS, Context, KVMixedParams, Model, ParamsError
from llamamix.params import resolve_kv_mixed
from llamamix.server import Server

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)

COMPLETE = ("-c", 1024, "-t", 1, "-n", 4, "-p", "the of and", "-no-cnv", "--temp", 0, "--no-warmup")


def run(program: str, *args: object, **variables: str | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, [find_program(program), *args])), env=environment(**variables), capture_output=True, text=True, errors="replace",
        timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def complete(model: Path, *args: object, **variables: str | None) -> list[str]:
    """What the log of llama-completion says about the mixed cache."""
    done = run("llama-completion", "-m", model, *COMPLETE, *args, **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split("llama_kv_mixed: ", 1)[1] for line in done.stderr.splitlines() if "llama_kv_mixed: " in line]


def cells(lines: list[str]) -> tuple[int, str] | None:
    """Hot cells and the type of cold ones, as the log has them; None: the cache is a plain one."""
    found = [re.match(r"mixed KV cache: (\d+) hot cells of f16, \d+ cold cells of (.+?);", line) for line in lines]
    matches = [match for match in found if match]
    return (int(matches[0][1]), matches[0][2]) if matches else None


#
# the same texts everywhere
#

DEFAULT = (512, "iq4_nl")
TEXTS = {
    "1": DEFAULT,
    "on": DEFAULT,
    "default": DEFAULT,
    "quality": (512, "K q5_0, V iq4_nl"),
    "memory": (256, "iq4_nl"),
    "memory,cold=q8_0": (256, "q8_0"),
    "hot=128": (128, "iq4_nl"),
    "hot=auto": DEFAULT,
    " on ": DEFAULT,
    "0": None,
    "off": None,
    "": None,
    " ": None,
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_means_the_same_everywhere(tiny_model_path: Path, tiny_model: Model, text: str) -> None:
    expected = TEXTS[text]
    assert cells(complete(tiny_model_path, "--kv-mixed", text)) == expected
    assert cells(complete(tiny_model_path, LLAMA_ARG_KV_MIXED=text)) == expected
    assert cells(complete(tiny_model_path, LLAMA_KV_MIXED=text)) == expected

    (row,) = bench(tiny_model_path, "-p", 1024, "--kv-mixed", text)
    in_bench = resolve_kv_mixed(row.get("kv_mixed", "off"))
    params = KVMixedParams.parse(text)
    assert params == resolve_kv_mixed(text)
    if expected is None:
        assert params is None and in_bench is None
    with Context(tiny_model, n_ctx=1024, kv_mixed=text) as context:
        found = context.kv_mixed
        for mixed in (found, in_bench):
            k, v = (mixed.type_cold_k, mixed.type_cold_v) if mixed else ("", "")
            assert (mixed and (mixed.hot, k if k == v else f"K {k}, V {v}")) == expected


def test_python_takes_values_too(tiny_model: Model) -> None:
    for value, hot in ((True, 512), (False, None), (None, None), (KVMixedParams(hot=128), 128), ("memory", 256)):
        with Context(tiny_model, n_ctx=1024, kv_mixed=value) as context:
            assert (context.kv_mixed and context.kv_mixed.hot) == hot


def test_which_one_wins(tiny_model_path: Path) -> None:
    """The flag, then its own variable, then the library's."""
    variables = {"LLAMA_KV_MIXED": "hot=64", "LLAMA_ARG_KV_MIXED": "hot=128"}
    assert cells(complete(tiny_model_path, "--kv-mixed", "hot=256", **variables)) == (256, "iq4_nl")
    assert cells(complete(tiny_model_path, **variables)) == (128, "iq4_nl")
    assert complete(tiny_model_path, "--kv-mixed", "off", **variables) == []
    (row,) = bench(tiny_model_path, "--kv-mixed", "hot=16", LLAMA_KV_MIXED="hot=32")
    assert row["kv_mixed"] == "hot=16,cold=iq4_nl"


@pytest.mark.parametrize("spec", ["hot=many", "fast", "off,hot=3", "hot=0"])
def test_a_mistake_is_refused_with_its_reason(tiny_model_path: Path, spec: str) -> None:
    with pytest.raises(ParamsError) as raised:
        KVMixedParams.parse(spec)
    reason = str(raised.value).split(": ", 1)[1].rstrip(".")
    for program in ("llama-completion", "llama-server", "llama-perplexity", "llama-bench"):
        done = run(program, "-m", tiny_model_path, "--kv-mixed", spec)
        assert done.returncode != 0
        if not (program == "llama-bench" and spec == "off,hot=3"):  # two caches there: see below
            assert reason in done.stderr + done.stdout


@pytest.mark.parametrize("program", ["llama-server", "llama-completion", "llama-cli", "llama-perplexity", "llama-bench"])
def test_help_has_the_flag_and_the_presets(program: str) -> None:
    text = run(program, "--help").stdout
    start = text.index("--kv-mixed")
    entry = " ".join(text[start : start + 2000].split())
    for name in PRESETS:
        assert name in entry
    if program != "llama-bench":
        assert all(" ".join(preset.what.split()) in entry for preset in PRESETS.values())
        assert "(env: LLAMA_ARG_KV_MIXED)" in entry


#
# llama-bench: several in one run
#


def bench(model: Path, *args: object, **variables: str | None) -> list[dict[str, str]]:
    flags = ("-p", 32, "-n", 0) if "-p" not in args else ("-n", 0)
    done = run("llama-bench", "-m", model, *flags, "-r", 1, "-t", 1, "--no-warmup", "-o", "csv", *args, **variables)
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(io.StringIO(done.stdout)))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["off,hot=16"], None),  # "off" has no parameters
        (["off,on"], ["off", "hot=256,cold=iq4_nl"]),  # no more than the context
        (["off,memory,hot=8,quality,hot=16"], ["off", "hot=8,cold=iq4_nl", "hot=16,cold_k=q5_0,cold_v=iq4_nl"]),
        (["hot=8;hot=16,cold=q8_0;off"], ["hot=8,cold=iq4_nl", "hot=16,cold=q8_0", "off"]),
        (["hot=8", "--kv-mixed", "0"], ["hot=8,cold=iq4_nl", "off"]),
    ],
)
def test_bench_multiplies_its_values(tiny_model_path: Path, args: list[str], expected: list[str] | None) -> None:
    if expected is None:
        done = run("llama-bench", "-m", tiny_model_path, "-p", 32, "-n", 0, "--kv-mixed", *args)
        assert done.returncode == 1 and "off" in done.stderr
        return
    rows = bench(tiny_model_path, "-p", "16,32", "-d", 0, "--kv-mixed", *args)
    assert [(row["kv_mixed"], row["n_prompt"]) for row in rows if row["n_prompt"] == "32"] == [(e, "32") for e in expected]
    assert len(rows) == 2 * len(expected)


def test_bench_fills_each_cache_by_itself(tiny_model_path: Path) -> None:
    """llama-bench keeps the state of a depth for the next test, and a cache would get tokens as another one divides them."""
    flags = ("-p", 100, "-n", 0, "-d", 300, "-r", 2, "-t", 1, "--no-warmup", "--kv-mixed", "hot=64;hot=128")
    done = run("llama-bench", "-m", tiny_model_path, *flags, LLAMA_KV_MIXED_TRACE="1")
    assert done.returncode == 0, done.stderr
    moved = []  # by the cells of hot, and tokens
    for line in done.stderr.splitlines():
        if "initialized" in line:
            moved.append([int(re.search(r"hot=0/(\d+)", line)[1]), 0])
        elif line.startswith("[MIXED_CACHE] Moving "):
            moved[-1][1] += int(line.split()[2])
    assert [n_hot for n_hot, _ in moved] == [64, 128]
    for n_hot, n_tokens in moved:
        # the depth once, as the second repetition gets the state of the first, and the prompt's room twice
        assert 300 - n_hot + 200 <= n_tokens <= 500


def test_bench_says_why_there_is_no_context(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "narrow.gguf", head_size=48)  # no multiple of 32
    done = run("llama-bench", "-m", model, "-p", 32, "-n", 0, "--kv-mixed", "hot=16")
    assert done.returncode == 1
    assert "error: cold_k=q4_0 stores blocks of 32 values, and the head size 48 of layer 0 is not a multiple" in done.stderr


#
# -ctk and -ctv of a quantised type
#


@pytest.mark.parametrize("flash", ["on", "off", "auto"])
def test_a_quantised_cache_type_is_that_of_cold(tiny_model_path: Path, flash: str) -> None:
    lines = complete(tiny_model_path, "-ctk", "q8_0", "-ctv", "q5_1", "-fa", flash, "--kv-mixed", "1")
    assert lines[0] == "the cache type q8_0 of K is that of its cold rows, the others are f16"
    assert lines[1] == "the cache type q5_1 of V is that of its cold rows, the others are f16"
    assert cells(lines) == (512, "K q8_0, V q5_1")


def test_a_cold_type_in_the_spec_wins(tiny_model_path: Path) -> None:
    lines = complete(tiny_model_path, "-ctk", "q8_0", "-ctv", "q8_0", "--kv-mixed", "cold_k=q4_0")
    assert lines[0].startswith("the cache type q8_0 of K is not used: the parameters of the mixed cache name q4_0 for its cold rows")
    assert lines[1] == "the cache type q8_0 of V is that of its cold rows, the others are f16"
    assert cells(lines) == (512, "K q4_0, V q8_0")


def test_in_bench_and_in_python(tiny_model_path: Path, tiny_model: Model) -> None:
    rows = bench(tiny_model_path, "-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on", "--kv-mixed", "off,memory,hot=16")
    assert [row["kv_mixed"] for row in rows] == ["off", "hot=16,cold=q8_0"]
    with Context(tiny_model, n_ctx=1024, type_k="q8_0", type_v="q5_1", kv_mixed=True, flash_attn="off") as context:
        stats = context.stats
        assert (stats.type_hot_k, stats.type_hot_v, stats.type_cold_k, stats.type_cold_v) == ("f16", "f16", "q8_0", "q5_1")
    # the types of one context are not those of the next
    with Context(tiny_model, n_ctx=1024, kv_mixed=True) as context:
        assert (context.kv_mixed.type_cold_k, context.kv_mixed.type_cold_v) == ("iq4_nl", "iq4_nl")
    with Context(tiny_model, n_ctx=1024, type_k="q8_0", kv_mixed=False) as context:
        assert context.stats is None


@pytest.mark.parametrize("arch", ["llama", "gemma4", "lfm2"])
def test_the_same_logits_by_either_way(tmp_path: Path, arch: str) -> None:
    """With layers that have a sliding window or are recurrent as well: what is not cold is F16."""
    tokens = [1, *range(10, 310)]
    ways: list[dict[str, Any]] = [
        {"type_k": "q8_0", "type_v": "q4_0", "kv_mixed": "hot=64"},
        {"kv_mixed": "hot=64,cold_k=q8_0,cold_v=q4_0"},
    ]
    found = []
    with Model(write_tiny_model(tmp_path / "tiny.gguf", arch=arch, n_layer=4, n_embd=256)) as model:
        for params in ways:
            with Context(model, n_ctx=512, n_threads=1, **params) as context:
                context.decode(tokens)
                stats = context.stats
                assert stats.cold_used > 200
                found.append((context.logits[-1].tobytes(), stats.bytes_hot, stats.bytes_cold, stats.bytes_rest))
    assert found[0] == found[1]


LLAMA_CPP = """
import json, sys
import llama_cpp

model, params = json.loads(sys.argv[1])
llama = llama_cpp.Llama(model, verbose=True, n_ctx=1024, n_threads=1, n_threads_batch=1, **params)
llama.eval([1, 5, 6])
"""


@needs_llama_cpp
def test_in_llama_cpp_python(tiny_model_path: Path) -> None:
    params: dict[str, Any] = {"type_k": 8, "type_v": 8}  # GGML_TYPE_Q8_0
    command = [sys.executable, "-c", LLAMA_CPP, json.dumps([str(tiny_model_path), params])]
    env = environment(LLAMA_CPP_LIB_PATH=str(library_dir()), LLAMA_KV_MIXED="1")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split("llama_kv_mixed: ", 1)[1] for line in done.stderr.splitlines() if "llama_kv_mixed: " in line]
    assert cells(lines) == (512, "q8_0")


#
# sequences that share hot
#


@pytest.mark.parametrize(
    ("n_ctx", "n_parallel", "spec", "hot"),
    [
        (32768, 4, "1", 2048),  # 512 each
        (8192, 4, "1", 1024),  # an eighth of the context
        (8192, 4, "hot=512", 512),  # as it was asked for
        (8192, 4, "memory", 256),
        (4096, 1, "1", 512),
        (2048, 4, "1", 512),  # no less than that
        (256, 4, "1", 256),  # no more than there is
    ],
)
def test_hot_for_sequences_that_share_it(
    tiny_model: Model, caplog: pytest.LogCaptureFixture, n_ctx: int, n_parallel: int, spec: str, hot: int
) -> None:
    params = {"n_ctx": n_ctx, "n_seq_max": n_parallel, "kv_unified": True}
    with caplog.at_level(logging.INFO, "llamamix"), Context(tiny_model, kv_mixed=spec, **params) as context:
        stats = context.stats
    assert (stats.hot_size, stats.hot_size + stats.cold_size) == (hot, n_ctx)

    lines = [text for text in caplog.messages if text.startswith("llama_kv_mixed: ")]
    if n_parallel == 1:
        assert "share" not in lines[0]
        return
    assert f"; {n_parallel} sequences share hot" in lines[0]
    if hot > 512:
        with Context(tiny_model, kv_mixed="hot=512", **params) as context:
            more = stats.bytes_hot + stats.bytes_cold - context.stats.bytes_hot - context.stats.bytes_cold
        text = f", which has {hot // n_parallel} cells for each of them and takes {more / 2**20:.1f} MiB more than with 512 for all"
        assert text in lines[0]
    else:
        assert "for each of them" not in lines[0]


def test_streams_have_their_own_hot(tiny_model: Model, caplog: pytest.LogCaptureFixture) -> None:
    params = {"n_ctx": 8192, "n_seq_max": 4, "kv_unified": False, "kv_mixed": True}
    with caplog.at_level(logging.INFO, "llamamix"), Context(tiny_model, **params) as context:
        assert context.stats.hot_size == 4 * 512
    assert "512 hot cells of f16, 1536 cold cells of iq4_nl, for each of 4 sequences; " in caplog.text


def test_the_default_of_llama_server(tiny_model_path: Path) -> None:
    """Four slots and one unified cache, unless asked otherwise."""
    log: list[str] = []
    flags = ["-m", str(tiny_model_path), "-c", "8192", "-t", "1", "--port", "0", "--no-warmup"]
    with Server(flags, KVMixedParams(), program=find_program("llama-server"), on_line=log.append) as server:
        server.wait_ready(60.0)
    (begin,) = [line for line in log if "mixed KV cache: " in line]
    assert "1024 hot cells" in begin and "; 4 sequences share hot, which has 256 cells for each of them" in begin
