"""Chat templates: the same text as llama-server makes of them, and what is refused."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_shapes import CALL, CHATS, RESULT, SHAPES, WEATHER
from helpers.tiny_model import write_tiny_model

from llamamix import Model, ModelError, ParamsError, ServerError
from llamamix.chat import ChatTemplate
from llamamix.server import Server, find_server

USER = {"role": "user", "content": "Hello"}

#
# against llama-server
#


class Peer:
    """A llama-server's /apply-template."""

    def __init__(self, model: Path, template: Path | None) -> None:
        flags = ["-c", "256", "-np", "1", "-t", "1", "-tb", "1", "--port", "0", "--no-warmup"]
        own = ["--chat-template-file", template] if template else []
        self.server = Server(["-m", model, *flags, *own], None, program=find_server())
        self.url = self.server.wait_ready(60)

    def apply(self, chat: dict[str, Any]) -> str | None:
        """The text, None: the template refuses the messages."""
        body = {key: value for key, value in chat.items() if key != "variables"}
        body["chat_template_kwargs"] = chat.get("variables", {})
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/apply-template", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["prompt"]
        except urllib.error.HTTPError as error:
            with error:
                assert "Jinja Exception" in json.load(error)["error"]["message"]
                return None


def ours(model: Model, chat: dict[str, Any], template: str | None = None) -> str | None:
    try:
        return model.apply_chat_template(**chat, template=template)
    except ParamsError as error:
        assert str(error).startswith("The chat template refuses the messages: ")
        return None


@pytest.fixture(scope="module")
def need_server() -> None:
    try:
        find_server()
    except ServerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=SHAPES)
def shape(
    request: pytest.FixtureRequest, need_server: None, tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Peer]]:
    """A template, and a server that uses it."""
    template = SHAPES[request.param]
    path = tmp_path_factory.mktemp("templates") / "template.jinja"
    path.write_text(template, encoding="utf-8")
    peer = Peer(tiny_model_path, path)
    yield template, peer
    peer.server.stop()


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_a_template_gives_the_servers_text(tiny_model: Model, shape: tuple[str, Peer], chat: dict[str, Any]) -> None:
    template, peer = shape
    text = peer.apply(chat)
    # the date may change in between, once
    assert text in (ours(tiny_model, chat, template), ours(tiny_model, chat, template))
    assert text is None or "hello" in text.lower() or "Hello" not in json.dumps(chat)


def test_most_shapes_take_most_chats(tiny_model: Model) -> None:
    """What is refused counts as equal above, so it must not be much."""
    refused = [sum(ours(tiny_model, chat, template) is None for chat in CHATS.values()) for template in SHAPES.values()]
    assert max(refused) == 4
    assert sum(n > 0 for n in refused) == 4  # roles that alternate, one call at once


