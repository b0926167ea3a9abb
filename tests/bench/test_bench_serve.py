"""`bench.serve` and its client, with a server of a few lines in place of a real one. No test asserts a time."""

import asyncio
import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import client, record, serve
from bench.peers import ours_traffic
from bench.process import PeerFailed
from bench.traffic import Ask
from jllama.errors import InputError

SMALL = ["--requests", "5", "--slots", "2", "--prompt", "8", "--longest", "24", "--least", "3", "--most", "9"]


class Endpoint:
    """Streams completions of two tokens an event, cut into chunks at places that lie within lines."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.loop = asyncio.new_event_loop()
        server = self.loop.run_until_complete(asyncio.start_server(self._answer, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._server = server

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._server.close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = int(head.partition("content-length: ")[2].split()[0])
        body = json.loads(await reader.readexactly(size))
        self.bodies.append(body)
        self.keys.add(head.partition("authorization: bearer ")[2].partition("\r")[0])
        if body["model"] != "bench":
            writer.write(b'HTTP/1.1 404 Not Found\r\ncontent-length: 21\r\n\r\n{"error": "no such"}\n')
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for seen in range(2, body["max_tokens"] + 2, 2):
                used = {"completion_tokens": min(seen, body["max_tokens"])}
                self._chunk(writer, f"data: {json.dumps({'choices': [{'text': 'ä'}], 'usage': used})}\n\n")
                await writer.drain()
            if body["max_tokens"] != 7:
                self._chunk(writer, "data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    def _chunk(self, writer: asyncio.StreamWriter, text: str) -> None:
        content = text.encode()
        for part in (content[:9], content[9:]):
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.stop()


def test_the_client_counts_the_tokens_of_events(endpoint: Endpoint) -> None:
    asks = [Ask(0.0, [5, 6], 5), Ask(0.01, [7], 2)]
    timeline = client.drive(endpoint.url, "bench", asks, 0.5, key="sk-1")
    assert [[n for _, n in came] for came in timeline.came] == [[2, 2, 1], [2]]
    assert timeline.came[1][0][0] >= 0.01
    assert timeline.summary()["tokens"] == 7
    assert [body["prompt"] for body in endpoint.bodies] == [[5, 6], [7]]
    assert all(body["ignore_eos"] and body["temperature"] == 0.5 for body in endpoint.bodies)
    assert endpoint.keys == {"sk-1"}


def test_what_a_server_does_wrong_is_one_line(endpoint: Endpoint) -> None:
    with pytest.raises(InputError, match=r"expected status 200, found 404: .*no such"):
        client.drive(endpoint.url, "other", [Ask(0.0, [5], 2)], 1.0)
    with pytest.raises(InputError, match=r"ends with \[DONE\]"):
        client.drive(endpoint.url, "bench", [Ask(0.0, [5], 7)], 1.0)
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:1: "):
        client.drive("http://127.0.0.1:1", "bench", [Ask(0.0, [5], 2)], 1.0)


def test_a_server_under_traffic(
    in_process: None, endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SMALL, "--most", "12", "--url", endpoint.url, "--results", str(tmp_path)]
    argv += ["--rate", "200", "--streams", "2"]
    argv += ["--impl-version", "0.26", "--arrivals", "3", "--also", f"sh -c 'echo {{url}} > {tmp_path}/also'"]
    serve.main(argv)
    assert (tmp_path / "also").read_text().strip() == endpoint.url
    found = {r["case"]: r for r in record.read(tmp_path)}
    for case in ("http-mixed", "http-mixed-poisson", "http-streams"):
        assert (found[case]["impl"], found[case]["versions"]["vllm-serve"]) == ("vllm-serve", "0.26")
        assert found[case]["value"] > 0
        assert found[f"{case}, first"]["p99"] > 0
    poisson, mixed = (found[case]["traffic"] for case in ("http-mixed-poisson", "http-mixed"))
    assert (poisson["rate"], poisson["requests"], mixed["requests"]) == (200, 3, 5)
    assert {body["max_tokens"] for body in endpoint.bodies[-2:]} == {12}  # of the streams: all of one length
    assert endpoint.bodies[0]["max_tokens"] == 12  # of the rehearsals: as many as the traffic has at most, or 64
    assert "| http-mixed | at once | vLLM serve |" in capsys.readouterr().out


def test_what_http_costs(
    in_process: None,
    endpoint: Endpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The engine alone gets the same streams, and its rate stands beside that of the server."""
    asked: list[dict[str, Any]] = []
    stats = {"p50": 1.0, "p99": 2.0}

    class Alone:
        def __init__(self, job: dict[str, Any]) -> None:
            assert (job["batch"], job["budget"]) == (2, 512)
            self.settings = {"slots": 2}

        def traffic(self, **fields: Any) -> dict[str, Any]:
            asked.append(fields)
            return {"tokens": 100, "texts": 2, "seconds": 1e-9, "first": stats, "between": stats, "longest": None}

    monkeypatch.setattr(ours_traffic, "PEER", dataclasses.replace(ours_traffic.PEER, open=Alone))
    monkeypatch.setattr(serve, "served", lambda args, job: contextlib.nullcontext(endpoint.url))
    serve.main([*SMALL, "--most", "6", "--results", str(tmp_path), "--rate", "200"])
    found = {(r["impl"], r["case"]): r for r in record.read(tmp_path)}
    assert len(asked) == 3
    fields = asked[0]
    assert (fields["requests"], fields["least"], fields["most"]) == (2, 6, 6)
    assert found["engine", "http-streams"]["value"] == pytest.approx(1e11)
    assert found["engine", "http-streams, longest"]["why"]
    assert found["serve", "http-streams"]["value"] > 0
    assert "HTTP costs 100.0 % at 2 streams" in capsys.readouterr().out

    class Broken:
        def __init__(self, job: dict[str, Any]) -> None:
            raise PeerFailed("no such device")

    monkeypatch.setattr(ours_traffic, "PEER", dataclasses.replace(ours_traffic.PEER, open=Broken))
    (folder := tmp_path / "broken").mkdir()
    serve.main([*SMALL, "--most", "6", "--results", str(folder), "--rate", "200"])
    found = {(r["impl"], r["case"]): r for r in record.read(folder)}
    assert "no such device" in found["engine", "http-streams"]["why"]
    assert found["serve", "http-streams"]["value"] > 0  # the server is measured all the same
    assert "HTTP costs nan %" in capsys.readouterr().out


