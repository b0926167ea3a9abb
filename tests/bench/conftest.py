"""Shared by the tests of the benchmarks."""

from typing import Any

import pytest
from bench_records import CEILINGS

from bench.process import Worker


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of implementations compile without optimisations and in short chains, and no ceilings are measured."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JLLAMA_BENCH_CHAIN", "3")
    ask = Worker.ask

    def quick(self: Worker, do: str, limit_s: float, **fields: Any) -> dict[str, Any]:
        return dict(CEILINGS) if do == "ceilings" else ask(self, do, limit_s, **fields)

    monkeypatch.setattr(Worker, "ask", quick)
