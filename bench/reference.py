"""The process that knows the truth: our XLA path, which checks every other's tokens, and measures the ceilings."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.process import PeerFailed, Worker
from bench.workloads import VERIFIED
from jllama.errors import InputError

# How far below the reference's largest logit a token may lie, in standard deviations of the logits, and still be a
# tie that rounding decides. A wrong model's tokens lie several off.
TOLERANCE = {"f32": 1e-3, "bf16": 0.15, "f16": 0.05, "int8": 0.3, "int4": 0.3}
AGREEMENT = 0.9  # of the tokens that are checked: of many ties, a few are wider than the tolerance
WORST = 1.0  # standard deviations: beyond that a single token is wrong

Score = Callable[[list[int], list[int]], list[float]]  # of a prompt and its continuation, how far off each token is
UNCHECKED = {"passed": True, "agreement": None, "worst": 0.0}


class Reference:
    """Open for a whole comparison. What it compiles is kept in ``compiled`` for the next: it is not what is timed."""

    def __init__(self, compiled: Path) -> None:
        self.worker = Worker("ours")
        self._lock = threading.Lock()  # several peers may be warming up at once
        self.worker.ask("open", 120, job={"model": None, "compiled": str(compiled)})
        self.hello: dict[str, Any] = self.ask("hello", 120)

    def ask(self, do: str, limit_s: float, **args: Any) -> dict[str, Any]:
        """One of what `bench.peers.ours.Ours` offers."""
        with self._lock:
            try:
                return self.worker.ask(do, limit_s, args=args)
            except PeerFailed as error:
                kind, _, said = str(error).partition(": ")
                raise InputError(said) if kind == "InputError" else error from None

    def ceilings(self, dtype: str, working_set: int) -> dict[str, float]:
        """Measured now."""
        return self.ask("ceilings", 300, dtype=dtype, working_set=working_set)

    def open(self, job: dict[str, Any]) -> None:
        """Load the model of a job, quantised as ours are."""
        self.worker.ask("open", 600, job=job | {"backend": "xla"})

    def score(self, prompt: list[int], ids: list[int]) -> list[float]:
        """See `Score`."""
        return self.ask("score", 300, prompt=prompt, ids=ids)["gaps"]

    def __enter__(self) -> "Reference":
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()


def verify(score: Score, dtype: str, prompts: list[list[int]], ids: list[list[int]]) -> dict[str, Any]:
    """Check the first and the last row. ``passed`` is also true of a peer that gives out no tokens: the record says
    that they were not checked."""
    if not any(ids):
        return UNCHECKED
    gaps: list[float] = []
    for row in sorted({0, len(prompts) - 1}):
        new = ids[row][:VERIFIED]
        if not new:
            return {"passed": False, "agreement": 0.0, "worst": float("inf")}
        try:
            gaps += score(prompts[row], new)
        except PeerFailed as error:
            raise PeerFailed(f"the reference could not check it: {error}") from None
    agreement, worst = sum(g <= TOLERANCE[dtype] for g in gaps) / len(gaps), max(gaps)
    return {"passed": agreement >= AGREEMENT and worst <= WORST, "agreement": agreement, "worst": worst}
