"""The fork's programs, which an install has beside libllama, and the folder that they are in."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from ._ffi import _lib_dirs, library_file
from .errors import ProgramError

PROGRAMS = ("llama-server", "llama-cli", "llama-completion", "llama-perplexity", "llama-bench")


def library_dir() -> Path:
    """The folder of the libllama that the bindings load, for LLAMA_CPP_LIB_PATH and the like. Raises LibraryError."""
    return library_file().parent.resolve()


def find_program(name: str) -> Path:
    """A program of the fork, such as "llama-bench" or "bench": beside libllama, else on the PATH.

    Raises ProgramError when there is none.
    """
    name = name if name.startswith(("llama-", "ggml-")) else f"llama-{name}"
    suffix = ".exe" if sys.platform == "win32" else ""
    for folder in _lib_dirs():
        if os.access(folder / f"{name}{suffix}", os.X_OK):
            return folder / f"{name}{suffix}"
    if found := shutil.which(name):
        return Path(found)
    there = [each for each in PROGRAMS if any((folder / f"{each}{suffix}").exists() for folder in _lib_dirs())]
    raise ProgramError(
        f"There is no {name}; there are {', '.join(there)}."
        if there
        else f"There is no {name}: this install has the library alone. 'pip install .' in a checkout builds the programs, too."
    )
