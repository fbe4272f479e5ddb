"""llamamix exec and libdir: the fork's programs as an install has them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import environment, library_dir

from llamamix.programs import PROGRAMS


def run(*args: object, **variables: str | None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llamamix", *map(str, args)]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=120)


def test_libdir() -> None:
    result = run("libdir")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{library_dir()}\n"


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_says_what_it_says_by_itself(name: str) -> None:
    program = library_dir() / name
    if not program.exists():
        pytest.skip(f"{name} is not beside libllama")
    itself = subprocess.run([program, "--help"], env=environment(), capture_output=True, text=True, timeout=120)
    for given in (name, name.removeprefix("llama-")):
        result = run("exec", given, "--help")
        assert (result.returncode, result.stdout) == (itself.returncode, itself.stdout) and itself.stdout


def test_its_exit_code_and_its_arguments(tmp_path: Path) -> None:
    program = tmp_path / "llama-args"
    program.write_text('#!/bin/sh\nprintf "%s|" "$LLAMA_KV_MIXED" "$@"\nexit 7\n')
    program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = run("exec", "args", "-v", "--", "a b", "--help", LLAMA_KV_MIXED="hot=9", PATH=path)
    assert (result.returncode, result.stdout, result.stderr) == (7, "hot=9|-v|--|a b|--help|", "")


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    result = run("exec", "llama-none", PATH="")
    assert (result.returncode, result.stdout) == (1, "")
    there = [name for name in PROGRAMS if (library_dir() / name).exists()]
    if there:
        assert result.stderr == f"llamamix: There is no llama-none; there are {', '.join(there)}.\n"
    for file in library_dir().glob("lib*"):
        (tmp_path / file.name).symlink_to(file)
    result = run("exec", "bench", LLAMAMIX_LIB_PATH=str(tmp_path), PATH="")
    assert result.stderr.startswith("llamamix: There is no llama-bench: this install has the library alone. 'pip install .'")
