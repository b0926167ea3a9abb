"""What cannot be honoured is refused by name, whatever is sent; the server goes on."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Live, messages

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NOBODY = {"role": "nobody", "content": "x"}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}

# A field of a completion, a value that it cannot have.
WRONG: list[tuple[str, Any]] = [
    ("prompt", None),
    ("prompt", []),
    ("prompt", [[]] * 129),
    ("prompt", ["a"] * 129),
    ("prompt", [1, "a"]),
    ("prompt", [[1], "a"]),
    ("prompt", [1.5]),
    ("prompt", [True]),
    ("prompt", [-1]),
    ("prompt", [10**9]),
    ("prompt", [10**400]),
    ("prompt", {"text": "a"}),
    ("prompt", "a\ud800"),
    ("n", 0),
    ("n", -1),
    ("n", 10**6),
    ("n", 10**9),
    ("n", "2"),
    ("n", 1.0),
    ("n", True),
    ("max_tokens", -1),
    ("max_tokens", 0),
    ("max_tokens", 10**18),
    ("max_tokens", 100_000),
    ("max_tokens", "many"),
    ("temperature", -0.1),
    ("temperature", 1e9),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 2**40),
    ("min_p", 1),
    ("seed", 2**64),
    ("seed", 0.5),
    ("stop", ["a"] * 17),
    ("stop", "a" * 257),
    ("stop", ""),
    ("stop", [1]),
    ("stop", ["a", "\udfff"]),
    ("stop_token_ids", [1] * 17),
    ("stop_token_ids", list(range(3, 19))),
    ("stop_token_ids", ["a"]),
    ("min_tokens", 17),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"1": "x"}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"99999": 1}),
    ("logit_bias", {str(i): 1 for i in range(305)}),
    ("logit_bias", [1]),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logprobs", True),
    ("echo", 1),
    ("best_of", 2),
    ("suffix", "the end"),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("store", True),
    ("service_tier", "flex"),
    ("user", "u" * 257),
    ("user", 5),
    ("cache_salt", ""),
    ("model", 7),
    ("messages", [{"role": "user", "content": "x"}]),
    ("chat_template", "{{ 1 }}"),
    ("__class__", "x"),
    ("a" * 5000, 1),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda v: str(v)[:24])
def test_a_completion_is_refused_by_field(live: Live, field: str, value: Any) -> None:
    error = live.refused(COMPLETIONS, {"prompt": "a"} | {field: value})
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == field[: len(field) if len(field) <= 64 else 61]
    assert error["message"].startswith(error["param"])


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("messages", [], "messages"),
        ("messages", "hello", "messages"),
        ("messages", [NOBODY], "messages.0.role"),
        ("messages", [IMAGE], "messages.0.content"),
        ("messages", [{"role": "user"}], "messages.0.content"),
        ("messages", [{"role": "user", "content": 7}], "messages.0.content"),
        ("messages", [{"role": "user", "content": "a\ud834"}], "messages.0.content"),
        ("messages", [{"role": "user", "content": "x", "evil": 1}], "messages.0.evil"),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": "a"}] * 1025}], "messages.0.content"),
        ("messages", [{"role": "user", "content": "x"}] * 4097, "messages"),
        ("messages", ["x"] * 3, "messages.0"),
        ("messages", [{"role": "user", "content": "word " * 2000}], "max_tokens"),
        ("top_logprobs", 2, "top_logprobs"),
        ("logprobs", 1, "logprobs"),
        ("max_completion_tokens", 0, "max_completion_tokens"),
        ("functions", [{"name": "f"}], "functions"),
        ("modalities", ["audio"], "modalities.0"),
        ("prompt", "a", "prompt"),
        ("chat_template", "{{ ''.__class__ }}", "chat_template"),
        ("chat_template_kwargs", {}, "chat_template_kwargs"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_an_answer_is_refused_by_field(live: Live, field: str, value: Any, param: str) -> None:
    error = live.refused(CHAT, {"messages": messages("Hello")} | {field: value})
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")


def test_both_names_of_a_limit_must_agree(live: Live) -> None:
    body = {"messages": messages("Hello"), "max_tokens": 3, "max_completion_tokens": 4}
    assert live.refused(CHAT, body)["param"] == "max_completion_tokens"


def test_a_prompt_and_a_limit_beyond_the_context_say_so(live: Live) -> None:
    error = live.refused(COMPLETIONS, {"prompt": "a", "max_tokens": 512})
    assert error["code"] == "context_length_exceeded"
    assert "512 tokens" in error["message"]


def test_echo_tells_one_likeliest_token_at_most(live: Live) -> None:
    assert live.refused(COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 2})["param"] == "logprobs"
    assert live.refused(COMPLETIONS, {"prompt": ["a"] * 100, "n": 2})["param"] == "n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"[]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'"text"', "expected a JSON object"),
        (b'{"prompt": "\xff"}', "expected UTF-8"),
        (b'{"prompt": "a", "temperature": NaN}', "finite"),
        (b'{"prompt": "a", "temperature": -Infinity}', "finite"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "finite"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "depth"),
        (b'{"prompt": ' + b"[" * 80 + b"]" * 80 + b"}", "nested"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested"),
        (b'{"prompt": "a"} x', "expected JSON"),
        (b"\x00\x01", "expected JSON"),
    ],
    ids=lambda v: str(v[:20]),
)
def test_a_body_that_is_no_json_object_is_refused(live: Live, content: bytes, says: str) -> None:
    assert says in live.refused(COMPLETIONS, content)["message"]


def test_other_content_types_are_refused(live: Live) -> None:
    """What a web page may send without asking the server first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = live.client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": kind})
        assert answer.status_code == 415
        assert answer.json()["error"]["message"].startswith("content-type")


def test_an_unknown_model_is_not_found_and_an_alias_is(live: Live) -> None:
    assert live.refused(COMPLETIONS, {"prompt": "a", "model": "gpt-4"}, 404)["code"] == "model_not_found"
    assert live.complete("a", model="alias")["model"] == "demo"


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/../../etc/passwd", "//etc/passwd", "/%2e%2e/x", "/docs"])
def test_other_paths_are_not_found(live: Live, path: str) -> None:
    answer = live.client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
    assert live.client.get(COMPLETIONS).status_code == 405


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": messages("a")}, "prompt"),
        ({"messages": [NOBODY]}, "messages.0.role"),
        ({"prompt": 1}, "prompt"),
    ],
)
def test_tokenize_refuses_by_field(live: Live, body: dict[str, Any], param: str) -> None:
    assert live.refused("/tokenize", body)["param"] == param


@pytest.mark.parametrize("tokens", [None, "a", [-1], [2**40], ["a"], [1.0]])
def test_detokenize_refuses_by_field(live: Live, tokens: Any) -> None:
    assert live.refused("/detokenize", {"tokens": tokens})["param"].split(".")[0] == "tokens"


NAMES = [
    "prompt",
    "messages",
    "n",
    "max_tokens",
    "temperature",
    "top_p",
    "stop",
    "logprobs",
    "logit_bias",
    "stream",
    "seed",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
BODIES = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=12), VALUES, max_size=6)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES, chat=st.booleans())
def test_any_body_gets_an_answer_or_an_error_object(live: Live, body: dict[str, Any], chat: bool) -> None:
    content = json.dumps({"max_tokens": 1} | body).encode()
    path = CHAT if chat else COMPLETIONS
    answer = live.client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["type"]
    assert live.client.get("/health").status_code == 200
