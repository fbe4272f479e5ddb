#!/usr/bin/env python3
"""Runs the tests of others on our libllama, with the mixed KV cache off and on, and puts the counts side by side.

    python tools/peer_tests.py                     # all; builds what it needs in build/peer
    python tools/peer_tests.py upstream            # llama.cpp's own tests that use a KV cache
    python tools/peer_tests.py llama-cpp-python    # the binding's own test suite (the package must be installed)

Each of llama.cpp's tests runs once per model: for every architecture a tiny one that test-llama-archs writes, and
SmolLM2 where a test wants a real one. A model that the library refuses a mixed cache is counted once as not applicable
(n/a), and the reason listed. Exits 1 when something fails with the mixed cache that does not without it.

stdout carries the table; everything said along the way, reasons and failures, goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamamix import LlamamixError
from llamamix.cli._errors import exit_code
from llamamix.cli._output import FORMS, render
from llamamix.pull import pull

ROOT = Path(__file__).resolve().parent.parent
# small, so that the tests' short texts migrate
_HOT = "hot=16,group=4,sink=2"
# the last 9 tokens of a sequence stay together, for the states that are kept of them
_HOT_ROLLBACK = "hot=48,group=12,sink=2"
_HOT_PYTHON = "hot=4,group=2,sink=1"
# it switches causal attention off for batches of 64 tokens, and such a batch has to fit in hot
_HOT_ARCHS = "hot=96,group=24,sink=2"
CONFIGS: dict[str, str | None] = {"off": None, "q4_0": "cold=q4_0", "f16": "cold=f16"}

_BY_MODEL = {"test-save-load-state": _HOT, "test-recurrent-state-rollback": _HOT_ROLLBACK}
_ARCHS = "test-llama-archs"
# tests of one real model, with the arguments that upstream's CMake gives them
_WITH_REAL_MODEL: dict[str, list[str]] = {
    "test-state-restore-fragmented": ["-m", "{model}"],
    "test-thread-safety": ["-m", "{model}", "-p", "The meaning of life is", *"-n 128 -c 256 -ub 32 -np 4 -t 2".split()],
    "test-autorelease": ["{model}"],
}
_TIMEOUT = 300  # seconds for one program
# what the library says of a model that can have none
_REFUSED = re.compile(r"no mixed KV cache [^\n]*|cold_[kv]=\w+ stores blocks [^\n]*|no layer of this model attends [^\n]*")
_ANSI = re.compile(r"\033\[[\d;]*m")
_STATUS = re.compile(r"\b(PASS|FAIL|SKIP|OK)\b")

# what a cache that loses precision does not have to do
_LOSSLESS_ONLY = {
    "test_shorter_prompt_prefix_reuse_matches_fresh": "it wants a prefix that has been cold to give the very text of one"
    " that never was, and Q4_0 rows differ",
}

# stands in for the hub: nothing is downloaded
_PLUGIN = """
import os
import huggingface_hub, pytest

def hf_hub_download(repo_id, filename, **_options):
    if filename.startswith("tinyllamas/"):
        return os.environ["PEER_MODEL"]
    pytest.skip(f"asks for {filename}")

