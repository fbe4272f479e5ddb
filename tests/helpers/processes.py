"""Programs that the tests start: where they are, and the environment they get."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llamamix import _ffi

from .paths import ROOT


def library_dir() -> Path:
    """The folder of the libllama that these tests use."""
    return next(folder.resolve() for folder in _ffi._lib_dirs() if (folder / _ffi._file_name("llama")).is_file())


def find_program(name: str, target: str | None = None) -> Path:
    """What a build target makes: beside libllama, or in this checkout's build; the test is skipped where there is none.

    target  what builds it, where that has another name
    """
    places = (library_dir(), ROOT / "build" / "cpu" / "bin")
    for path in (place / name for place in places):
        if path.is_file():
            return path
    pytest.skip(f"no {name}: cmake --build --preset cpu --target {target or name}")


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment variables without llama.cpp's own, and with changes; None leaves one out."""
    own = ("LLAMA_", "GGML_")
    kept = {name: value for name, value in os.environ.items() if name not in changes and not name.startswith(own)}
    return kept | {name: value for name, value in changes.items() if value is not None}
