"""A server in a thread of this process, and clients that are less polite than a library."""

import asyncio
import functools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2

from jllama import DEMO
from jllama.serve.routes import Service, create_app
from jllama.serve.server import bind, http_server, url_of
from jllama.text.lm import LM

SLOTS = 2


@functools.cache
def demo() -> LM:
    """The embedded model."""
    return LM.load(DEMO)


class Live:
    """A server that answers on a free port until `stop`."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._bound = bind("127.0.0.1", 0)
        self.url, self.port = url_of(self._bound), self._bound.getsockname()[1]
        self._server = http_server(create_app(service))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._bound])), daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.client = httpx2.Client(base_url=self.url, timeout=60)

    def stop(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join()

    def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx2.Response:
        return self.client.post(path, json=body, headers=headers)

    def complete(self, prompt: Any = "Once upon a time", **body: Any) -> dict[str, Any]:
        """The answer to a completion, greedy if nothing else is asked for."""
        return self._good("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 8} | body)

    def chat(self, *turns: str, **body: Any) -> dict[str, Any]:
        """The answer to a conversation, whose turns are the user's and the assistant's in turn."""
        return self._good("/v1/chat/completions", {"messages": messages(*turns), "temperature": 0} | body)

    def _good(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        """The error object of a request that is refused."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = self.client.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(answer.content) < 2000  # nothing of a large request comes back
        return error

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The objects of a stream, which must end with [DONE]."""
        with self.client.stream("POST", path, json=body | {"stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            done = False
            for line in answer.iter_lines():
                if line:
                    assert line.startswith("data: ")
                    assert not done
                    done = line == "data: [DONE]"
                    if not done:
                        yield json.loads(line.removeprefix("data: "))
            assert done

    def raw(self, content: bytes) -> socket.socket:
        """A connection on which some bytes were sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(content)
        return connection

    def idle(self) -> bool:
        """Whether nothing runs, waits or is counted."""
        now, gate = self.service.engine.statistics, self.service.gate
        return (now.running, now.waiting, gate.rows, gate.bytes) == (0, 0, 0, 0)


def messages(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def http(path: str, body: dict[str, Any], *headers: str) -> bytes:
    """The bytes of a POST request."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: test", "content-type: application/json", f"content-length: {len(content)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + content


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until a condition holds, or fail."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