huggingface_hub.hf_hub_download = hf_hub_download
"""


@dataclass(frozen=True)
class Outcome:
    """Of one program on one model: counts of passed, failed, skipped and n/a, and the reason of the last."""

    counts: dict[str, int]
    reason: str = ""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


#
# llama.cpp's tests
#


class Upstream:
    """The patched tree's tests, built in a folder of their own."""

    def __init__(self, build: Path) -> None:
        self.bin = build / "bin"
        self._models = build / "test-models"

    def build(self) -> None:
        folder = self.bin.parent
        programs = [*_BY_MODEL, _ARCHS, *_WITH_REAL_MODEL]
        say(f"building {', '.join(programs)}")
        _must(["cmake", "--preset", "cpu", "-B", folder, "-DLLAMA_BUILD_TESTS=ON"], cwd=ROOT)
        _must(["cmake", "--build", folder, "--target", *programs], cwd=ROOT)
        if not list(self._models.glob("*.gguf")):
            self._models.mkdir(exist_ok=True)
            _must([self.bin / _ARCHS, "-o", self._models])

    def run(self, spec: str | None) -> Iterator[tuple[str, str, Outcome]]:
        """(program, model, outcome) of everything."""
        models = sorted(self._models.glob("*.gguf"))
        by_hot = {hot: spec and f"{hot},{spec}" for hot in (_HOT, _HOT_ROLLBACK, _HOT_ARCHS)}
        for program, hot in _BY_MODEL.items():
            spec = by_hot[hot]
            for model in models:
                with tempfile.TemporaryDirectory() as folder:
                    (Path(folder) / model.name).symlink_to(model)
                    code, output = self._call(program, ["--models", folder, "-t", "1"], spec, folder)
                rows = [line for line in output.splitlines() if line.startswith(model.name)]
                statuses = [m[1] for row in rows for m in _STATUS.finditer(row)]
                if code != 0:  # with several models it says nothing but the table
                    output += self._call(program, ["-m", str(model), "-t", "1"], spec)[1]
                yield program, model.stem, self._outcome(code, output, statuses, [model], spec)
        spec = by_hot[_HOT_ARCHS]
        for arch in sorted({re.sub(r"-(dense|moe)$", "", m.stem) for m in models}):
            code, output = self._call(_ARCHS, ["-a", f"^{re.escape(arch)}$"], spec)
            statuses = _summary(output)
            own = [m for m in models if re.sub(r"-(dense|moe)$", "", m.stem) == arch]
            yield _ARCHS, arch, self._outcome(code, output, statuses, own, spec)
        spec = by_hot[_HOT]
        real = pull("smollm2")
        for program, args in _WITH_REAL_MODEL.items():
            code, output = self._call(program, [arg.format(model=real) for arg in args], spec)
            yield program, real.name, self._outcome(code, output, [], [real], spec)

    def _call(self, program: str, args: list[str], spec: str | None, cwd: str | None = None) -> tuple[int, str]:
        with tempfile.TemporaryDirectory() as folder:  # some leave files where they run
            return _run([self.bin / program, *args], spec, cwd or folder)

    def _outcome(self, code: int, output: str, statuses: list[str], models: list[Path], spec: str | None) -> Outcome:
        reason = ""
        if spec and code != 0:
            # a program that crashes may not have written why, so the library is asked as well
            found = _REFUSED.search(output)
            reason = found[0] if found else next(filter(None, (refusal(model, spec) for model in models)), "")
            if reason:
                return Outcome({"n/a": 1}, reason)
            if "is too small to corrupt" in output and statuses.count("FAIL") == 1:
                statuses = ["PASS"] * statuses.count("PASS")
                return Outcome({"passed": len(statuses), "n/a": 1}, "its quantised state is too small to be damaged")
        kinds = {"OK": "passed", "PASS": "passed", "FAIL": "failed", "SKIP": "skipped"}
        counts = Counter(kinds[status] for status in statuses)
        if code != 0 and not counts["failed"]:
            counts["failed"] += 1
            reason = reason or f"exit code {code}: {(output.strip().splitlines() or [''])[-1]}"
        elif not statuses:
            counts["passed"] += 1
        return Outcome(dict(counts), reason)


def _summary(output: str) -> list[str]:
    """The statuses of test-llama-archs, whose table is torn apart by its log, from its last line."""
    found = re.search(r"^Summary: (?:all )?(\d+) test\(s\) (?:passed|executed, (\d+) failed)", output, re.M)
    n, n_failed = (int(group or 0) for group in found.groups()) if found else (0, 0)
    return ["OK"] * (n - n_failed) + ["FAIL"] * n_failed


def refusal(model: Path, spec: str) -> str:
    """Why a model can not have a mixed cache, "" when it can."""
    program = (
        "import sys; from llamamix import Context, LlamamixError, Model\n"
        "try:\n    Context(Model(sys.argv[1]), n_ctx=256, n_threads=1, kv_mixed=sys.argv[2])\n"
        "except LlamamixError as error:\n    print(error)"
    )
    output = subprocess.run([sys.executable, "-c", program, model, spec], capture_output=True, text=True).stdout
    found = _REFUSED.search(output)
    return found[0] if found else ""


#
# llama-cpp-python's tests
#