def test_the_server_has_its_own_budget() -> None:
    """The engine alone and the rehearsals get it, too, without a device in this process."""
    assert {platform: serve.default_budget(platform) for platform in ("cpu", "gpu")} == {"cpu": 512, "gpu": 4096}


def test_jllama_serve_is_started_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, said = tmp_path / "python", tmp_path / "said"
    ends = f"trap 'echo ended >> {said}; exit 0' TERM"
    fake.write_text(f'#!/bin/sh\n{ends}\necho "$@" > {said}\necho "ready at http://host:1" >&2\nsleep 30 & wait\n')
    fake.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(fake))
    args = serve.parser().parse_args(["--flags", "--tokenizer 'a b'"])
    job = {"dtype": "bf16", "model": "folder", "batch": 3, "max_len": 99, "compiled": "cache", "pages": 7, "budget": 64}
    with serve.served(args, job) as url:
        assert url == "http://host:1"
    command, ended = said.read_text().splitlines()
    assert "serve --model folder" in command
    assert "--slots 3 --max-seq-len 99 --budget 64" in command
    assert command.endswith("--pages 7 --tokenizer a b")
    assert ended == "ended"
    fake.write_text("#!/bin/sh\necho 'jllama serve: error: no model' >&2\nexit 2\n")
    expected = pytest.raises(InputError, match="expected its ready line, found jllama serve: error: no model")
    with expected, serve.served(args, job):
        pass
