"""Formats, schemas, grammars and tools, as a client asks for them."""

import json
from typing import Any

import pytest
from serving import Live, messages

from jllama.serve.constraints import Tools
from jllama.serve.running import RowCalls

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
AGE = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["age"]}
AGE |= {"additionalProperties": False}


def schema(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value, "strict": True, **more}}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_is_one_of_its_schema(live: Live, path: str, streams: bool) -> None:
    body: dict[str, Any] = dict(response_format=schema(AGE), temperature=1.0, seed=3, n=2, max_tokens=60)
    chat = path == CHAT
    body |= dict(messages=messages("How old?")) if chat else dict(prompt="How old?")
    if streams:
        parts = [part for chunk in live.events(path, body) for part in chunk["choices"]]
        texts = [
            "".join((p["delta"].get("content", "") if chat else p["text"]) for p in parts if p["index"] == row)
            for row in range(2)
        ]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["stop", "stop"]
    else:
        choices = live.post(path, body).json()["choices"]
        texts = [choice["message"]["content"] if chat else choice["text"] for choice in choices]
        assert [choice["finish_reason"] for choice in choices] == ["stop", "stop"]
    for text in texts:
        found = json.loads(text)
        assert found.keys() == {"age"}
        assert 0 <= found["age"] <= 99


@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        ({"regex": "[a-c]{3}x"}, lambda text: len(text) == 4 and text[3] == "x"),
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"grammar": 'start: "a" "b"'}, lambda text: text == "ab"),
        ({"json": {"const": 7}}, lambda text: json.loads(text) == 7),
        ({"json": '{"const": 8}'}, lambda text: json.loads(text) == 8),
    ],
    ids=["regex", "choice", "grammar", "json", "json-as-text"],
)
def test_structured_outputs_of_each_kind(live: Live, asked: dict[str, Any], fits: Any) -> None:
    answer = live.complete("So", structured_outputs=asked, temperature=1.0, max_tokens=20, logprobs=0)
    (choice,) = answer["choices"]
    assert fits(choice["text"])
    assert choice["finish_reason"] == "stop"
    assert "".join(choice["logprobs"]["tokens"]).strip() == choice["text"].strip()


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
        ({"response_format": schema({"type": "no such"})}, "response_format.json_schema.schema"),
        ({"response_format": schema({"$ref": "http://example.com/x"})}, "response_format.json_schema.schema"),
        ({"response_format": schema("{}")}, "response_format.json_schema.schema"),
        ({"response_format": schema(AGE, other=1)}, "response_format.json_schema.other"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "(" * 200}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "x" * 70_000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"] * 1025}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": {"minItems": 10**9}}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_constraint_that_cannot_be_held_is_that_requests_error(live: Live, more: dict, param: str) -> None:
    assert live.refused(COMPLETIONS, {"prompt": "a", "max_tokens": 4} | more)["param"] == param
    assert live.client.get("/health").status_code == 200


def test_a_grammar_that_becomes_too_complex_ends_its_request(live: Live) -> None:
    body = {"prompt": "a", "structured_outputs": {"regex": "((a{1000}){1000}){1000}"}, "max_tokens": 4}
    assert live.refused(COMPLETIONS, body)["code"] == "dead_end"
    assert live.complete()


TOOL = {"type": "function", "function": {"name": "look", "parameters": AGE}}


def test_tools_are_refused_where_the_model_calls_none(live: Live) -> None:
    asks = {"messages": messages("Look")}
    assert live.refused(CHAT, asks | {"tools": [TOOL]})["param"] == "tools"
    assert live.refused(CHAT, asks | {"tools": [{"type": "x"}]})["param"] == "tools"
    assert live.refused(CHAT, asks | {"tool_choice": "required"})["param"] == "tool_choice"
    assert live.refused(CHAT, asks | {"tools": [TOOL], "tool_choice": "look"})["param"] == "tool_choice"
    assert live.post(CHAT, asks | {"tools": [TOOL], "tool_choice": "none", "max_tokens": 2}).status_code == 200


def calls(parallel: bool) -> RowCalls:
    return RowCalls(Tools([TOOL], {"look": AGE}, [], "hermes", parallel))


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_are_found_while_an_answer_streams(parallel: bool) -> None:
    text = 'Well. <tool_call>\n{"name": "look", "arguments": {"age": 5}}\n</tool_call>'
    text += '<tool_call>{"name": "look", "arguments": {"age": 6}}</tool_call>'
    row, content, found, finish = calls(parallel), "", [], None
    for i, letter in enumerate(text):
        piece, some, finish = row.push(letter, "stop" if i == len(text) - 1 else None)
        content, found = content + piece, found + list(some)
    assert content == "Well. "
    assert [(place, call.name, json.loads(call.arguments)["age"]) for place, call in found] == [
        (0, "look", 5), (1, "look", 6)
    ][: 2 if parallel else 1]  # fmt: skip
    assert finish == "tool_calls"
    assert calls(parallel).push("no call", "length") == ("no call", (), "length")
