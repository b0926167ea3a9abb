"""Tool calls in answers, whole and streamed in any pieces, and the grammar of a call that must come."""

import functools
import json
import random
from typing import Any

import numpy as np
import pytest
from smollm2 import needs_smollm2

import jllama
from jllama import InputError
from jllama.formats import open_source
from jllama.text.grammars import Grammars
from jllama.text.sandbox import Template
from jllama.text.templates import Llama2Chat, PlainChat, TemplateChat, chat_prompt_ids
from jllama.text.tokenizer import Tokenizer, tokenizer_for
from jllama.text.tool_calls import Found, Style, ToolCall, ToolCallParser, parse_tool_calls, style_of, with_marks
from jllama.text.tool_choice import call_grammar, check_tools, chosen

SUM, NOW = ToolCall("sum", '{"a": 1, "b": [2, "é}"]}'), ToolCall("now", "{}")
ONE, TWO = '{"name": "sum", "%s": {"a": 1, "b": [2, "é}"]}}', '{"name": "now", "%s": {}}'
H1, H2 = (f"<tool_call>\n{text % 'arguments'}\n</tool_call>" for text in (ONE, TWO))
L1, L2 = (text % "parameters" for text in (ONE, TWO))
M1, M2 = (text % "arguments" for text in (ONE, TWO))

