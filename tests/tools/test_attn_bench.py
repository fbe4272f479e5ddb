"""tools/attn_bench.py: that it runs, and that its figures belong together."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helpers.paths import TOOLS

from llamamix.attention import isas

TOOL = TOOLS / "attn_bench.py"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(sys.platform == "win32", reason="needs memchr() of the program's own")
@pytest.mark.parametrize("sequences", ["1", "3"])
def test_figures(sequences: str) -> None:
    result = bench(
        "-s", "64/2/3", "-n", "100,300", "-ctk", "q4_0,f16", "-t", "1", "-r", "2", "-b", sequences, "-o", "json"
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    records = json.loads(result.stdout)
    assert [r["kernel"] for r in records] == [*isas(), "ggml"] * 4
    assert [r["n_kv"] for r in records[:: len(isas()) + 1]] == [100, 100, 300, 300]
    for r in records:
        n_bytes = {"q4_0": 36, "f16": 128}[r["type"]] * 2  # K and V of a cell and head
        assert r["GB/s"] == pytest.approx(n_bytes / r["ns"])
        assert r["share"] > 0 and r["ns"] > 0
        assert r["kernel"] != "ggml" or r["x ggml"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs memchr() of the program's own")
def test_shares_of_v_that_are_not_read() -> None:
    result = bench("-s", "64/2/3", "-n", "1000", "-ctk", "q4_0", "-t", "1", "-r", "1", "--v-skip", "0,0.1", "-o", "json")
    assert result.returncode == 0, result.stderr
    names = [f"{isa}, v_skip={share}" for isa in isas() for share in ("0", "0.1")]
    assert [r["kernel"] for r in json.loads(result.stdout)] == [*names, "ggml"]


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["-s", "64/3"], 2, "must be head size/KV heads/query heads per KV head, not 64/3"),
        (["-n", "0"], 2, "must be whole numbers above 0, not 0"),
        (["-ctk", "q2_k"], 2, "must be of f32, f16"),
        (["--isa", "sse2"], 2, f"must be of {', '.join(isas())}"),
        (["-r", "0"], 2, "-r must be at least 1"),
        (["-b", "0"], 2, "-b must be at least 1"),
        (["--v-skip", "0,1"], 2, "must be shares from 0 to below 1, not 0,1"),
        (["--v-skip", "few"], 2, "must be shares from 0 to below 1, not few"),
        (["-s", "40/1/1", "-n", "8", "-t", "1", "-r", "1"], 1, "which do not divide a row of 40"),
    ],
)
def test_what_can_not_be(arguments: list[str], code: int, reason: str) -> None:
    result = bench(*arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert reason in " ".join(result.stderr.split())
