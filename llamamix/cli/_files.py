"""Files that a run writes at its end, looked at before it begins."""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Callable
from pathlib import Path


def check_outputs(args: argparse.Namespace, check_matplotlib: Callable[[], None]) -> None:
    """Raise LlamamixError for a file of --jsonl, --plot or --svg that can not be written, or not in that format.

    check_matplotlib  raises where there is none
    """
    from ..errors import LlamamixError

    if args.plot:
        check_matplotlib()
        endings = _picture_formats()
        if Path(args.plot).suffix.lower().removeprefix(".") not in endings:
            raise LlamamixError(f"{args.plot} can not be drawn: its ending must be one of .{', .'.join(endings)}.")
    svg = getattr(args, "svg", None)
    if svg and Path(svg).suffix.lower() != ".svg":
        raise LlamamixError(f"--svg writes an SVG picture, and {svg} does not end so.")
    for flag, path in (("--jsonl", args.jsonl), ("--plot", args.plot), ("--svg", svg)):
        if path and (reason := _reason(Path(path))):
            raise LlamamixError(f"{flag} {path} can not be written: {os.strerror(reason)}.")


def _picture_formats() -> list[str]:
    from matplotlib.backend_bases import FigureCanvasBase

    return sorted(FigureCanvasBase.get_supported_filetypes())


def _reason(path: Path) -> int:
    """Why a file can not be written, as an errno; 0: it looks as if it can."""
    folder = path.parent
    if path.is_dir():
        return errno.EISDIR
    if not folder.exists():
        return errno.ENOENT
    if not folder.is_dir():
        return errno.ENOTDIR
    return 0 if os.access(path if path.exists() else folder, os.W_OK) else errno.EACCES
