#!/usr/bin/env python3
"""Runs the tests with libllama under sanitizers.

    python tools/sanitize.py asan               # addresses and undefined behaviour; assertions are on
    python tools/sanitize.py tsan               # data races; two threads compute, without OpenMP
    python tools/sanitize.py asan --quick       # the part of them that CI runs
    python tools/sanitize.py asan tests/cache/test_cache.py -x  # what pytest takes: files first, then options

It builds the preset of that name (minutes, the first time) and runs the tests of the cache, of the attention kernel and
of contexts unless told otherwise. The first finding ends the run. Python itself is not instrumented: the sanitizer's
runtime is loaded before it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# what pytest runs unless told otherwise
TESTS = [
    "tests/cache", "tests/attention/test_attention.py", "tests/attention/test_skip.py", "tests/python/test_context.py",
    "tests/python/test_control.py", "tests/python/test_decoding.py", "tests/python/test_embeddings.py", "tests/python/test_text.py",
]  # fmt: skip

# --quick: files and folders, and what -k takes of them
QUICK = {
    # each of them once, without the long ones: random histories of a cache, and most of the kernel's cases
    "asan": (
        ["tests/cache", "tests/attention/test_attention.py", "tests/attention/test_quantize.py",
         "tests/attention/test_skip.py", "tests/rpc/test_nodes.py", "tests/rpc/test_fuzz.py"],
        "not test_cache_machine and not emulated and (not any_case or q4_0-q4_0)",
    ),
    # what several threads do at a time: move tokens and compute, read a trace, take turns with a cache
    "tsan": (
        ["tests/cache", "tests/trace", "tests/attention/test_attention.py", "tests/attention/test_skip.py"],
        "two_threads or test_the_ring or overflows or another_thread or threads_take_turns or agree",
    ),
}

# Memory that Python, numpy and the driver of the tests never give back is no finding. An allocation that fails returns
# null, as it does elsewhere: there are tests of that.
OPTIONS = {
    "asan": {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:abort_on_error=1",
    },
    "tsan": {"TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1"},
}

COMPILER = os.environ.get("CXX", "c++")  # as CMake takes it


def ask_compiler(option: str) -> str:
    return subprocess.run([COMPILER, option], capture_output=True, text=True, check=True).stdout.strip()


def is_clang() -> bool:
    return "clang" in ask_compiler("--version")


def finds_use_after_return() -> bool:
    """Whether the compiler puts variables on the sanitizer's stack as they need it.

    GCC bug 110027, fixed in GCC 14: those aligned to 64 bytes are aligned to 32 there, and AVX-512 stops the program.
    """
    return is_clang() or int(ask_compiler("-dumpversion").split(".")[0]) >= 14


def runtime(name: str) -> str:
    """What has to be loaded before Python: the compiler's sanitizer, and what it looks for then.

    Without libstdc++ it finds no __cxa_throw() to pass exceptions on to.
    """
    files = [f"libclang_rt.{name}-{os.uname().machine}.so" if is_clang() else f"lib{name}.so", "libstdc++.so.6"]
    paths = []
    for file in files:
        paths.append(Path(ask_compiler(f"-print-file-name={file}")))
        if not paths[-1].is_absolute():
            sys.exit(f"{COMPILER} has no {file}.")
    return " ".join(str(path.resolve()) for path in paths)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizer", choices=list(OPTIONS))
    parser.add_argument("--no-build", action="store_true", help="take the library as it is")
    parser.add_argument("--quick", action="store_true", help="the part of the tests that CI runs")
    args, pytest_args = parser.parse_known_args()

    if not args.no_build:
        subprocess.run(["cmake", "--preset", args.sanitizer], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["cmake", "--build", "--preset", args.sanitizer, "--target", "llama"], cwd=ROOT, check=True)

    env = os.environ | OPTIONS[args.sanitizer]
    if args.sanitizer == "asan":
        env["ASAN_OPTIONS"] += f":detect_stack_use_after_return={int(finds_use_after_return())}"
    env["LD_PRELOAD"] = runtime(args.sanitizer)
    env["LLAMAMIX_LIB_PATH"] = str(ROOT / "build" / args.sanitizer / "bin")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env["LLAMAMIX_TEST_SANITIZER"] = args.sanitizer
    env["OPENBLAS_NUM_THREADS"] = "1"  # numpy's threads are not instrumented, and would be reported
    # what a sanitizer reports comes out, and is not kept by pytest
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys"]
    if args.quick:
        tests, keywords = QUICK[args.sanitizer]
        command += [*tests, "-k", keywords]
    elif not pytest_args or pytest_args[0].startswith("-"):
        command += TESTS
    return subprocess.run([*command, *pytest_args], cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
