"""The self-test: it passes, and it fails when something is broken."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest

from llamamix import LlamamixError, MixedKVCache, ParamsError, ggml, selftest
from llamamix.cache import KVCache, Tier
from llamamix.cli import main

NAMES = [s.name for s in selftest.SCENARIOS]


@pytest.mark.parametrize("name", NAMES)
def test_documented(name: str) -> None:
    (scenario,) = selftest.choose([name])
    result = scenario.run()
    assert result.checks
    assert [c for c in result.checks if not c.ok] == []


def test_scenarios_show_the_lines_of_the_trace() -> None:
    constructor, trigger = (s.run() for s in selftest.choose(["constructor", "quantization_trigger"]))
    assert constructor.log == (
        "llama_kv_cache_mixed: creating hot KV cache (FP16), size = 32 cells",
        "llama_kv_cache_mixed: creating cold KV cache (quantized), size = 128 cells",
        "[MIXED_CACHE_DEBUG] initialized: hot=0/32 (0.0%), cold=0/128 (0.0%)",
    )
    start = trigger.log.index("[MIXED_CACHE] Moving 4 tokens to cold cache (Q4_0 quantization)") - 3
    assert trigger.log[start : start + 10] == (
        "[MIXED_CACHE_DEBUG] should_quantize: hot cache threshold exceeded",
        "[MIXED_CACHE_DEBUG] trigger_quantization: starting quantization process",
        "[MIXED_CACHE_DEBUG] trigger_quantization: moving tokens to cold cache",
        "[MIXED_CACHE] Moving 4 tokens to cold cache (Q4_0 quantization)",
        *(f"[MIXED_CACHE] Quantizing token {i}: FP16 -> Q4_0" for i in range(4)),
        "[MIXED_CACHE] Quantization batch completed: 4 tokens processed",
        "[MIXED_CACHE_DEBUG] trigger_quantization: quantization completed",
    )


def test_the_log_is_as_it_was_afterwards() -> None:
    log = logging.getLogger("llamamix")
    before = log.level, list(log.handlers)
    selftest.SCENARIOS[0].run()
    assert (log.level, list(log.handlers)) == before


#
# broken
#


def _nothing(*_args: Any, **_options: Any) -> None:
    pass


def _lost(self: Tier, layer: int, cell: int, rows: Any, stream: int = 0) -> None:
    _set_k(self, layer, cell, np.zeros_like(rows) if isinstance(rows, np.ndarray) else rows, stream)


_set_k, _cpy = Tier.set_k, ggml.cpy


# scenarios by what they need to be right
ROWS = {"quantization_trigger", "find_slot_trigger", "sequence_ops", "config_variations"}
CELLS = ROWS | {"basic_ops", "data_storage_and_retrieval"}
TOKENS = CELLS | {"basic_access", "copy_between_caches"}
SEQUENCES = {"sequence_ops"}
COPIES = {"simple_ggml_cpy", "copy_between_caches"}

BREAKS: list[tuple[Any, str, Any, set[str]]] = [
    (KVCache, "clear", _nothing, {"basic_ops"}),
    (KVCache, "commit", _nothing, TOKENS),
    (KVCache, "find_slot", lambda *_: (0,), TOKENS),
    (KVCache, "seq_rm", _nothing, SEQUENCES),
    (KVCache, "seq_cp", _nothing, SEQUENCES),
    (KVCache, "seq_keep", _nothing, SEQUENCES),
    (KVCache, "seq_add", _nothing, SEQUENCES),
    (KVCache, "seq_div", _nothing, SEQUENCES),
    (KVCache, "state_load", _nothing, SEQUENCES),
    (Tier, "set_k", _lost, ROWS | {"copy_between_caches"}),
    (Tier, "_n", lambda *_: 3, TOKENS),
    (Tier, "cells", lambda *_: [], CELLS),
    (Tier, "used", property(lambda _: 1), CELLS | {"constructor"}),
    (ggml, "cpy", lambda src, type: _cpy(src, "q8_0" if type == "q4_0" else type), COPIES),
    (selftest.caches, "migration_lines", lambda _: [], {"quantization_trigger", "find_slot_trigger"}),
]


@pytest.mark.parametrize(("owner", "attribute", "broken", "fails"), BREAKS)
def test_what_is_broken_is_found(
    monkeypatch: pytest.MonkeyPatch, owner: Any, attribute: str, broken: Any, fails: set[str]
) -> None:
    monkeypatch.setattr(owner, attribute, broken)
    assert {s.name for s in selftest.SCENARIOS if not s.run().ok} == fails


def test_every_scenario_can_fail() -> None:
    assert set().union(*(fails for *_, fails in BREAKS)) == set(NAMES)


def test_an_error_ends_a_scenario_as_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any) -> None:
        raise LlamamixError("Out of order.")

    monkeypatch.setattr(MixedKVCache, "stats", property(fail))
    (scenario,) = selftest.choose(["find_slot_trigger"])
    result = scenario.run()
    assert not result.ok
    assert result.checks[-1] == selftest.Check("goes to its end", "no error", "LlamamixError: Out of order.")


#
# command
#


def test_command_prints_what_was_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "  [MIXED_CACHE] Quantizing token 0: FP16 -> Q4_0\n" in out
    assert "  ✓ K of layer 0: [8, 2, 4, 1]\n" in out
    assert "✗" not in out and "\x1b" not in out
    assert out.count("✓ passed\n") == 10 and out.endswith("10 of 10 scenarios passed\n")


def test_command_fails_when_a_check_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(KVCache, "clear", _nothing)
    assert main(["selftest", "constructor", "basic_ops"]) == 1
    out, err = capsys.readouterr()
    assert "  ✗ after clear(): expected hot none, cold none, found hot 8-16, cold 0-7\n" in out
    assert err == "llamamix: 1 of 2 scenarios failed: basic_ops.\n"


def test_command_has_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "basic_access", "-o", "jsonl"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cells = {"expected": "64 of f16/f16", "found": "64 of f16/f16"}
    assert records[0] == {"scenario": "basic_access", "check": "cells", **cells, "ok": True}
    assert len(records) == 14


def test_command_needs_no_unicode(monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    import io
    import sys

    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["selftest", "basic_access"]) == 0
    assert b"  ok cells: 64 of f16/f16\n" in stdout.buffer.getvalue()


def test_unknown_scenarios_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ParamsError, match="nothing is not a scenario; there are constructor, "):
        selftest.choose(["nothing"])
    assert main(["selftest", "nothing"]) == 2
    assert capsys.readouterr().out == ""
