"""Records of a running trace, gathered by a thread of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from .events import Event
from .recording import End, Progress
from .ring import Trace

Record: TypeAlias = Event | Progress | End

_INTERVAL = 0.1  # seconds


class Recorder:
    """Drains a trace ten times a second, also while a decode runs, and hands on what it got.

    emit  is called with the records of each time, in the order of their times, by one thread at a time

    An exception of ``emit`` comes out of the next progress(), or of finish().
    """

    def __init__(self, trace: Trace, emit: Callable[[list[Record]], None]) -> None:
        self.trace = trace
        self._emit = emit
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._error: BaseException | None = None
        self._t = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llamamix-trace", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """True when an exception waits."""
        return self._error is not None

    def progress(self, progress: Progress) -> None:
        """Tell how far the run has come."""
        if self._error is not None:
            raise self._error
        with self._lock:
            if self._progress is not None:  # not handed on yet
                progress = replace(progress, text=self._progress.text + progress.text)
            self._progress = progress

    def finish(self, interrupted: bool) -> None:
        """End the trace, and hand on what is left."""
        self._done.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        self.trace.stop()
        self._pump()
        self._emit([End(max(self.trace.now(), self._t), self.trace.n_dropped, interrupted)])

    def _run(self) -> None:
        try:
            while not self._done.wait(_INTERVAL):
                self._pump()
        except BaseException as error:
            self._error = error

    def _pump(self) -> None:
        # the progress first: whatever it knows of is in the ring by now
        with self._lock:
            progress, self._progress = self._progress, None
        records: list[Record] = [*self.trace.read()]
        if progress is not None:
            records.append(progress)
        if records:
            # the clocks of events and progress may differ by the time it takes to begin
            records = [r if r.t >= self._t else replace(r, t=self._t) for r in records]
            records.sort(key=lambda record: record.t)
            self._t = records[-1].t
            self._emit(records)
