"""Messages and tools of a chat, read as llama-server reads them (OpenAI's form) before a template sees them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import ParamsError

Message = dict[str, Any]


def read_messages(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Copies of messages, each with a role, a content and what else it has, in the order of keys that a server gives.

    Raises ParamsError for what is no message.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise ParamsError(f"messages must be a list of messages, not {_short(messages)}.")
    read = [_read_message(message) for message in messages]
    if not read:
        raise ParamsError("There are no messages.")
    return read


def read_tools(tools: Iterable[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Copies of tools as ``{"type": "function", "function": {"name", "description", "parameters"}}``.

    Raises ParamsError for what is no tool.
    """
    if tools is None:
        return []
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Iterable):
        raise ParamsError(f"tools must be a list of tools, not {_short(tools)}.")
    read = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            form = "{'type': 'function', 'function': {'name': ...}}"
            raise ParamsError(f"A tool must be {form}, not {_short(tool)}.")
        description, parameters = function.get("description", ""), function.get("parameters", {})
        if not isinstance(description, str) or not isinstance(parameters, Mapping):
            raise ParamsError(
                f"The tool {function['name']} must have a text as its description and a JSON schema as its parameters."
            )
        function = {"name": function["name"], "description": description, "parameters": _copy(parameters, "A tool")}
        read.append({"type": "function", "function": function})
    return read


def parse_arguments(messages: Iterable[Message]) -> None:
    """Make objects of the tool calls' arguments, which are JSON texts. Raises ParamsError for what is no JSON."""
    for function in _called(messages):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError as error:
            raise ParamsError(f"The arguments of the call of {function['name']} are not JSON: {error}.") from None


def join_text(parts: Iterable[Mapping[str, str]]) -> str:
    """The text of content parts, a line break between two."""
    return "\n".join(part["text"] for part in parts)


def map_content(messages: Iterable[Message], change: Callable[[Any], Any]) -> None:
    """Put what ``change`` makes of it in place of every message's content."""
    for message in messages:
        message["content"] = change(message["content"])


def _read_message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise ParamsError(f"A message must be {{'role': ..., 'content': ...}}, not {_short(message)}.")
    message = _copy(message, "A message")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ParamsError(f"A message must have a role: {_short(message)}.")
    calls = message.get("tool_calls")
    read: Message = {"role": role, "content": _read_content(message, may_lack=role == "assistant" and bool(calls))}
    for key in ("reasoning_content", "name", "tool_call_id"):
        if key not in message or message[key] in (None, ""):
            continue
        if not isinstance(message[key], str):
            raise ParamsError(f"The {key} of a message must be a str, not {_short(message[key])}.")
        read[key] = message[key]
    if calls:
        if not isinstance(calls, list):
            raise ParamsError(f"The tool_calls of a message must be a list, not {_short(calls)}.")
        read["tool_calls"] = [_read_call(call) for call in calls]
    known = {"tool_calls", "reasoning_content", "name", "tool_call_id"}
    return read | {key: value for key, value in message.items() if key not in read and key not in known}


def _read_content(message: Message, may_lack: bool) -> str | list[dict[str, str]]:
    content = message.get("content")
    if content is None and may_lack:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ParamsError(f"The content of a message must be a str or a list of parts, not {_short(content)}.")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ParamsError(f"A part of a message's content must be {{'type': 'text', 'text': ...}}: {_short(part)}.")
    return [{"type": "text", "text": part["text"]} for part in content]


def _read_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) and call.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        raise ParamsError(
            "A tool call must be {'type': 'function', 'function': {'name': ..., 'arguments': ...}},"
            f" not {_short(call)}."
        )
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
    read: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id"):
        read["id"] = call["id"]
    return read


def _called(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [call["function"] for message in messages for call in message.get("tool_calls", ())]


def _copy(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A copy that shares nothing. Raises ParamsError for what JSON can not hold."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ParamsError(f"{what} must consist of what JSON can hold: {error}.") from None
    return copy


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
