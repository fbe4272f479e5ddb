"""Ownership of C objects: freed once, never while in use, not before what depends on them, by no other process."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from ._fork import check_process
from .errors import LlamamixError


def _free(free: Callable[[Any], None], pointer: Any, _parent: Any, pid: int) -> None:
    if os.getpid() == pid:
        free(pointer)  # the arguments have kept the parent until now: the child goes first


class Handle:
    """Owns a C object. Freed by close(), when the last reference goes, or at exit, whichever is first.

    A process that is forked meanwhile can not use the object, and does not free it. Use raises ``error`` there.
    """

    def __init__(
        self, pointer: Any, free: Callable[[Any], None], parent: Any, name: str, error: type[LlamamixError]
    ) -> None:
        self._pointer = pointer
        self._pid = os.getpid()
        self._name = name
        self._error = error
        self._finalizer = weakref.finalize(self, _free, free, pointer, parent, self._pid)

    @property
    def pointer(self) -> Any:
        """The object."""
        self.check_process()
        return self._pointer

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    @property
    def inherited(self) -> bool:
        """True in a process that was forked from the one that has the object."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raise ``error`` when the object is inherited."""
        check_process(self._pid, self._name, self._error)

    def close(self) -> None:
        self._finalizer()


class ExclusiveHandle(Handle):
    """A handle whose object one thread uses at a time: ``with handle as pointer``.

    Another thread waits; a callback of the object that comes back to it, and use after close(), raise ``error``. What any
    thread may call meanwhile goes by guard(), which only close() waits for.
    """

    def __init__(
        self, pointer: Any, free: Callable[[Any], None], parent: Any, name: str, error: type[LlamamixError]
    ) -> None:
        super().__init__(pointer, free, parent, name, error)
        self._lock = threading.Lock()
        self._guard = threading.RLock()  # that of what logs while it is freed comes back
        self._user: int | None = None

    def _acquire(self) -> None:
        self.check_process()  # first: a thread that this process does not have may hold the lock
        if self._user == threading.get_ident():
            raise self._error(f"The {self._name} is busy: one of its own callbacks must not use it.")
        self._lock.acquire()
        self._user = threading.get_ident()

    def _release(self) -> None:
        self._user = None
        self._lock.release()

    def __enter__(self) -> Any:
        self._acquire()
        if self.closed:
            self._release()
            raise self._error(f"The {self._name} is closed.")
        return self._pointer

    def __exit__(self, *_exc: object) -> None:
        self._release()

    @contextlib.contextmanager
    def glance(self) -> Iterator[Any]:
        """The object for a short look that waits for nobody; None when it is closed, inherited, or in use."""
        if self.inherited or self._user == threading.get_ident() or not self._lock.acquire(blocking=False):
            yield None
            return
        self._user = threading.get_ident()
        try:
            yield None if self.closed else self._pointer
        finally:
            self._release()

    @contextlib.contextmanager
    def guard(self) -> Iterator[Any]:
        """The object, which is not freed until the end of the block; None when it is closed."""
        self.check_process()
        with self._guard:
            yield None if self.closed else self._pointer

    def close(self) -> None:
        if self.inherited:  # nothing is freed, and no lock waited for
            super().close()
        elif not self.closed:
            self._acquire()
            try:
                with self._guard:
                    super().close()
            finally:
                self._release()
