"""The records of a trace."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from ._json import Record


class EventKind(str, Enum):
    """What happened; the names are those of ``enum llama_kv_mixed_event_kind``."""

    INIT = "init"
    TRIGGER = "trigger"
    MIGRATE = "migrate"
    FAIL = "fail"
    REFUSE = "refuse"
    CLEAR = "clear"
    SEQ_RM = "seq_rm"
    SEQ_CP = "seq_cp"
    SEQ_KEEP = "seq_keep"
    SEQ_ADD = "seq_add"
    SEQ_DIV = "seq_div"
    STATE_WRITE = "state_write"
    STATE_READ = "state_read"


class Trigger(str, Enum):
    """Why tokens moved; the names are those of ``enum llama_kv_mixed_trigger``."""

    THRESHOLD = "threshold"
    ROOM = "room"
    MANUAL = "manual"


@dataclass(frozen=True, slots=True)
class LayerError:
    """What quantisation did to one layer's rows in a migration.

    il              the layer
    rmse_k, rmse_v  root of the mean squared difference of the values
    max_k, max_v    the largest difference
    rms_k, rms_v    root of the mean squared value before
    """

    il: int
    rmse_k: float
    max_k: float
    rmse_v: float
    max_v: float
    rms_k: float
    rms_v: float


@dataclass(frozen=True, slots=True)
class Event(Record):
    """Something that a mixed KV cache did.

    id                    0, 1, 2, ... since the trace began; a gap is records that the ring lost
    t                     seconds since the trace began
    kind                  what happened
    trigger               why tokens move (TRIGGER, MIGRATE, FAIL), else None
    stream                the stream, None: all of them
    seq_ids               the sequences concerned
    pos_min, pos_max      positions that move, both included; of SEQ_*: p0 and p1 as they were given, [p0, p1); None: -1
    n_tokens              the tokens concerned
    hot_used, hot_size    cells of the stream (of all, when it is None) after the event
    cold_used, cold_size  the same of cold
    duration              seconds that a migration took, without measuring its error
    bytes_in, bytes_out   bytes of the rows before and after a migration
    rmse_k, rmse_v        error of the rows that moved, over all layers; None: not measured, or they were not finite
    max_k, max_v          the largest difference of a value
    rms_k, rms_v          root of the mean squared value before, what the error is to be compared with
    layers                the same layer by layer, when the trace keeps that
    """

    RECORD: ClassVar[str] = "event"

    id: int
    t: float
    kind: EventKind
    trigger: Trigger | None
    stream: int | None
    seq_ids: tuple[int, ...]
    pos_min: int | None
    pos_max: int | None
    n_tokens: int
    hot_used: int
    hot_size: int
    cold_used: int
    cold_size: int
    duration: float
    bytes_in: int
    bytes_out: int
    rmse_k: float | None
    max_k: float | None
    rmse_v: float | None
    max_v: float | None
    rms_k: float | None
    rms_v: float | None
    layers: tuple[LayerError, ...] = ()
