"""The records of a trace."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from ._json import Record


class EventKind(str, Enum):
    """What happened, as [the trace](../trace.md#events) says; the names are those of ``enum
    llama_kv_mixed_event_kind``.
    """

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
    """What quantisation did to one layer's rows in a migration: the values that were stored against those before.

    Attributes:
        il: The layer.
        rmse_k: Root of the mean squared difference of the values of K.
        max_k: The largest difference of a value of K.
        rmse_v: Root of the mean squared difference of the values of V.
        max_v: The largest difference of a value of V.
        rms_k: Root of the mean squared value of K before.
        rms_v: Root of the mean squared value of V before.
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

    Attributes:
        id: 0, 1, 2, ... since the trace began; a gap is records that the ring lost.
        t: Seconds since the trace began.
        kind: What happened.
        trigger: Why tokens move (TRIGGER, MIGRATE, FAIL), else None.
        stream: The stream; None: all of them.
        seq_ids: The sequences concerned.
        pos_min: First position that moves; of SEQ_*: p0 as it was given. None: there is none, or it was -1.
        pos_max: Last position that moves, included; of SEQ_*: p1 as it was given, excluded. None: there is none, or it
            was -1.
        n_tokens: The tokens concerned.
        hot_used: Hot cells of the stream (of all, when it is None) in use after the event.
        hot_size: Hot cells of the stream.
        cold_used: Cold cells in use after the event.
        cold_size: Cold cells.
        duration: Seconds that a migration took, without measuring its error.
        bytes_in: Bytes of the rows before a migration.
        bytes_out: Bytes of the rows after it.
        rmse_k: Root of the mean squared difference of the values of K that moved, over all layers; None: not measured,
            or they were not finite. So are the next five.
        max_k: The largest difference of a value of K.
        rmse_v: Like ``rmse_k``, of V.
        max_v: Like ``max_k``, of V.
        rms_k: Root of the mean squared value of K before, what the error is to be compared with.
        rms_v: Like ``rms_k``, of V.
        layers: The same layer by layer, when the trace keeps that.
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
