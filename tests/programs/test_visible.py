"""What llama.cpp's programs show of the mixed cache: their logs, llama-server's endpoints, llama-bench's column."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT
from helpers.processes import environment, find_program, library_dir

from llamamix import Context, KVMixedParams, Model
from llamamix.server import Server

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)

SPEC = "hot=64,group=16,sink=4"
N_CTX = 512
DEADLINE = 60.0  # seconds

PROMPT = "the of and to a in " * 40


def run(
    program: str, model: Path, *args: object, code: int = 0, **variables: str | None
) -> subprocess.CompletedProcess[str]:
    command = [find_program(program), "-m", model, *args]
    result = subprocess.run(
        list(map(str, command)), env=environment(**variables), capture_output=True, text=True, errors="replace", timeout=300,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == code, result.stderr[-2000:]
    return result


def complete(model: Path, *args: object, n_prompt_words: int = 60, **variables: str | None) -> str:
    """The log of llama-completion of a prompt and eight more tokens."""
    prompt = " ".join(["the"] * n_prompt_words)
    flags = ("-c", N_CTX, "-t", 1, "-n", 8, "-p", prompt, "-no-cnv", "--temp", 0, "--no-warmup")
    return run("llama-completion", model, *flags, *args, **variables).stderr


def ours(log: str) -> list[str]:
    """The lines about the mixed cache, without what the program puts before them."""
    return [line.split("llama_kv_mixed: ", 1)[1] for line in log.splitlines() if "llama_kv_mixed: " in line]


def stats_of(model: Model, spec: str, n_ctx: int = N_CTX, **params: Any) -> Any:
    with Context(model, n_ctx=n_ctx, n_threads=1, kv_mixed=spec, **params) as context:
        return context.stats


#
# the log
#


def test_a_line_at_the_beginning_and_at_the_end(tiny_model_path: Path, tiny_model: Model) -> None:
    begin, end = ours(complete(tiny_model_path, LLAMA_KV_MIXED=SPEC, n_prompt_words=100))
    stats = stats_of(tiny_model, SPEC)
    n_bytes, n_plain = stats.bytes_hot + stats.bytes_cold, stats.bytes_plain
    size = f"{n_bytes / 2**20:.1f} MiB, {n_bytes / n_plain:.3f} of the {n_plain / 2**20:.1f} MiB of f16 alone"
    assert begin == f"mixed KV cache: 64 hot cells of f16, 448 cold cells of iq4_nl; {size}"

    # 101 tokens of the prompt (BOS is one), 7 of the 8 that follow are decoded
    pattern = r"the mixed KV cache ends: (\d+) of 64 hot and (\d+) of 448 cold cells in use; (\d+) migrations moved (\d+) tokens"
    hot, cold, migrations, moved = map(int, re.match(pattern, end).groups())
    assert (hot + cold, cold, migrations) == (108, moved, -(-moved // 16)) and moved > 0
    assert end.endswith(size)


@pytest.mark.parametrize("variable", [None, "", "0", "off"])
def test_nothing_when_it_is_off(tiny_model_path: Path, variable: str | None) -> None:
    log = complete(tiny_model_path, "-lv", 5, LLAMA_KV_MIXED=variable)
    assert "mixed" not in log.replace("kv-mixed", "")  # the command line may be in the log


def test_the_types_of_k_and_v_and_a_context_that_fits_in_hot(tiny_model_path: Path) -> None:
    begin, _ = ours(complete(tiny_model_path, "-ctk", "f32", LLAMA_KV_MIXED="cold_k=q8_0,hot=128,attn=compose"))
    assert begin.startswith("mixed KV cache: 128 hot cells of K f32, V f16, 384 cold cells of K q8_0, V iq4_nl; ")
    begin, end = ours(complete(tiny_model_path, LLAMA_KV_MIXED="1"))
    assert begin.startswith("mixed KV cache: 512 hot cells of f16, no cold ones: the context fits in hot; ")
    assert "0 of 0 cold cells in use; 0 migrations moved 0 tokens in 0.0 ms" in end


def test_perplexity_too(tiny_model_path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the of and to a in " * 100)
    log = run("llama-perplexity", tiny_model_path, "-f", text, "-c", 256, "-t", 1, LLAMA_KV_MIXED=SPEC).stderr
    assert len(ours(log)) == 2


@pytest.mark.parametrize("name", ["LLAMA_KV_MIX", "LLAMA_KV_MIXD", "LLAMA_KVMIXED", "llama_kv_mixed", "LLAMA_MIXED_KV"])
def test_a_variable_with_a_mistake(tiny_model_path: Path, name: str) -> None:
    log = complete(tiny_model_path, **{name: "1"})
    warnings = [line for line in log.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and f"the variable {name} is not known" in warnings[0]
    assert "LLAMA_KV_MIXED," in warnings[0]
    assert ours(log) == []


def test_variables_without_one(tiny_model_path: Path) -> None:
    known = {"LLAMA_KV_MIXED": "0", "LLAMA_ARG_KV_MIXED": "0", "LLAMA_KV_MIXED_TRACE": "0", "LLAMA_ARG_KV_OFFLOAD": "0"}
    assert "warning: " not in complete(tiny_model_path, **known)


def test_version(tiny_model_path: Path) -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    for program in ("llama-server", "llama-completion", "llama-perplexity", "llama-bench"):
        done = subprocess.run([find_program(program), "--version"], capture_output=True, text=True, errors="replace", timeout=60)
        assert f"llamamix: {version}\n" in done.stderr + done.stdout


#
# the trace
#

LLAMA_CPP = """
import json, sys
from llama_cpp import Llama

