"""Frozen dataclasses as lines of JSON, and back with every value checked."""

from __future__ import annotations

import functools
import json
import types
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

_R = TypeVar("_R", bound="Record")

# nothing in a record is negative, and the library's floating point numbers are of 32 bits
_MAX = {int: 2**64 - 1, float: 3.5e38}


class Record:
    """A line of a recorded run; ``RECORD`` names its kind there."""

    __slots__ = ()
    RECORD: ClassVar[str]

    def to_json(self: Any) -> str:
        """One line, without its end."""
        return json.dumps({"record": self.RECORD, **asdict(self)})

    @classmethod
    def from_json(cls: type[_R], line: str) -> _R:
        """What to_json() gave.

        Args:
            line: A line of JSON.

        Raises:
            ValueError: For anything else.
        """
        data = parse(line)
        if data.pop("record") != cls.RECORD:
            raise ValueError(f"this is no {cls.RECORD}")
        record: _R = from_dict(cls, data)
        return record


def parse(line: str) -> dict[str, Any]:
    """The JSON object of a line, which has a "record". Raises ValueError."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):  # too many digits, too many brackets
        raise ValueError("this is not JSON") from None
    if not isinstance(data, dict) or "record" not in data:
        raise ValueError("this is no record")
    return data


def from_dict(cls: type, data: Any) -> Any:
    """An instance of a dataclass from what its asdict() became in JSON. Raises ValueError."""
    if not isinstance(data, dict):
        raise ValueError(f"{data!r} is no object")
    hints = _hints(cls)
    for name in hints.keys() ^ data.keys():
        raise ValueError(f"{name} is {'missing' if name in hints else 'unknown'}")
    return cls(**{name: _value(name, data[name], hint) for name, hint in hints.items()})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _value(name: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):  # X | None
        if value is None:
            return None
        hint = get_args(hint)[0]
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list")
        return tuple(_value(name, item, get_args(hint)[0]) for item in value)
    if isinstance(hint, type) and is_dataclass(hint):
        return from_dict(hint, value)
    if issubclass(hint, Enum):
        return hint(value)
    if type(value) is not hint:
        raise ValueError(f"{name} must not be {value!r}")
    if hint in _MAX and not 0 <= value <= _MAX[hint]:
        raise ValueError(f"{name} is out of bounds")
    return value
