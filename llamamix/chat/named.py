"""Chat templates that llama.cpp knows by a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .._ffi import ffi, lib
from ..errors import ModelError, ParamsError
from .messages import join_text, read_messages


def is_name(template: str) -> bool:
    """True for what is no Jinja template but at most the name of one."""
    return "{{" not in template and "{%" not in template


def apply_named(name: str, messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool) -> str:
    """Messages as one text, by a template that llama.cpp knows.

    Raises ParamsError for messages that are none or have more than a role and a content, ModelError for a name that
    llama.cpp does not know.
    """
    c_name = _c_string(name, "The template")
    read = read_messages(messages)
    strings = []  # cffi keeps only the array of pointers alive
    chat = ffi.new("struct llama_chat_message[]", len(read))
    for c_message, message in zip(chat, read, strict=True):
        if set(message) != {"role", "content"}:
            raise ParamsError(f"The template {name} takes a role and a content, nothing else: {message!r}.")
        content = message["content"]
        text = content if isinstance(content, str) else join_text(content)
        for key, value in (("role", message["role"]), ("content", text)):
            strings.append(ffi.new("char[]", _c_string(value, f"The {key} of a message")))
            setattr(c_message, key, strings[-1])

    n_max = 2 * sum(len(s) for s in strings) + 1024
    while True:
        buffer = ffi.new("char[]", n_max)
        n = lib.llama_chat_apply_template(c_name, chat, len(read), bool(add_generation_prompt), buffer, n_max)
        if n < 0:
            raise ModelError(f"llama.cpp does not know the chat template {name[:60]!r}, which is no Jinja either.")
        if n <= n_max:
            return bytes(ffi.buffer(buffer, n)).decode("utf-8", "replace")
        n_max = n


def _c_string(text: str, what: str) -> bytes:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        raise ParamsError(f"{what} has half of a surrogate pair, which UTF-8 can not encode.") from None
    if b"\0" in data:
        raise ParamsError(f"{what} has a NUL character.")
    return data
