"""llamamix libdir: where the library is."""

from __future__ import annotations

import argparse
from typing import Any

from ._options import add_command


def register(commands: Any) -> None:
    parser = add_command(
        commands, "libdir",
        "Print the folder of libllama and the programs. LLAMA_CPP_LIB_PATH=$(llamamix libdir) makes llama-cpp-python use it.",
        "",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(_args: argparse.Namespace) -> int:
    from ..programs import library_dir

    print(library_dir())
    return 0
