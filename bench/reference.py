"""The process that knows the truth: our XLA path, which checks every other's tokens, and measures the ceilings."""

import threading
from typing import Any

from bench.process import PeerFailed, Worker
from bench.workloads import VERIFIED

# How far below the reference's largest logit a token may lie, in standard deviations of the logits, and still be a
# tie that rounding decides. A wrong model's tokens lie several off.
TOLERANCE = {"f32": 1e-3, "bf16": 0.15, "f16": 0.05, "int8": 0.3, "int4": 0.3}
AGREEMENT = 0.97  # of the tokens that are checked


class Reference:
    """Open for the whole run."""

    def __init__(self) -> None:
        self.worker = Worker("ours")
        self._lock = threading.Lock()  # several peers may be warming up at once
        self.worker.ask("open", 120, job={"model": None})
        self.hello: dict[str, Any] = self.ask("hello", 120)
        self.dtype = ""
        self._job: dict[str, Any] | None = None

    def ask(self, do: str, limit_s: float, **args: Any) -> dict[str, Any]:
        """One of what `bench.peers.ours.Ours` offers."""
        with self._lock:
            return self.worker.ask(do, limit_s, args=args)

    def ceilings(self, dtype: str, working_set: int) -> dict[str, float]:
        """Measured now, with no model loaded."""
        return self.ask("ceilings", 300, dtype=dtype, working_set=working_set)

    def open(self, job: dict[str, Any]) -> None:
        """Load the model of a job; float weights where the job's are quantised by the peers, each in its way."""
        self.dtype = job["dtype"]
        self.worker.ask("open", 600, job=job | {"backend": "xla"})

    def close_model(self) -> None:
        """Let go of the weights."""
        self.worker.ask("open", 60, job={"model": None})

    def verify(self, prompts: list[list[int]], ids: list[list[int]]) -> dict[str, Any]:
        """Check the first and the last row. ``passed`` is also true of a peer that gives out no tokens: the record
        says that they were not checked."""
        if not any(ids):
            return {"passed": True, "agreement": None, "worst": 0.0}
        gaps: list[float] = []
        for row in sorted({0, len(prompts) - 1}):
            new = ids[row][:VERIFIED]
            if not new:
                return {"passed": False, "agreement": 0.0, "worst": float("inf")}
            try:
                gaps += self.ask("score", 300, prompt=prompts[row], ids=new)["gaps"]
            except PeerFailed as error:
                raise PeerFailed(f"the reference could not check it: {error}") from None
        agreement = sum(g <= TOLERANCE[self.dtype] for g in gaps) / len(gaps)
        return {"passed": agreement >= AGREEMENT, "agreement": agreement, "worst": max(gaps)}

    def __enter__(self) -> "Reference":
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()
