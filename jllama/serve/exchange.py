"""What one request holds in the server, from its admission until everything is released."""

import time
from typing import Any

from jllama.serve.gate import Gate
from jllama.serve.metrics import Metrics
from jllama.serve.running import Running


class Exchange:
    """Made when a request is admitted. `close` ends it, and may be called again. ``facts`` go to the access log."""

    def __init__(self, gate: Gate, metrics: Metrics, facts: dict[str, Any], rows: int) -> None:
        gate.enter(rows)
        self.running: Running | None = None
        self._gate, self._metrics, self._facts, self._rows = gate, metrics, facts, rows
        self._began, self._open = time.perf_counter(), True

    def close(self) -> None:
        """Free the rows, update the metrics, and make room for other requests."""
        if not self._open:
            return
        self._open = False
        self._gate.leave(self._rows)
        if (running := self.running) is None:
            return
        running.close()
        self._metrics.ended(running, time.perf_counter() - self._began)
        finishes = {running.finishes.get(row, "abort") for row in range(len(running.run.requests))}
        self._facts |= {
            "rows": running.run.rows,
            "prompt_tokens": running.prompt_tokens,
            "completion_tokens": running.completion_tokens,
            "finish": "+".join(sorted(finishes)),
        }