model, prompt = json.loads(sys.argv[1])
llama = Llama(model, verbose=False, n_ctx=512, n_threads=1, n_threads_batch=1)
llama.eval(prompt)
"""


def check_trace(log: str, level: int) -> None:
    lines = [line for line in log.splitlines() if line.startswith("[MIXED_CACHE")]
    assert lines[0] == "[MIXED_CACHE_DEBUG] initialized: hot=0/64 (0.0%), cold=0/448 (0.0%)"
    moves = [line for line in lines if line.startswith("[MIXED_CACHE] Moving ")]
    tokens = [line for line in lines if line.startswith("[MIXED_CACHE] Quantizing token ")]
    assert len(moves) >= 3
    counts = [int(line.split()[2]) for line in moves]
    assert max(counts) == 16  # of hot=64 with group=16; fewer where new tokens leave fewer that can move
    if level == 1:
        assert lines[1:] == moves
        pattern = (
            r"\[MIXED_CACHE\] Moving \d+ tokens to cold cache \(IQ4_NL quantization\): (threshold|room), "
            r"positions (\d+) to (\d+), \d+ us, hot=(\d+)/64 \(\d+\.\d%\), cold=(\d+)/448 \(\d+\.\d%\)"
        )
        n_moved = 0
        for line, n in zip(moves, counts, strict=True):
            _, first, last, hot, cold = re.fullmatch(pattern, line).groups()
            assert (int(first), int(last)) == (4 + n_moved, 4 + n_moved + n - 1)  # the sinks stay
            n_moved += n
            assert int(cold) == n_moved and int(hot) <= 64
    else:
        assert moves == [f"[MIXED_CACHE] Moving {n} tokens to cold cache (IQ4_NL quantization)" for n in counts]
        assert tokens == [f"[MIXED_CACHE] Quantizing token {i}: FP16 -> IQ4_NL" for n in counts for i in range(n)]
        assert sum("quantization completed" in line for line in lines) == len(moves)


@pytest.mark.parametrize("level", [1, 2])
def test_trace_in_completion(tiny_model_path: Path, level: int) -> None:
    check_trace(complete(tiny_model_path, n_prompt_words=100, LLAMA_KV_MIXED=SPEC, LLAMA_KV_MIXED_TRACE=f"{level}"), level)


def test_trace_off(tiny_model_path: Path) -> None:
    for value in (None, "", "0", "off"):
        log = complete(tiny_model_path, n_prompt_words=100, LLAMA_KV_MIXED=SPEC, LLAMA_KV_MIXED_TRACE=value)
        assert "[MIXED_CACHE" not in log


@pytest.mark.parametrize("level", [1, 2])
def test_trace_in_bench(tiny_model_path: Path, level: int) -> None:
    flags = ("-p", 100, "-n", 0, "-d", 412, "-r", 1, "-t", 1, "--no-warmup")
    done = run("llama-bench", tiny_model_path, *flags, LLAMA_KV_MIXED=SPEC, LLAMA_KV_MIXED_TRACE=f"{level}")
    assert "[MIXED_CACHE" not in done.stdout
    check_trace(done.stderr.split("\n[MIXED_CACHE_DEBUG] initialized")[0], level)


@needs_llama_cpp
@pytest.mark.parametrize("level", [1, 2])
def test_trace_in_llama_cpp_python(tiny_model_path: Path, level: int) -> None:
    command = [sys.executable, "-c", LLAMA_CPP, json.dumps([str(tiny_model_path), [1, *range(10, 110)]])]
    env = environment(LLAMA_CPP_LIB_PATH=str(library_dir()), LLAMA_KV_MIXED=SPEC, LLAMA_KV_MIXED_TRACE=f"{level}")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    check_trace(done.stderr, level)


#
# llama-server
#


class Client:
    """A server, and the JSON or text of its endpoints."""

    def __init__(self, url: str, log: list[str], stop: Callable[[], int]) -> None:
        self.url, self.log, self.stop = url, log, stop

    def get(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
            text = answer.read().decode()
            return json.loads(text) if "json" in answer.headers["Content-Type"] else text

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics").splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        types = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
        for name in values:
            if "kv_mixed" in name:  # Prometheus: what only grows is a counter, and ends in _total
                assert types[name] == ("counter" if name.endswith("_total") else "gauge")
        return {name.removeprefix("llamacpp:"): float(value) for name, value in values.items()}


@pytest.fixture
def serve(tiny_model_path: Path) -> Iterator[Callable[..., Client]]:
    running = []

    def start(*args: object, spec: str | None = SPEC, n_ctx: int = N_CTX, **variables: str) -> Client:
        log: list[str] = []
        flags = ["-m", tiny_model_path, "-c", n_ctx, "-t", 1, "-tb", 1, "--port", 0, "--no-warmup", "--metrics", *args]
        server = Server(
            list(map(str, flags)), spec and KVMixedParams.parse(spec), program=find_program("llama-server"),
            environment=variables, on_line=log.append,
        )  # fmt: skip
        running.append(server)
        return Client(server.wait_ready(DEADLINE), log, server.stop)

    yield start
    for server in running:
        server.stop()


def test_server_log_and_endpoints(serve: Callable[..., Client], tiny_model: Model) -> None:
    client = serve("-np", 1)
    stats = stats_of(tiny_model, SPEC)

    props = client.get("/props")["kv_mixed"]
    assert KVMixedParams.parse(props["spec"]) == KVMixedParams.parse(f"{SPEC},cold=iq4_nl,cold_size=448")
    assert props == {
        "spec": props["spec"], "hot": 64, "cold_size": 448, "n_stream": 1, "type_hot_k": "f16", "type_hot_v": "f16",
        "type_cold_k": "iq4_nl", "type_cold_v": "iq4_nl", "group": 16, "threshold": 0.8, "sink": 4, "mean": True,
        "attn": "auto", "v_skip": 0.0, "bytes": stats.bytes_hot + stats.bytes_cold, "bytes_plain": stats.bytes_plain,
    }  # fmt: skip

    before = client.metrics()
    assert before["kv_mixed_migrations_total"] == 0 and before["kv_mixed_hot_cells_used"] == 0
    client.get("/completion", prompt=[1, *range(10, 109)], n_predict=9, cache_prompt=True)

    after = client.metrics()
    used = {name: after[f"kv_mixed_{name}_cells_used"] for name in ("hot", "cold")}
    assert sum(used.values()) == 100 + 8  # the last token has not been decoded
    assert after["kv_mixed_tokens_moved_total"] == used["cold"]
    assert after["kv_mixed_migrations_total"] == -(-used["cold"] // 16)  # of no more than that each
    assert used["cold"] > 0 and used["hot"] <= 64
    assert (after["kv_mixed_hot_cells"], after["kv_mixed_cold_cells"]) == (64, 448)
    assert after["kv_mixed_bytes"] == props["bytes"] and after["kv_mixed_plain_bytes"] == props["bytes_plain"]
    assert after["kv_mixed_batches_refused_total"] == 0
    assert 0 < after["kv_mixed_migration_seconds_total"] < DEADLINE

    (slot,) = client.get("/slots")
    assert slot["kv_mixed"] == {
        "n_hot": used["hot"], "n_cold": used["cold"],
        "cache": {
            "hot_used": used["hot"], "hot_size": 64, "cold_used": used["cold"], "cold_size": 448,
            "n_migrations": after["kv_mixed_migrations_total"], "n_tokens_moved": used["cold"], "n_refused": 0,
            "bytes": props["bytes"], "bytes_plain": props["bytes_plain"],
        },
    }  # fmt: skip

    client.stop()
    begin, end = ours("\n".join(client.log))
    assert begin.startswith("mixed KV cache: 64 hot cells of f16, 448 cold cells of iq4_nl; ")
    assert f"{used['hot']:.0f} of 64 hot and {used['cold']:.0f} of 448 cold cells in use" in end


@pytest.mark.parametrize("level", [1, 2])
def test_trace_in_the_server(serve: Callable[..., Client], level: int) -> None:
    client = serve("-np", 1, LLAMA_KV_MIXED_TRACE=f"{level}")
    client.get("/completion", prompt=[1, *range(10, 109)], n_predict=9)
    client.stop()
    check_trace("\n".join(client.log), level)


def test_a_plain_server_shows_nothing(serve: Callable[..., Client]) -> None:
    client = serve("-np", 2, spec=None)
    client.get("/completion", prompt="the", n_predict=3)
    for path in ("/props", "/slots", "/metrics"):
        assert "mixed" not in str(client.get(path))
    client.stop()
    assert ours("\n".join(client.log)) == []


def test_slots_have_their_own_numbers(serve: Callable[..., Client]) -> None:
    for flags, n_hot in ((("-kvu",), 64), ((), 128)):  # one hot for both, or one each
        client = serve("-np", 2, *flags, "--no-cache-idle-slots", n_ctx=1024)
        for slot, n_prompt in enumerate((30, 200)):
            client.get("/completion", prompt=[1] * n_prompt, n_predict=1, id_slot=slot, cache_prompt=True)
        slots = [slot["kv_mixed"] for slot in client.get("/slots")]
        assert [slot["n_hot"] + slot["n_cold"] for slot in slots] == [30, 200]
        assert slots[0]["cache"] == slots[1]["cache"]
        assert sum(slot["n_hot"] for slot in slots) == slots[0]["cache"]["hot_used"] <= n_hot
        assert slots[0]["cache"]["hot_size"] == n_hot
        client.stop()


def test_metrics_while_it_computes(serve: Callable[..., Client]) -> None:
    """They are of before the batch: other threads read them than the one that decodes."""
    client = serve("-np", 1, "--slots", n_ctx=4096)
    request = urllib.request.Request(
        f"{client.url}/completion",
        json.dumps({"prompt": [1] * 100, "n_predict": 2000, "ignore_eos": True, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    seen = []
    with urllib.request.urlopen(request, timeout=DEADLINE) as stream:
        stream.readline()
        while len(seen) < 50:
            metrics, (slot,) = client.metrics(), client.get("/slots")
            seen.append(metrics["kv_mixed_hot_cells_used"] + metrics["kv_mixed_cold_cells_used"])
            cache = slot["kv_mixed"]["cache"]
            assert slot["kv_mixed"]["n_hot"] + slot["kv_mixed"]["n_cold"] == cache["hot_used"] + cache["cold_used"]
            assert seen[-1] <= cache["hot_used"] + cache["cold_used"] <= 2100
    assert seen == sorted(seen) and seen[-1] > seen[0]


#
# llama-bench
#

BENCH = ("-p", 32, "-n", 0, "-r", 1, "-t", 1, "--no-warmup")


def bench(model: Path, *args: object, **variables: str | None) -> list[dict[str, str]]:
    done = run("llama-bench", model, *BENCH, "-o", "csv", *args, **variables)
    return list(csv.DictReader(io.StringIO(done.stdout)))


def test_bench_has_a_column(tiny_model_path: Path) -> None:
    (row,) = bench(tiny_model_path, LLAMA_KV_MIXED="quality,hot=16")
    assert row["kv_mixed"] == "hot=16,cold_k=q5_0,cold_v=iq4_nl"
    lines = run("llama-bench", tiny_model_path, *BENCH, LLAMA_KV_MIXED="hot=16").stdout.splitlines()
    assert len({len(line.replace("±", "+")) for line in lines[:3]}) == 1  # a table with straight edges
    cells = dict(zip(lines[0].split("|"), lines[2].split("|"), strict=True))
    assert {name.strip(): value.strip() for name, value in cells.items()}["kv_mixed"] == "hot=16,cold=iq4_nl"
    done = run("llama-bench", tiny_model_path, *BENCH, "-o", "json", LLAMA_KV_MIXED="hot=16,sink=0,threshold=0.55")
    assert json.loads(done.stdout)[0]["kv_mixed"] == "hot=16,cold=iq4_nl,threshold=0.55,sink=0"


def test_bench_without_it_is_upstreams(tiny_model_path: Path) -> None:
    (row,) = bench(tiny_model_path, LLAMA_KV_MIXED=None)
    assert "kv_mixed" not in row and row["stddev_ts"] is not None and None not in row
    assert "kv_mixed" not in run("llama-bench", tiny_model_path, *BENCH).stdout
