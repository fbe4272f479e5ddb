"""Jinja as chat templates expect it: what Hugging Face's transformers gives them, in a sandbox.

The options, the filter tojson and the functions are those of transformers' ``apply_chat_template``; a template comes
with a model that somebody else made, so it may neither change what it is given nor reach Python's internals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ModelError


class TemplateRefusal(Exception):
    """A template called raise_exception(); the message is its own."""


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant wrote, for training; here it is nothing but its content."""

    tags = {"generation"}  # noqa: RUF012 (the base class has it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> None:
    raise TemplateRefusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as json.dumps() writes it; Jinja's own filter escapes what HTML would need escaped."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_null
    )


def _null(value: object) -> None:
    if not isinstance(value, jinja2.Undefined):
        raise TypeError(f"{type(value).__name__} can not be written as JSON")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()


class TemplateError(Exception):
    """A template failed with what it was given."""


class Program:
    """A compiled template. Raises ModelError with Jinja's reason when it is none."""

    def __init__(self, source: str) -> None:
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            reason = f"{error.message}, line {error.lineno}".replace("\n", " ")
            raise ModelError(f"The chat template is not a Jinja template: {reason}.") from None
        except (ValueError, RecursionError, OverflowError, MemoryError) as error:  # of constants, or nested too deep
            raise ModelError(f"The chat template can not be compiled: {error}.") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. Raises TemplateRefusal where the template refuses, TemplateError where it fails."""
        try:
            return self._template.render(variables)
        except TemplateRefusal:
            raise
        except Exception as error:  # whatever the template's expressions raise
            raise TemplateError(" ".join(str(error).split()) or type(error).__name__) from error
