"""A recorded run: a header, then events and progress in the order of their times, then the end, as JSON lines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import LlamamixError
from ..formats import FORMATS
from ..stats import CacheStats
from ._json import Record, from_dict, parse
from .events import Event

FORMAT = "llamamix-trace"
VERSION = 2


class TraceError(LlamamixError):
    """A recorded run can not be read, or not be drawn."""


@dataclass(frozen=True, slots=True)
class Header(Record):
    """What was traced.

    Attributes:
        format: Of the file: "llamamix-trace".
        version: Of the format.
        llamamix: Version of the package that wrote it.
        model: The model's name; None: there was none.
        kv_mixed: The mixed KV cache's parameters in force, as text.
        n_ctx: Tokens of context; None: the cache was driven by hand.
        cache: The cache as the trace began.
    """

    RECORD: ClassVar[str] = "header"

    format: str
    version: int
    llamamix: str
    model: str | None
    kv_mixed: str
    n_ctx: int | None
    cache: CacheStats


@dataclass(frozen=True, slots=True)
class Progress(Record):
    """How far a run has come.

    Attributes:
        t: Seconds since the trace began.
        n_in: Tokens of the prompt that were computed.
        n_out: Tokens generated.
        hot_used: Hot cells in use.
        cold_used: Cold cells in use.
        prefill: Tokens of the prompt per second so far, 0: none yet.
        decode: Tokens generated per second so far, 0: none yet.
        text: What was generated since the last progress.
    """

    RECORD: ClassVar[str] = "progress"

    t: float
    n_in: int
    n_out: int
    hot_used: int
    cold_used: int
    prefill: float
    decode: float
    text: str


@dataclass(frozen=True, slots=True)
class End(Record):
    """The end of a run.

    Attributes:
        t: Seconds since the trace began.
        n_dropped: Records that the ring lost.
        interrupted: True when it was ended before it was done.
    """

    RECORD: ClassVar[str] = "end"

    t: float
    n_dropped: int
    interrupted: bool


_TYPES: dict[str, type] = {cls.RECORD: cls for cls in (Header, Event, Progress, End)}


def read_recording(path: str | os.PathLike[str]) -> tuple[Header, Iterator[Event | Progress | End]]:
    """Read a recorded run.

    Args:
        path: The file.

    Returns:
        Its header, and an iterator over its records, which reads them one after the other; the last is the End.

    Raises:
        TraceError: At once or while it is iterated: when the file is no recording or is damaged, with the line.
        OSError: When it can not be read.
    """
    records: Any = _records(path)
    return next(records), records


def _records(path: str | os.PathLike[str]) -> Iterator[Header | Event | Progress | End]:
    last: Record | None = None
    t = 0.0
    number = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = _record(line)
                if (last is None) != isinstance(record, Header) or isinstance(last, End):
                    raise ValueError(f"no {record.RECORD} belongs here")
                if not isinstance(record, Header):
                    if record.t < t:
                        raise ValueError("time goes backwards")
                    t = record.t
            except ValueError as error:
                what = "is not a recorded trace" if last is None else "is damaged"
                raise TraceError(f"{path}, line {number}: the file {what} ({error}).") from None
            yield record
            last = record
    if not isinstance(last, End):
        raise TraceError(f"{path}, line {number + 1}: the file is cut off (the end of the run is missing).")


def _record(line: bytes) -> Header | Event | Progress | End:
    data = parse(line.decode("utf-8"))
    name = data.pop("record")
    if name == Header.RECORD:
        if data.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if data.get("version") != VERSION:
            raise ValueError(f"its version is {data.get('version')!r}, and {VERSION} is what can be read")
    if not isinstance(name, str) or name not in _TYPES:
        raise ValueError("it is of an unknown kind")
    record: Header | Event | Progress | End = from_dict(_TYPES[name], data)
    if isinstance(record, Header):
        cache = record.cache
        if not {cache.type_hot_k, cache.type_hot_v, cache.type_cold_k, cache.type_cold_v} <= FORMATS.keys():
            raise ValueError("a type is unknown")
    return record
