"""Shared by the tests of the benchmarks."""

import json
from typing import Any

import pytest
from bench_records import CEILINGS

from bench.peers import _worker
from bench.process import Worker


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of implementations compile short chains, and no ceilings are measured."""
    monkeypatch.setenv("JLLAMA_BENCH_CHAIN", "3")
    ask = Worker.ask

    def quick(self: Worker, do: str, limit_s: float, **fields: Any) -> dict[str, Any]:
        return dict(CEILINGS) if do == "ceilings" else ask(self, do, limit_s, **fields)

    monkeypatch.setattr(Worker, "ask", quick)


class InProcess:
    """`bench.process.Worker` without a process: the same requests and replies."""

    dead = None

    def __init__(self, peer: str, python: str = "", *, alone: bool = False) -> None:
        self.peer, self.state = peer, dict[str, Any]()

    def ask(self, do: str, limit_s: float, **fields: Any) -> dict[str, Any]:
        reply = _worker._answer(self.peer, json.loads(json.dumps({"do": do, **fields})), self.state)
        return json.loads(json.dumps(reply))

    def close(self) -> None: ...

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bench.process", "bench.reference"):
        monkeypatch.setattr(f"{module}.Worker", InProcess)
    monkeypatch.setattr("jllama.compilation.enable_cache", lambda folder: None)
