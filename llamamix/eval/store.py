"""Scores that were measured before, each in a small file, so that nothing is measured twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .compare import FIELDS, Scores
from .texts import EvalError

_VERSION = 1  # of what the arrays mean


@dataclass(frozen=True, slots=True)
class Measured:
    """What one cache gave in one leg of one chunk.

    scores     position by position
    kv_bytes   of the cache, all in
    kv_mixed   the mixed cache's parameters in force, None: a plain one
    n_threads  threads that computed it
    """

    scores: Scores
    kv_bytes: int
    kv_mixed: str | None
    n_threads: int


class Store:
    """A folder with a file for everything that was measured. None: nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def load(self, key: str) -> Measured | None:
        """What is kept under a key, None: nothing that can be read."""
        if self._folder is None:
            return None
        try:
            with np.load(self._path(key), allow_pickle=False) as file:
                arrays = {name: file[name] for name in FIELDS}
                info = json.loads(str(file["info"]))
                measured = Measured(Scores(**arrays), info["kv_bytes"], info["kv_mixed"], info["n_threads"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None  # it is measured again
        n = len(measured.scores.kld)
        right = all(array.shape == (n,) and array.dtype == FIELDS[name] for name, array in arrays.items())
        return measured if right and n > 0 else None

    def save(self, key: str, measured: Measured) -> None:
        """Keep something, whole or not at all. Raises EvalError when it can not be stored."""
        if self._folder is None:
            return
        path = self._path(key)
        info = json.dumps({name: getattr(measured, name) for name in ("kv_bytes", "kv_mixed", "n_threads")})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", suffix=".npz", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    np.savez(file, info=info, **{field: getattr(measured.scores, field) for field in FIELDS})
                os.replace(name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            raise EvalError(f"Scores can not be kept in {path.parent}: {error.strerror or error}.") from None

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}.npz"


def key_of(parts: Mapping[str, Any]) -> str:
    """A name for what was measured from all that decides it, hexadecimal digits."""
    text = json.dumps({"version": _VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def library_digest() -> str:
    """What tells one build of the loaded libraries from another, hexadecimal digits."""
    from .. import _ffi

    name = _ffi._file_name("llama")
    folder = next(folder for folder in _ffi._lib_dirs() if (folder / name).is_file())
    wanted = {name, *(path.name for path in folder.glob(f"{_ffi._file_name('ggml').partition('.')[0]}*"))}
    files = sorted({(folder / file).resolve() for file in wanted})
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def tokens_digest(*arrays: np.ndarray) -> str:
    """Of token ids and the like, hexadecimal digits."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        digest.update(b"|")
    return digest.hexdigest()