@pytest.mark.parametrize("name", ["smollm2", "tiny"])
def test_a_models_own_template_gives_the_servers_text(
    name: str, need_server: None, tiny_model_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tiny_model_path if name == "tiny" else request.getfixturevalue("smollm2_path")
    with Model(path, vocab_only=True) as model:
        peer = Peer(path, None)
        try:
            for chat in CHATS.values():
                assert ours(model, chat) == peer.apply(chat)
        finally:
            peer.server.stop()


def test_smollm2_has_its_default_system_message(smollm2_path: Path) -> None:
    with Model(smollm2_path, vocab_only=True) as model:
        text = model.apply_chat_template([USER])
        assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging")
        assert "SmolLM" not in model.apply_chat_template([{"role": "system", "content": "Be brief."}, USER])


#
# what a template gets
#


def render(source: str, messages: list[dict[str, Any]] = [USER], **options: Any) -> str:  # noqa: B006
    return ChatTemplate(source, bos="<s>", eos="</s>").render(messages, **options)


def test_functions_of_hugging_face() -> None:
    assert render("{{ strftime_now('%Y') | length }}") == "4"
    assert render("{{ {'b': [1, none, 'ü<']} | tojson }}") == '{"b": [1, null, "ü<"]}'
    assert render("{{ [1, {}] | tojson(indent=1, separators=(',', ':')) }}") == "[\n 1,\n {}\n]"
    assert render("{{ nothing | tojson }}") == "null"
    assert render("{% for i in [1, 2, 3] %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "12"
    assert render("{% generation %}{{ bos_token }}{% endgeneration %}") == "<s>"


def test_variables() -> None:
    assert render("{{ enable_thinking }} {{ depth }}", variables={"enable_thinking": False, "depth": 3}) == "False 3"
    assert render("{{ enable_thinking }} {{ depth is defined }}") == "True False"
    assert render("{{ add_generation_prompt is defined }}", add_generation_prompt=False) == "False"
    assert render("{{ tools is defined }}", tools=[]) == "False"


def test_tokens_that_tokenizing_adds_are_left_out(tiny_model: Model) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    assert tiny_model.apply_chat_template([USER], template=template) == "Hello</s>"  # bos is added, eos is not
    assert tiny_model.tokenize("Hello</s>", parse_special=True)[0] == tiny_model.bos
    added = ChatTemplate(template, bos="<s>", eos="</s>", add_bos=True, add_eos=True)
    assert added.render([USER]) == "Hello"
    assert ChatTemplate("{{ messages[0].content }}", add_bos=True, add_eos=True).render([USER]) == "Hello"


def test_other_keys_of_a_message_reach_the_template() -> None:
    assert render("{{ messages[0].mood }}", [USER | {"mood": "good"}]) == "good"


def test_the_callers_messages_are_not_changed() -> None:
    chat = CHATS["thought, then a call"]
    before = json.dumps(chat)
    for source in SHAPES.values():
        ChatTemplate(source).render(**chat) if "alternate" not in source else None
    assert json.dumps(chat) == before


def test_a_template_for_tools(tmp_path: Path) -> None:
    templates = [
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "tool_use", "template": "{{ tools | length }} tools: {{ messages[0].content }}"},
    ]
    path = write_tiny_model(tmp_path / "m.gguf", n_layer=1, chat_template=templates)
    with Model(path, vocab_only=True) as model:
        assert model.apply_chat_template([USER], tools=[WEATHER]) == "1 tools: Hello"
        for tools in (None, [], iter([])):
            assert model.apply_chat_template([USER], tools=tools) == "Hello"
        assert model.apply_chat_template([USER], tools=iter([WEATHER, WEATHER])) == "2 tools: Hello"


#
# what is refused
#


def test_a_template_refuses_in_its_own_words(tiny_model: Model) -> None:
    template = SHAPES["alternating"]
    with pytest.raises(ParamsError, match=r"refuses the messages: Conversation roles must alternate user/assistant/.*"):
        tiny_model.apply_chat_template([USER, USER], template=template)
    with pytest.raises(ParamsError, match=r"refuses the messages: Only user and assistant roles are supported!$"):
        tiny_model.apply_chat_template([USER, RESULT], template=template)
    with pytest.raises(ParamsError, match=r"refuses the messages: No\.$"):
        render("{{ raise_exception('No') }}")


def test_a_system_message_that_has_no_place() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert render(SHAPES["refuses system"], [system, USER]).startswith("<s><start_of_turn>user\nBe brief.\nHello<")
    with pytest.raises(ParamsError, match="takes no system message"):
        render(SHAPES["refuses system"], [system])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].__class__.__mro__ }}",
        "{{ ''.__class__.__name__ }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include 'other' %}",
    ],
)
def test_a_template_stays_in_its_sandbox(source: str) -> None:
    with pytest.raises(ParamsError, match="can not be filled in"):
        render(source)


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'a' | no_such_filter }}", "{{ messages", "{% endif %}"])
def test_what_is_no_template(tiny_model: Model, source: str) -> None:
    with pytest.raises(ModelError, match=r"not a Jinja template: .*, line 1\."):
        tiny_model.apply_chat_template([USER], template=source)


def test_a_template_that_fails(tiny_model: Model) -> None:
    with pytest.raises(ParamsError, match="can not be filled in with the messages: 'x' is undefined"):
        tiny_model.apply_chat_template([USER], template="{{ x.y }}")


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ("Hi", "list of messages"),
        (USER, "list of messages"),
        (7, "list of messages"),
        ([], "no messages"),
        (["Hi"], "A message must be"),
        ([{"content": "Hi"}], "role"),
        ([{"role": "", "content": "Hi"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": None}], "content"),
        ([{"role": "assistant", "content": None}], "content"),
        ([{"role": "user", "content": []}], "content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "part"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part"),
        ([{"role": "user", "content": b"Hi"}], "JSON"),
        ([USER | {"name": 7}], "name"),
        ([USER | {"mood": {1}}], "JSON"),
        ([{"role": "assistant", "tool_calls": "weather"}], "tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}], "tool call"),
        ([{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}], "tool call"),
        ([CALL | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{"}}]}], "not JSON"),
    ],
    ids=ascii,
)  # fmt: skip
def test_what_are_no_messages(messages: Any, named: str) -> None:
    with pytest.raises(ParamsError, match=named):
        ChatTemplate(SHAPES["tools"]).render(messages)


@pytest.mark.parametrize(
    "tools",
    ["weather", WEATHER, 7, [{"name": "f"}], [{"type": "function"}], [{"type": "function", "function": {}}],
     [{"type": "function", "function": {"name": "f", "parameters": "{}"}}]],
    ids=ascii,
)  # fmt: skip
def test_what_are_no_tools(tiny_model: Model, tools: Any) -> None:
    with pytest.raises(ParamsError, match="tool"):
        tiny_model.apply_chat_template([USER], tools=tools)


def test_templates_by_name_know_texts_only(tiny_model: Model) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]}]
    assert "One\ntwo" in tiny_model.apply_chat_template(parts, template="llama2")
    with pytest.raises(ParamsError, match="nothing else"):
        tiny_model.apply_chat_template([USER | {"name": "x"}], template="llama2")
    with pytest.raises(ParamsError, match="NUL"):
        tiny_model.apply_chat_template([{"role": "user", "content": "a\0b"}], template="llama2")
    for options in ({"tools": [WEATHER]}, {"variables": {"a": 1}}):
        with pytest.raises(ParamsError, match="only Jinja"):
            tiny_model.apply_chat_template([USER], template="llama2", **options)
    with pytest.raises(ParamsError, match="template must be"):
        tiny_model.apply_chat_template([USER], template=7)