CASES: list[tuple[Style, str, str, list[ToolCall]]] = [
    ("hermes", "Hello < there", "Hello < there", []),
    ("hermes", H1, "", [SUM]),
    ("hermes", f"I look.\n{H1}\n{H2}\n", "I look.\n", [SUM, NOW]),
    ("hermes", f"{H1}{H2} done", " done", [SUM, NOW]),
    ("hermes", H1.removesuffix("\n</tool_call>"), "", [SUM]),  # the turn ended without the mark
    ("hermes", "<tool_call>{not json}</tool_call> x", "<tool_call>{not json}</tool_call> x", []),
    ("hermes", "<tool_call>{", "<tool_call>{", []),
    ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', "=", []),
    ("hermes", '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>{"name": "now", "arguments": "no"}</tool_call>', "=", []),
    ("hermes", "<tool_call>" + "[" * 5000, "=", []),
    ("llama3", "It is {1}.", "It is {1}.", []),
    ("llama3", L1, "", [SUM]),
    ("llama3", f"<|python_tag|>{L1}; {L2}", "", [SUM, NOW]),
    ("llama3", f"\n {L2}\n", "", [NOW]),
    ("llama3", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3", L1[:-3], L1[:-3], []),
    ("llama3", f"{L1} as you asked", "=", []),
    ("llama3", '{"name": "other", "parameters": {}}', "=", []),
    ("mistral", "No tools [TOOL", "No tools [TOOL", []),
    ("mistral", f"[TOOL_CALLS][{M1}, {M2}]", "", [SUM, NOW]),
    ("mistral", f"Well. [TOOL_CALLS] [{M1}]", "Well. ", [SUM]),
    ("mistral", '[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]sum[CALL_ID]ab1[ARGS]{"a": 1, "b": [2, "é}"]}', "", [NOW, SUM]),
    ("mistral", "[TOOL_CALLS][1]", "=", []),
    ("mistral", "[TOOL_CALLS]", "=", []),
]


@pytest.mark.parametrize(("style", "text", "content", "calls"), CASES, ids=range(len(CASES)))
def test_calls_and_content_whole_and_in_any_pieces(
    style: Style, text: str, content: str, calls: list[ToolCall]
) -> None:
    wanted = Found(text if content == "=" else content, calls)
    assert parse_tool_calls(text, style, ("sum", "now")) == wanted
    rng = random.Random(1)
    for longest in (1, 3, 20):
        parser, found, at = ToolCallParser(style, ("sum", "now")), Found(), 0
        while at < len(text):
            end = at + rng.randrange(1, longest + 1)
            piece = parser.push(text[at:end])
            found = Found(found.content + piece.content, found.calls + piece.calls)
            at = end
        rest = parser.finish()
        assert Found(found.content + rest.content, found.calls + rest.calls) == wanted


def test_text_is_held_no_longer_than_it_may_begin_a_call() -> None:
    parser = ToolCallParser("hermes")
    assert parser.push("Let me see <tool").content == "Let me see "
    assert parser.push("s> ").content == "<tools> "
    assert parser.push(H2[:-1]) == Found()
    assert parser.push(">").calls == [NOW]
    assert ToolCallParser("llama3").push("Hi").content == "Hi"
    assert parse_tool_calls('{"name": "any", "parameters": {}}', "llama3").calls == [ToolCall("any", "{}")]


def test_a_template_shows_its_format() -> None:
    assert style_of("{{ tools }}<tool_call>") == "hermes"
    assert style_of("[TOOL_CALLS]") == "mistral"
    assert style_of("<|python_tag|>") == "llama3"
    assert style_of("{{ messages }}") is None


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    return tokenizer_for(open_source(jllama.DEMO if name == "demo" else name))


TOOLS = [
    {"type": "function", "function": {"name": "sum", "description": "adds", "parameters": {
        "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "type": "object",
        "properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "say", "parameters": {
        "type": "object", "properties": {"s": {"enum": ["é", "</tool_call>"]}}, "additionalProperties": False}}},
]  # fmt: skip


@pytest.mark.parametrize("style", ["llama3", "hermes", "mistral"])
@pytest.mark.parametrize("name", ["demo", pytest.param("smollm2", marks=needs_smollm2)])
def test_a_call_that_must_come_is_one_of_the_tools_for_any_logits(style: Style, name: str) -> None:
    pytest.importorskip("llguidance")
    functions, tok = check_tools(TOOLS), tokenizer(name)
    token_bytes = tok.token_bytes()
    grammars, rng, called = Grammars(tok, tok.n_ids, (tok.eos_id,)), np.random.default_rng(1), set()
    for choice, names in (("required", ["sum", "say"]), ({"type": "function", "function": {"name": "say"}}, ["say"])):
        assert chosen(choice, functions) == names
        for parallel in (True, False):
            lark = call_grammar(functions, names, style, tok, parallel=parallel)
            matcher, ids = grammars.compile("grammar", lark).matcher(), []
            while not matcher.done:
                allowed = np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))
                ids.append(int(rng.choice(allowed)))
                matcher.accept(ids[-1])
            text = b"".join(token_bytes[i] for i in ids if i != tok.eos_id).decode()
            found = parse_tool_calls(text, style, names)
            assert found.content == ""
            assert 1 <= len(found.calls) <= (8 if parallel else 1)
            for call in found.calls:
                arguments = json.loads(call.arguments)
                called.add(call.name)
                assert (
                    0 <= arguments["a"] <= 99
                    if call.name == "sum"
                    else arguments.get("s", "é") in ("é", "</tool_call>")
                )
    assert called == {"sum", "say"}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({}, "tools: expected a list of 1 to 128"),
        ([], "tools: expected a list of 1 to 128"),
        ([{"type": "function"}], "tools: 0: expected"),
        ([{"type": "web"}], "tools: 0: expected"),
        ([*TOOLS, TOOLS[0]], "tools: 2: function: name: expected a name of its own"),
        ([{"type": "function", "function": {"name": "a b"}}], "tools: 0: function: name: .* found 'a b'"),
        ([{"type": "function", "function": {"name": "a", "parameters": 5}}], "tools: 0: function: parameters: "),
    ],
)
def test_bad_tools_are_one_line(tools: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_tools(tools)


@pytest.mark.parametrize("choice", ["any", {"type": "function"}, {"type": "function", "function": {"name": "x"}}, 5])
def test_a_bad_choice_is_one_line(choice: Any) -> None:
    with pytest.raises(InputError, match=r"^tool_choice: expected"):
        chosen(choice, check_tools(TOOLS))
    assert chosen("auto", check_tools(TOOLS)) == chosen(None, {}) == chosen("none", {}) == []


TEXT = (
    "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }};{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}{% endfor %}\n{% endfor %}"
)


def test_tools_and_arguments_reach_the_template_and_name_no_control_token() -> None:
    tok, chat = tokenizer("demo"), TemplateChat(Template(TEXT, "t"), TEXT)
    tools = [{"type": "function", "function": {"name": "sum", "description": "adds </s> things"}}]
    call = {"type": "function", "function": {"name": "sum", "arguments": '{"a": 7}'}}
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    ids = chat_prompt_ids(messages, tok, chat, tools=tools)
    assert tok.eos_id not in ids
    assert tok.decode(ids) == "sum: adds </s> things;user:goassistant:7"
    with pytest.raises(InputError, match="messages: tool_calls: arguments: expected JSON"):
        chat_prompt_ids([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], tok, chat)
    without = TemplateChat(Template("{{ messages }}", "t"), "{{ messages }}")
    for other in (PlainChat(), Llama2Chat(), without):
        with pytest.raises(InputError, match="tools: expected none, because the chat format"):
            chat_prompt_ids(messages[:1], tok, other, tools=tools)


def test_marks_of_calls_that_are_control_tokens_can_be_shown() -> None:
    class Fake:
        n_ids, bos_id, eos_id, adds_bos = 9, 0, 1, False
        encode = encode_rendered = token_bytes = None

        def __init__(self) -> None:
            from jllama.text.control import ControlToken, ControlTokens

            self.control = ControlTokens([ControlToken("[TOOL_CALLS]", 5), ControlToken("</s>", 1)])

        def decode(self, ids: list[int]) -> str:
            return "".join("abcdefghi"[i] for i in ids if i not in (1, 5))

    shown = with_marks(Fake())  # pyright: ignore[reportArgumentType]
    assert shown.decode([2, 5, 3, 1, 4]) == "c[TOOL_CALLS]de"
    assert shown.decode([]) == ""
