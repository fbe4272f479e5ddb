"""What a chat template can do with what it is given, found by trying it.

A template does not say whether it takes a system message or parts of content: it prints, ignores or refuses them. So
it is given a marked text in each form, and where the mark comes out the form is taken. llama.cpp decides on the same
things (common/jinja/caps.h), by what its interpreter sees a template touch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .messages import Message

# gives the text of messages, None where the template refuses them or fails
Render = Callable[[list[Message], list[dict[str, Any]]], "str | None"]

_MARK = "zyx7381mark"


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a template takes.

    string_content    content that is a text
    typed_content     content that is a list of parts
    system            a system message
    object_arguments  a tool call's arguments as an object; False: as JSON text
    """

    string_content: bool
    typed_content: bool
    system: bool
    object_arguments: bool


def try_out(render: Render) -> Abilities:
    """Find out what a template takes."""
    string = _marked(render([{"role": "user", "content": _MARK}], []))
    typed_text = render([{"role": "user", "content": _typed(_MARK)}], [])
    # a template that puts any content into its text puts the list there as Python writes it
    typed = _marked(typed_text) and "'type'" not in str(typed_text) and '"type"' not in str(typed_text)

    def content(text: str) -> Any:
        return _typed(text) if typed and not string else text

    user: Message = {"role": "user", "content": content("Hi")}
    system = _marked(render([{"role": "system", "content": content(_MARK)}, user], []))

    call = {"type": "function", "function": {"name": "f", "arguments": {"arg": _MARK}}, "id": "call00001"}
    properties = {"arg": {"type": "string", "description": "An argument"}}
    parameters = {"type": "object", "properties": properties, "required": ["arg"]}
    tools = [{"type": "function", "function": {"name": "f", "description": "F", "parameters": parameters}}]
    called = render(
        [
            user,
            {"role": "assistant", "content": content(""), "tool_calls": [call]},
            {"role": "tool", "content": content("1"), "tool_call_id": "call00001"},
            {"role": "assistant", "content": content("One")},
            user,
        ],
        tools,
    )
    object_arguments = _marked(called) and f"{{'arg': '{_MARK}'}}" not in str(called)
    return Abilities(string, typed, system, object_arguments)


def _typed(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _marked(text: str | None) -> bool:
    return text is not None and _MARK in text
