"""What a mixed KV cache does, while it does it and afterwards.

    with Trace(context, measure_error=True) as trace:
        context.decode(tokens)
        for event in trace.read():
            print(event.t, event.kind.value, event.n_tokens)

Importing this loads neither the library nor what draws.
"""

from .events import Event, EventKind, LayerError, Trigger
from .recording import End, Header, Progress, TraceError, read_recording
from .ring import Trace
from .summary import Summary

__all__ = [
    "End",
    "Event",
    "EventKind",
    "Header",
    "LayerError",
    "Progress",
    "Summary",
    "Trace",
    "TraceError",
    "Trigger",
    "read_recording",
]
