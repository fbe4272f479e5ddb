"""tools/wheel.py: what it takes for a portable wheel."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from helpers.tools import load_tool

tool = load_tool("wheel")

PROGRAMS = ("llama-server", "llama-cli", "llama-completion", "llama-perplexity", "llama-bench")
WHOLE = [f"llamamix/lib/{name}" for name in (*PROGRAMS, "libllama.so", "libggml-cpu-sse42.so", "libggml-cpu-haswell.so")]


def wheel(folder: Path, names: list[str], tag: str = "manylinux_2_34_x86_64") -> Path:
    path = folder / f"llamamix-0.1.0-py3-none-{tag}.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "")
    return path


def test_a_whole_one(tmp_path: Path) -> None:
    tool.check(wheel(tmp_path, WHOLE))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(tool.WheelError, match=f"has no {name}"):
        tool.check(wheel(tmp_path, [each for each in WHOLE if not each.endswith(name)]))


def test_kernels_for_one_processor(tmp_path: Path) -> None:
    with pytest.raises(tool.WheelError, match="for one kind of processor: llamamix/lib/libggml-cpu-haswell.so"):
        tool.check(wheel(tmp_path, [name for name in WHOLE if "sse42" not in name]))


@pytest.mark.skipif(sys.platform != "linux", reason="the tag is of Linux")
def test_a_tag_of_this_machine_only(tmp_path: Path) -> None:
    with pytest.raises(tool.WheelError, match="has no manylinux tag"):
        tool.check(wheel(tmp_path, WHOLE, "linux_x86_64"))


def test_it_is_built_for_no_processor_in_particular() -> None:
    options = tool.portable_options()
    assert (options["GGML_NATIVE"], options["GGML_CPU_ALL_VARIANTS"], options["LLAMA_OPENSSL"]) == ("OFF", "ON", "OFF")
