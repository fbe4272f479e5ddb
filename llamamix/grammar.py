"""Grammars of JSON schemas, by llama.cpp's own converter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ._ffi import ffi, lib
from .errors import LibraryError, ParamsError

_DEPTH_MAX = 200  # of a schema; the converter recurses, and has the stack of this thread for it


def json_schema_to_grammar(schema: Mapping[str, Any] | str) -> str:
    """The GBNF grammar of the JSON texts that a schema describes, for ``SamplingParams(grammar=...)``.

    Objects have their properties in the order of the schema. A pattern that the converter, which is llama.cpp's own,
    does not know stands for any text, which it says on stderr.

    Args:
        schema: A JSON schema, as an object or as JSON text; ``{}`` is any JSON.

    Returns:
        A GBNF text with a rule named root.

    Raises:
        ParamsError: For what is no JSON schema, or one that the converter does not know.
        LibraryError: When the library that has the converter (llamamix-schema) is not beside libllama.
    """
    text = schema_text(schema)
    try:
        convert = lib.llamamix_schema_to_grammar
    except LibraryError:
        raise LibraryError(
            "JSON schemas need the library llamamix-schema beside libllama; build it with"
            " 'cmake --build --preset cpu --target llamamix-schema'."
        ) from None
    error = ffi.new("char **")
    grammar = convert(text.encode("utf-8"), error)
    try:
        if grammar == ffi.NULL:
            reason = "there is no memory for it" if error[0] == ffi.NULL else _string(error[0])
            raise ParamsError(f"The JSON schema can not be made a grammar: {_sentence(reason)}.")
        return _string(grammar)
    finally:
        lib.llamamix_schema_free(grammar)
        lib.llamamix_schema_free(error[0])


def schema_text(schema: Any) -> str:
    """A JSON schema as JSON text. Raises ParamsError for what is none."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(value, Mapping):
            raise ParamsError(f"A JSON schema must be an object, or JSON text of one, not {type(value).__name__}.")
        text = json.dumps(dict(value))
    except ParamsError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise ParamsError(f"The JSON schema is not JSON: {error}.") from None
    if _depth(text) > _DEPTH_MAX:
        raise ParamsError(f"The JSON schema nests more than {_DEPTH_MAX} levels.")
    return text


def _depth(text: str) -> int:
    """How deep JSON text nests, or more where texts in it have brackets."""
    depth = deepest = 0
    for char in text:
        if char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest


def _string(c_string: Any) -> str:
    return bytes(ffi.string(c_string)).decode("utf-8", "replace")


def _sentence(reason: str) -> str:
    return " ".join(reason.removeprefix("JSON schema conversion failed:").split()).rstrip(".")
