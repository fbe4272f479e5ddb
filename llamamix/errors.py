"""What can go wrong, as exceptions with one sentence each."""

from __future__ import annotations


class LlamamixError(Exception):
    """Base of every error of this package.

    Args:
        message: A sentence.
        code: The return value of the C function that failed; None: there is none.

    Attributes:
        code (int | None): The same.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class LibraryError(LlamamixError):
    """libllama is missing, can not be loaded, or is not the one that these bindings were made for."""


class ParamsError(LlamamixError, ValueError):
    """An argument that can not be used, named in the message. It is a ValueError, too."""


class ModelError(LlamamixError):
    """A model can not be loaded, lacks what was asked of it, or is closed."""


class ContextError(LlamamixError):
    """A context can not be created or used, or is closed."""


class ContextFullError(ContextError):
    """The tokens do not fit in the KV cache. The cache is as it was before the call."""


class DecodeAborted(ContextError):
    """The abort callback stopped a decode. The ubatches that were finished stay in the KV cache."""


class CacheError(LlamamixError):
    """A KV cache that is driven by hand can not do what it is asked for, or is closed."""


class PullError(LlamamixError):
    """A model or text can not be fetched from its registry."""


class ProgramError(LlamamixError):
    """A program of the fork is not in this install."""


class ServerError(LlamamixError):
    """There is no llama-server to run, or it ended before it was ready; ``code`` is its exit code then."""


_DECODE_ERRORS = {1: ContextFullError, 2: DecodeAborted}


def check(code: int, message: str, reason: str = "") -> None:
    """Raise the exception that stands for a return value of llama_decode() other than 0."""
    if code != 0:
        sentence = f"{message}: {reason}" if reason else message
        raise _DECODE_ERRORS.get(code, ContextError)(sentence.rstrip(".") + ".", code)
