"""Frozen dataclasses of plain values as lines of JSON, read back with every value checked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from .errors import LlamamixError

_R = TypeVar("_R")


def read_rows(
    path: str | os.PathLike[str], read: Callable[[str], _R], what: str, nothing: str, error: type[LlamamixError]
) -> list[_R]:
    """The rows of a file, one a line.

    read     makes a row of a line, or raises ValueError
    what     such a file, e.g. "recorded benchmark"
    nothing  what an empty one lacks, e.g. "measurements"

    Raises an error of that class, which names the line, when the file is something else or is damaged, and OSError.
    """
    rows: list[_R] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(read(line.decode("utf-8")))
            except ValueError as reason:
                fault = "is damaged" if rows else f"is no {what}"
                raise error(f"{path}, line {number}: the file {fault} ({reason}).") from None
    if not rows:
        raise error(f"{path} has no {nothing}.")
    return rows


def row_from_json(cls: type[_R], line: str) -> _R:
    """An instance of a dataclass from a line that has its fields, and perhaps others. Raises ValueError.

    A line may lack fields that have a default: those that were not recorded once.
    """
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("this is not JSON") from None
    if not isinstance(data, dict):
        raise ValueError("this is no record")
    there = (field for field in fields(cls) if field.name in data or field.default is MISSING)  # type: ignore[arg-type]
    return cls(**{field.name: _value(data, field.name, str(field.type)) for field in there})


# what a field's annotation allows
_READERS: Mapping[str, Any] = {
    "str": lambda value: value if isinstance(value, str) else _fail(),
    "int": lambda value: value if type(value) is int and -1 <= value < 2**63 else _fail(),
    "float": lambda value: float(value) if type(value) in (int, float) and math.isfinite(value) else _fail(),
    "bool": lambda value: value if isinstance(value, bool) else _fail(),
    "str | None": lambda value: None if value is None else _READERS["str"](value),
    "int | None": lambda value: None if value is None else _READERS["int"](value),
    "float | None": lambda value: None if value is None else _READERS["float"](value),
    "tuple[int, ...]": lambda value: _tuple(value, "int"),
    "tuple[tuple[int, ...], ...]": lambda value: _tuple(value, "tuple[int, ...]"),
    "tuple[int, ...] | None": lambda value: None if value is None else _tuple(value, "int"),
}


def _value(data: Mapping[str, Any], name: str, annotation: str) -> Any:
    if name not in data:
        raise ValueError(f"{name} is missing")
    try:
        return _READERS[annotation](data[name])
    except (TypeError, OverflowError):
        raise ValueError(f"{name} must not be {data[name]!r}") from None


def _tuple(value: Any, annotation: str) -> tuple[Any, ...]:
    return tuple(map(_READERS[annotation], value)) if isinstance(value, list) else _fail()


def _fail() -> Any:
    raise TypeError
