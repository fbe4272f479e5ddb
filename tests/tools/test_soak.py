"""tools/soak.py in short, and that it finds what it looks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers.paths import TOOLS
from helpers.processes import environment
from helpers.tools import load_tool

from llamamix import ServerError
from llamamix.server import find_server

pytest.importorskip("openai", reason="the openai package is not installed")

TOOL = TOOLS / "soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    return load_tool("soak")


def test_a_short_soak(tiny_model_path: Path) -> None:
    try:
        program = find_server()
    except ServerError as error:
        pytest.skip(str(error))
    command = [sys.executable, TOOL, "-m", tiny_model_path, "-n", "200", "--seconds", "300", "-o", "json"]
    env = environment(LLAMAMIX_SERVER=str(program))
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-2000:]
    assert [line for line in result.stderr.splitlines() if line.endswith(": ok")] == [
        f"{check}: ok" for check in ("requests", "idle", "probe", "capacity", "memory", "log")
    ]
    (record,) = json.loads(result.stdout)
    assert (record["requests"], record["errors"]) == (200, 0)
    # what the seed draws
    assert (record["cancelled"], record["refused"]) == (19, 6)
    assert record["tokens out"] > 3000 and record["p99 ms"] > record["p50 ms"] > 0


def test_what_is_drawn(soak: ModuleType) -> None:
    prefixes = [[7] * 170, [8] * 170]
    requests = [soak.draw(np.random.default_rng([0, i]), 400, 512, prefixes) for i in range(2000)]
    counts = {kind: sum(r.kind == kind for r in requests) for kind in soak._KINDS}
    assert counts == {k: pytest.approx(20 * n, abs=4 * (20 * n) ** 0.5) for k, n in soak._KINDS.items()}
    for r in requests:
        assert all(3 <= t < 400 for t in r.prompt) and r.n_out >= 1
        assert (len(r.prompt) >= 512) == (r.kind == "too long")
        assert (r.n_read is not None) == (r.kind == "cancel")
        assert (len(r.prompt) + r.n_out > 512) or r.kind not in ("shift", "cancel")
        assert r.prompt[:170] in prefixes or r.kind != "prefix"
    assert requests[0] == soak.draw(np.random.default_rng([0, 0]), 400, 512, prefixes)


@pytest.fixture
def finished(soak: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A soak that is over, of a server whose slots answer and hold what they should."""
    monkeypatch.setattr(soak.Soak, "_text", lambda self, slot, prompt, n_out: "text")
    monkeypatch.setattr(soak.Soak, "_slots", lambda self: [{"is_processing": False, "n_prompt_tokens": 510}] * 4)
    done = soak.Soak(None, 4, 512, 400, 0, None, [])
    done.result.rss = {10: 30.0, 100: 31.0}
    return done


def test_nothing_is_found(finished: Any) -> None:
    assert finished.checks(8) == dict.fromkeys(("idle", "probe", "capacity", "memory", "log"), "")


def test_what_is_found(soak: ModuleType, finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def only(check: str, problem: str) -> None:
        found = finished.checks(8)
        assert {name for name, text in found.items() if text} == {check} and problem in found[check]

    finished.result.rss[100] = 38.5
    only("memory", "grown by 8.5 MiB")
    finished.result.rss[100] = 30.0

    too_long = "0.1 E srv send_error: request (700 tokens) exceeds the available context size (512 tokens)"
    finished._log.append(too_long)
    only("log", "1 prompts were logged as too long, not 0")
    finished.result.n_refused = 1
    finished._log.append("0.2 E llama_decode: failed")
    only("log", "llama_decode: failed")
    finished._log.clear()

    slots = [{"is_processing": False, "n_prompt_tokens": 510}] * 3 + [{"is_processing": False, "n_prompt_tokens": 480}]
    monkeypatch.setattr(soak.Soak, "_slots", lambda self: slots)
    only("capacity", "2010 tokens are held instead of 2040")
    monkeypatch.setattr(soak, "_TIMEOUT", 0.1)
    monkeypatch.setattr(soak.Soak, "_slots", lambda self: [{"is_processing": True, "n_prompt_tokens": 510}] * 4)
    only("idle", "a slot still works")


def test_a_slot_that_answers_otherwise(soak: ModuleType, finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak.Soak, "_text", lambda self, slot, prompt, n_out: "text" if slot != 2 else "tex")
    found = finished.checks(8)
    assert found["probe"] == "slots [2] give another text than at the start"
    assert found["capacity"] == "slots that hold the same give different texts"
