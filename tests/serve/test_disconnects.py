"""Clients that leave, or stop to read: their rows are free within a step, and nobody else notices."""

import contextlib
import socket
import struct
import time
from collections.abc import Callable

import pytest
from serving import Live, demo, http, wait_for

from jllama.device import default_device
from jllama.engine.tuning import tuning_for
from jllama.serve.connection import Connection

LONG = {"prompt": "Once", "max_tokens": 500, "ignore_eos": True, "temperature": 0}


def reset(connection: socket.socket) -> None:
    """End a connection without goodbye, as a process that is killed does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_a_client_that_leaves_frees_its_row(
    live: Live, streams: bool, leave: Callable[[socket.socket], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for(live.idle)
    engine, noticed = live.service.engine, []
    abort = engine.abort
    monkeypatch.setattr(engine, "abort", lambda *row: noticed.append(engine._engine.statistics) or abort(*row))
    connection = live.raw(http("/v1/completions", LONG | {"stream": streams}))
    wait_for(lambda: engine.statistics.running == 1)
    leave(connection)
    wait_for(live.idle)
    (then,), now = noticed, engine.statistics
    assert now.new_tokens - then.new_tokens <= max(tuning_for(default_device()).steps)  # the step under way, no other
    assert live.complete()["choices"][0]["text"] == demo().generate("Once upon a time", max_new_tokens=8).text


def test_clients_that_leave_before_an_answer_begins(live: Live) -> None:
    requests = [http("/v1/completions", LONG | {"n": n, "temperature": 1}) for n in (1, 5, 8)]
    connections = [live.raw(content[: len(content) - cut]) for content in requests for cut in (0, 1, 30)]
    for connection in connections:
        reset(connection)
    wait_for(live.idle)
    assert live.complete()


def test_a_client_that_does_not_read_holds_nobody_up(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "write_seconds", 0.5)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.connect(("127.0.0.1", live.port))
    body = LONG | {"stream": True, "n": 8, "max_tokens": 200, "temperature": 1, "logprobs": 20}
    connection.sendall(http("/v1/completions", body))
    assert live.complete()["choices"]
    wait_for(live.idle, 60)
    with contextlib.closing(connection):
        connection.settimeout(10)
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                received += part
    assert b"[DONE]" not in received


def test_events_come_one_by_one_over_a_plain_socket(live: Live) -> None:
    with live.raw(
        http("/v1/completions", LONG | {"stream": True, "max_tokens": 60}, "connection: close")
    ) as connection:
        arrivals, received = [], b""
        while part := connection.recv(1 << 16):
            received += part
            arrivals.append(time.monotonic())
    head, _, rest = received.partition(b"\r\n\r\n")
    assert b"text/event-stream" in head
    assert rest.rstrip().endswith(b"data: [DONE]\n\n\r\n0") or b"data: [DONE]" in rest
    assert len(arrivals) > 2


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no host
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"x" * 70_000,
    ],
    ids=lambda content: str(content[:40]),
)
def test_what_is_no_http_ends_its_connection_only(live: Live, content: bytes) -> None:
    with live.raw(content) as connection, contextlib.suppress(ConnectionError):
        received = connection.recv(1 << 16)
        assert received.split(b"\r\n")[0] in (b"", b"HTTP/1.1 400 Bad Request", b"HTTP/1.1 501 Not Implemented")
    assert live.client.get("/health").status_code == 200


def closes(connection: socket.socket, content: bytes = b"") -> bool:
    """Whether the server closes a connection on which bytes come one by one."""
    connection.settimeout(0.05)
    for byte in content + b"x" * 200:
        try:
            connection.sendall(bytes([byte]))
            if connection.recv(100) == b"":
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


def test_a_head_must_come_in_time(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_seconds", 0.3)
    head = b"GET /health HTTP/1.1\r\nhost: x\r\na: "
    with live.raw(b"") as silent, live.raw(b"") as slow:
        assert closes(slow, head)
        assert closes(silent)
    with live.raw(head + b"b\r\n\r\n") as second:  # a connection that has had its answer
        assert b" 200 " in second.recv(4096)
        time.sleep(0.5)  # idle ones stay
        assert closes(second, head)


def test_connections_are_bounded(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "max_connections", 5)
    with contextlib.ExitStack() as held:
        connections = [held.enter_context(live.raw(b"")) for _ in range(8)]
        assert closes(connections[-1])
    monkeypatch.undo()
    wait_for(lambda: live.client.get("/health").status_code == 200)