class LlamaCppPython:
    """The test suite of the pinned release, from its source archive."""

    def __init__(self, build: Path, lib: Path) -> None:
        self._folder = build / "llama-cpp-python"
        self._lib = lib

    def prepare(self) -> None:
        for package in ("llama_cpp", "scipy", "huggingface_hub", "pytest"):
            if importlib.util.find_spec(package) is None:
                raise LlamamixError(f"llama-cpp-python's tests need the package {package}, and it is not installed.")
        archive = _must([sys.executable, ROOT / "tools" / "vendor.py", "fetch"]).strip()
        self._folder.mkdir(parents=True, exist_ok=True)
        wanted = re.compile(r"[^/]+/(tests/.*|vendor/llama\.cpp/models/ggml-vocab-llama-spm\.gguf)")
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and wanted.fullmatch(member.name):
                    target = self._folder / member.name.partition("/")[2]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
        (self._folder / "peer_hub.py").write_text(_PLUGIN)

    def run(self, spec: str | None) -> Iterator[tuple[str, str, Outcome]]:
        env = {
            "LLAMA_CPP_LIB_PATH": str(self._lib), "PEER_MODEL": str(pull("smollm2")), "PYTHONPATH": str(self._folder),
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-p", "peer_hub", "-p", "no:cacheprovider", "-v", "-rs", "tests"]
        _, output = _run(command, spec and f"{_HOT_PYTHON},{spec}", self._folder, env)
        found = re.findall(r"^(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED)", output, re.M)
        if not found:
            raise LlamamixError(f"llama-cpp-python's tests can not be run: {output.strip().splitlines()[-1]}.")
        for name, status in found:
            kind = {"PASSED": "passed", "SKIPPED": "skipped"}.get(status, "failed")
            reason = next((why for test, why in _LOSSLESS_ONLY.items() if test in name), "")
            if kind == "failed" and reason and spec == CONFIGS["q4_0"]:
                yield "llama-cpp-python", name, Outcome({"n/a": 1}, reason)
            else:
                yield "llama-cpp-python", name, Outcome({kind: 1})
        if spec is None:
            for reason in sorted(set(re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", output, re.M))):
                say(f"llama-cpp-python: skipped what {reason}")


#
# running
#


def _must(command: list[Any], cwd: Path | None = None) -> str:
    """The stdout of a command that has to succeed."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if result.returncode != 0:
        last = ((result.stdout + result.stderr).strip().splitlines() or ["it wrote nothing"])[-1]
        raise LlamamixError(f"{Path(command[0]).name} ended with code {result.returncode}: {last}.")
    return result.stdout


def _run(command: list[Any], spec: str | None, cwd: Any, extra: dict[str, str] | None = None) -> tuple[int, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "GGML_"))}
    env |= (extra or {}) | ({"LLAMA_KV_MIXED": spec} if spec else {})
    try:
        result = subprocess.run(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=_TIMEOUT, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, f"not finished after {_TIMEOUT} s"
    return result.returncode, _ANSI.sub("", result.stdout)


def compare(suites: list[Any], configs: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The table, and what passes without the mixed cache but not with it."""
    totals: dict[str, dict[str, Counter[str]]] = {}
    outcomes: dict[tuple[str, str], dict[str, Outcome]] = {}
    for suite in suites:
        for config in configs:
            say(f"running {type(suite).__name__} with the cache {config}")
            for program, model, outcome in suite.run(CONFIGS[config]):
                totals.setdefault(program, {}).setdefault(config, Counter()).update(outcome.counts)
                outcomes.setdefault((program, model), {})[config] = outcome
    worse = []
    for (program, model), by_config in outcomes.items():
        for config, outcome in by_config.items():
            if outcome.reason:
                say(f"{program} {model} {config}: {outcome.reason}")
            if outcome.counts.get("failed", 0) > by_config["off"].counts.get("failed", 0):
                worse.append(f"{program} of {model} with the cache {config}")
    records = []
    for program, by_config in totals.items():
        record: dict[str, Any] = {"test": program}
        for config in configs:
            for kind in ("passed", "failed", "skipped", "n/a"):
                if kind != "n/a" or config != "off":
                    record[f"{config} {kind}"] = by_config[config][kind]
        records.append(record)
    return records, worse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The tests of others with the mixed KV cache off and on.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="upstream, llama-cpp-python (default: both)")
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "peer", help="default: build/peer")
    parser.add_argument("--configs", default=",".join(CONFIGS), metavar="LIST", help="default: off,q4_0,f16")
    parser.add_argument("-o", "--output", choices=FORMS, default="md", help="default: md")
    return parser


def _main(args: argparse.Namespace) -> int:
    wanted, configs = args.suites or ["upstream", "llama-cpp-python"], args.configs.split(",")
    unknown = [s for s in wanted if s not in ("upstream", "llama-cpp-python")] + [c for c in configs if c not in CONFIGS]
    if unknown or configs[0] != "off":
        say(f"peer_tests.py: {unknown[0]} is unknown." if unknown else "peer_tests.py: --configs must begin with off.")
        return 2
    build = args.build_dir.resolve()
    upstream = Upstream(build)
    upstream.build()
    os.environ["LLAMAMIX_LIB_PATH"] = str(upstream.bin)
    suites: list[Any] = [upstream] if "upstream" in wanted else []
    if "llama-cpp-python" in wanted:
        suites.append(LlamaCppPython(build, upstream.bin))
        suites[-1].prepare()
    records, worse = compare(suites, configs)
    print(render(records, args.output), end="")
    if worse:
        raise LlamamixError(f"{len(worse)} fail only with the mixed KV cache: {'; '.join(worse)}.")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(_main, _parser().parse_args()))
