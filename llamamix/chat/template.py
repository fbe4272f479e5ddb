"""A chat template: a model's own, in Jinja."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cached_property
from typing import Any

from ..errors import ParamsError
from .abilities import Abilities, try_out
from .environment import Program, TemplateError, TemplateRefusal
from .messages import Message, join_text, map_content, parse_arguments, read_messages, read_tools

#: what "chatml" stands for, as in llama.cpp
CHATML = (
    "{%- for message in messages -%}\n"
    "  {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "  {{- '<|im_start|>assistant\n' -}}\n"
    "{%- endif -%}"
)


class ChatTemplate:
    """A Jinja template that makes one text of a chat, the same as llama-server's ``/apply-template`` makes.

    source   the template
    bos      text of the token that begins a text; the template has it as ``bos_token``
    eos      text of the token that ends a text; the template has it as ``eos_token``
    add_bos  True when tokenizing adds bos: one that the template puts there is left out
    add_eos  the same for eos

    Raises ModelError when the source is no Jinja template.
    """

    def __init__(
        self, source: str, *, bos: str = "", eos: str = "", add_bos: bool = False, add_eos: bool = False
    ) -> None:
        self.source = source
        self._program = Program(source)
        self._bos, self._eos = bos, eos
        self._cut_bos, self._cut_eos = add_bos and bos != "", add_eos and eos != ""

    def __repr__(self) -> str:
        return f"<ChatTemplate {self.source[:40]!r}{'...' if len(self.source) > 40 else ''}>"

    def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: Iterable[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of messages.

        messages               each ``{"role": ..., "content": ...}``: content a text, or a list of
                               ``{"type": "text", "text": ...}``; an assistant's may have ``tool_calls`` and
                               ``reasoning_content``, a tool's ``tool_call_id`` and ``name``, in OpenAI's form
        tools                  each ``{"type": "function", "function": {"name", "description", "parameters"}}``
        add_generation_prompt  end with what starts the assistant's answer
        variables              what else the template is to know, such as ``{"enable_thinking": False}``

        A system message that the template does not take is put in front of the message after it. Raises ParamsError for
        messages or tools that are none, and with the template's own words where it refuses them.
        """
        read, functions = self._prepare(read_messages(messages)), read_tools(tools)
        given = self._variables(read, functions, add_generation_prompt) | dict(variables or {})
        try:
            text = self._program.render(given)
        except TemplateRefusal as refusal:
            words = str(refusal) or "it does not say why"
            stop = "" if words.endswith((".", "!", "?")) else "."
            raise ParamsError(f"The chat template refuses the messages: {words}{stop}") from None
        except TemplateError as error:
            raise ParamsError(f"The chat template can not be filled in with the messages: {error}.") from error
        if self._cut_bos:
            text = text.removeprefix(self._bos)
        return text.removesuffix(self._eos) if self._cut_eos else text

    @cached_property
    def abilities(self) -> Abilities:
        """What the template takes."""

        def render(messages: list[Message], tools: list[dict[str, Any]]) -> str | None:
            try:
                return self._program.render(self._variables(self._move_reasoning(messages), tools, True))
            except (TemplateRefusal, TemplateError):
                return None

        return try_out(render)

    def _variables(self, messages: list[Message], tools: list[dict[str, Any]], prompt: bool) -> dict[str, Any]:
        now = datetime.now()
        variables = {
            "messages": messages,
            "bos_token": self._bos,
            "eos_token": self._eos,
            "enable_thinking": True,
            "datetime": now.strftime("%b %d %Y"),
            "date_string": now.strftime("%d %b %Y"),
        }
        if tools:
            variables["tools"] = tools
        if prompt:
            variables["add_generation_prompt"] = True
        return variables

    def _prepare(self, messages: list[Message]) -> list[Message]:
        """Messages in the form that the template takes."""
        abilities = self.abilities
        if abilities.string_content and not abilities.typed_content:
            map_content(messages, lambda content: content if isinstance(content, str) else join_text(content))
        elif abilities.typed_content and not abilities.string_content:
            map_content(
                messages, lambda content: [{"type": "text", "text": content}] if isinstance(content, str) else content
            )
        if "<|channel|>" not in self.source:  # gpt-oss has a developer's role of its own
            for message in messages:
                if message["role"] == "developer":
                    message["role"] = "system"
        if not abilities.system and messages[0]["role"] == "system":
            messages = _merge_system(messages)
        if abilities.object_arguments:
            parse_arguments(messages)
        return self._move_reasoning(messages)

    def _move_reasoning(self, messages: list[Message]) -> list[Message]:
        """Reasoning where the templates of some families look for it."""
        is_gpt_oss = "<|channel|>" in self.source
        is_lfm2 = "<|tool_list_start|>" in self.source or "List of tools: [" in self.source
        is_mistral = all(mark in self.source for mark in ("[SYSTEM_PROMPT]", "[TOOL_CALLS]", "[ARGS]"))
        for message in messages:
            reasoning = message.get("reasoning_content")
            if reasoning is not None and (is_gpt_oss or is_lfm2):
                message["thinking"] = reasoning
                if is_gpt_oss and message.get("tool_calls"):
                    del message["content"]
            elif is_mistral and "[CALL_ID]" not in self.source and message["role"] in ("system", "assistant"):
                content = message["content"]
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                thinking = [{"type": "thinking", "thinking": reasoning}] if reasoning is not None else []
                message.pop("reasoning_content", None)
                message["content"] = [*thinking, *parts]
        return messages


def _merge_system(messages: list[Message]) -> list[Message]:
    """Put a system message in front of the message after it. Raises ParamsError when there is none."""
    if len(messages) == 1:
        raise ParamsError("The chat template takes no system message, and there is no other to put it in front of.")
    system, first = messages[0]["content"], messages[1]["content"]
    if isinstance(system, str) and isinstance(first, str):
        merged: Any = f"{system}\n{first}"
    else:
        merged = [
            part
            for content in (system, first)
            for part in ([{"type": "text", "text": content}] if isinstance(content, str) else content)
        ]
    return [messages[1] | {"content": merged}, *messages[2:]]
