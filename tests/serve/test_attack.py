"""A part of the attack of `tests/support/attack.py`; all of it, on a process, is ``make attack``."""

import asyncio
import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest
from attack import TEMPLATE, Report, attack, complaints, judge, leftovers
from hostile_http import KEY, KINDS, Shot
from serving import Live, http

from jllama import DEMO, LM

HOSTS = ("127.0.0.1", "Box.Example")


@pytest.fixture(scope="module")
def attacked(make_live: Callable[..., Live]) -> Live:
    """With a key, names, and a template that calls tools."""
    return make_live(LM.load(DEMO, chat_template=TEMPLATE), names=("demo",), api_keys=(KEY,), hosts=HOSTS)


def test_hostile_requests_leave_the_server_as_it_was(attacked: Live, capfd: pytest.CaptureFixture[str]) -> None:
    report = Report()
    asyncio.run(attack(attacked.port, list(range(len(KINDS))), 1, report))
    report.wrong += leftovers(attacked.port) + complaints(capfd.readouterr().err)
    assert not report.wrong, report.text()
    assert len(report.answers) == len(set(KINDS))


def answer(status: int, body: bytes = b"{}") -> bytes:
    return b"HTTP/1.1 %d X\r\n\r\n%b" % (status, body)


@pytest.mark.parametrize(
    ("received", "wrong"),
    [
        (answer(200), ""),
        (answer(400), ""),
        (answer(100) + answer(200), ""),
        (answer(500), "failed"),
        (answer(404), "expected one of"),
        (answer(200) * 2, "at most 1"),
        (answer(400, b'Traceback (most recent call last):\n  File "x"'), "tells"),
        (answer(200, b"/smuggled: not found"), "smuggled"),
        (answer(200) + b"(no end)", "never ends"),
        (answer(400, b"x" * 5000), "bytes"),
        (b"", "expected one of"),
    ],
)
def test_what_is_wrong_with_an_answer_is_seen(received: bytes, wrong: str) -> None:
    found = judge(Shot("x", (), statuses=(200, 400)), received)[1]
    assert wrong in found
    assert bool(found) == bool(wrong)


# What the attack found when it first ran.


@pytest.mark.parametrize("ids", [[2**31], [-1], [10**30], [5, 1024], [2.5]])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_stop_tokens_that_are_no_tokens_do_not_reach_the_engine(live: Live, path: str, ids: list[Any]) -> None:
    body = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    error = live.refused(path, body | {"stop_token_ids": ids, "max_tokens": 2})
    assert error["param"].startswith("stop_token_ids")
    assert live.complete()


def conversation(arguments: str, **more: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    return {"messages": turns, "max_tokens": 2, **more}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (conversation("[" * 300 + "]" * 300), "nested levels"),
        (conversation('"\\ud800"'), "surrogate"),
        (conversation("{}", tools=[{"type": "function", "function": {"name": "f", "description": "\ud800"}}]), "surr"),
        (conversation("{}", tools=[{"type": "function", "function": {"name": "f", "\ud800": 1}}]), "surrogate"),
    ],
    ids=["deep", "arguments", "description", "name"],
)
def test_what_a_template_cannot_render_is_that_requests_error(attacked: Live, body: dict[str, Any], says: str) -> None:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    answer = attacked.client.post("/v1/chat/completions", content=json.dumps(body), headers=headers)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "messages"


def test_a_message_is_never_a_template(attacked: Live) -> None:
    headers, text = {"authorization": f"Bearer {KEY}"}, "{{ 7*7 }}{% for a in range(9) %}x{% endfor %}<|im_end|>"
    body = {"messages": [{"role": "user", "content": text}], "add_generation_prompt": False}
    ids = attacked.post("/tokenize", body, **headers).json()["tokens"]
    assert text in attacked.post("/detokenize", {"tokens": ids}, **headers).json()["prompt"]


def test_packed_bodies_are_refused_unread(live: Live) -> None:
    content = json.dumps({"prompt": "a"}).encode()
    for coding, sent in (("gzip", gzip.compress(content)), ("br", content)):
        headers = {"content-type": "application/json", "content-encoding": coding}
        answer = live.client.post("/tokenize", content=sent, headers=headers)
        assert answer.status_code == 415
        assert answer.json()["error"]["message"].startswith("content-encoding: ")
    same = {"content-type": "application/json", "content-encoding": "identity"}
    assert live.client.post("/tokenize", content=content, headers=same).status_code == 200


def test_a_body_has_one_length(live: Live) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 5\r\n"
    with live.raw(head + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /version HTTP/1.1\r\nhost: x\r\n\r\n") as one:
        received = b""
        while part := one.recv(4096):  # until the server closes
            received += part
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"ambiguous_length" in received
    assert received.count(b"HTTP/1.1 ") == 1


def test_a_body_that_is_no_http_ends_its_request_quietly(live: Live, capfd: pytest.CaptureFixture[str]) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    for content in (head + b"-1\r\n", head + b"5\r\nabcdeXX", head.replace(b"/tokenize", b"/nothing") + b"-1\r\n"):
        with live.raw(content) as one:
            assert one.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert live.complete()
    assert not complaints(capfd.readouterr().err)


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:8000", True),
        ("localhost", True),
        ("LOCALHOST.:80", True),
        ("[::1]:8000", True),
        ("box.example", True),
        ("10.1.2.3:1", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example:80:80", False),
        ("127.0.0.1@evil.example", False),
        ("[evil]", False),
        ("", False),
    ],
)
def test_a_name_that_is_not_the_servers_is_refused(attacked: Live, live: Live, host: str, known: bool) -> None:
    """A browser tells the name that a page of another site made to point here."""
    for path in ("/", "/health", "/v1/models", "/nothing"):
        answer = attacked.client.get(path, headers={"host": host, "authorization": f"Bearer {KEY}"})
        assert (answer.status_code != 421) == known
        if not known:
            assert answer.json()["error"]["code"] == "unknown_host"
    assert live.client.get("/health", headers={"host": host}).status_code == 200  # it has no list


def test_a_client_of_http_1_0_may_name_no_host(attacked: Live) -> None:
    with attacked.raw(b"GET /health HTTP/1.0\r\n\r\n") as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_half_closed_connections_are_clients_that_left(live: Live) -> None:
    with live.raw(http("/v1/completions", {"prompt": "a", "max_tokens": 400, "ignore_eos": True})) as connection:
        connection.shutdown(1)
        connection.settimeout(30)
        assert connection.recv(4096) == b""
