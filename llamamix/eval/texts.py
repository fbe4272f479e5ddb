"""Texts to evaluate on: prose, source code, and files."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import LlamamixError, ParamsError
from ..model import Model
from ..pull import Progress, pull
from ..text import decode_utf8

# modules of the standard library that there have been for long, in pure Python, with much text: 80 thousand tokens
_MODULES = ("argparse", "subprocess", "tarfile", "typing")
_PROSE = "botchan"
_BODY = re.compile(r"\*\*\* START OF[^\n]*\n(.*?)(?:End of (?:the )?Project Gutenberg|\*\*\* END OF)", re.DOTALL)


class EvalError(LlamamixError):
    """An evaluation can not be made, read or drawn."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """A value that is asked for: its tokens go from ``start`` to ``end``, and came ``distance`` tokens before."""

    start: int
    end: int
    distance: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one context.

    tokens   int32 [n]
    scored   bool [n], the token after this one is of interest; not after the last
    lookups  values among them that came before
    """

    tokens: np.ndarray
    scored: np.ndarray
    lookups: tuple[Lookup, ...] = field(default=())


class Source(Protocol):
    """Makes chunks; ``name`` is what tables call it, ``source`` where it is from, ``sha256`` of its text."""

    name: str
    source: str
    sha256: str

    def chunks(self, model: Model, n_ctx: int, n: int) -> list[Chunk]:
        """The first n chunks of n_ctx tokens. Raises ParamsError when there are not as many."""


class Text:
    """A text as it is: chunks follow each other, and begin with the model's first token, as in llama-perplexity.

    name    what tables call it
    source  where it is from
    """

    def __init__(self, name: str, source: str, text: str) -> None:
        self.name: str = name
        self.source: str = source
        self.text = text
        self.sha256: str = hashlib.sha256(text.encode("utf-8")).hexdigest()

    def chunks(self, model: Model, n_ctx: int, n: int) -> list[Chunk]:
        tokens = np.array(model.tokenize(self.text), np.int32)
        check_length(self.name, len(tokens), n_ctx, n, n_ctx * n)
        begin = model.tokenize("")
        scored = np.ones(n_ctx, np.bool_)
        scored[-1] = False
        result = []
        for i in range(n):
            part = tokens[i * n_ctx : (i + 1) * n_ctx].copy()
            part[: len(begin)] = begin
            result.append(Chunk(part, scored))
        return result


def check_length(name: str, n_have: int, n_ctx: int, n: int, n_need: int) -> None:
    """Raise ParamsError when a text is too short."""
    if n_have < n_need:
        raise ParamsError(
            f"{name} has {n_have} tokens, and {n} chunk{'s' * (n > 1)} of {n_ctx} need{'s' * (n == 1)} {n_need}:"
            " take fewer --chunks, a shorter -c or a longer text."
        )


def prose(progress: Progress | None = None) -> Text:
    """A novel, without what its publisher says before and after. Raises PullError."""
    path = pull(_PROSE, progress)
    text = path.read_text(encoding="utf-8-sig")
    body = _BODY.search(text)
    return Text("prose", path.name, body.group(1) if body else text)


def code() -> Text:
    """Modules of Python's standard library. Raises EvalError when their source is not there."""
    parts = []
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin) if spec is not None and spec.origin else Path(f"{name}.py")
        try:
            parts.append(origin.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            raise EvalError(
                f"The source of Python's module {name} is not there; give source code with -f instead."
            ) from None
    return Text("code", f"Python {platform.python_version()}: {', '.join(_MODULES)}", "\n".join(parts))


def from_file(path: str) -> Text:
    """A file's text. Raises OSError, and ParamsError when it is empty or not UTF-8."""
    text = decode_utf8(Path(path).read_bytes(), path)
    if not text:
        raise ParamsError(f"{path} is empty.")
    return Text(Path(path).name, path, text)


def check_names(names: Sequence[str]) -> None:
    """Raise ParamsError when two texts have one name: tables could not tell them apart."""
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ParamsError(f"Two texts are called {name}; give one of the files another name.")
