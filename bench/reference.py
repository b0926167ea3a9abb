"""The reference process: jllama on XLA. It checks the tokens of all implementations, and measures the ceilings."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.process import PeerFailed, Worker
from bench.workloads import VERIFIED
from jllama.errors import InputError

# A token counts as a tie that rounding decides if it is at most this far below the reference's largest logit, in
# standard deviations of the logits. Tokens of a wrong model are several off.
TOLERANCE = {"f32": 1e-3, "bf16": 0.15, "f16": 0.05, "int8": 0.3, "int4": 0.3}
AGREEMENT = 0.9  # of the checked tokens must be within the tolerance: a few of many ties are not
WORST = 1.0  # standard deviations; a single token beyond that is an error

Score = Callable[[list[int], list[int]], list[float]]  # prompt, continuation -> how far off each token is
UNCHECKED = {"passed": True, "agreement": None, "worst": 0.0}


class Reference:
    """The reference process of one comparison. Its compilation cache is ``compiled``; its own compilation is not
    timed."""

    def __init__(self, compiled: Path) -> None:
        self._lock = threading.Lock()  # several peers may warm up at once
        self._job = {"model": None, "compiled": str(compiled)}
        self._start()
        self.hello: dict[str, Any] = self.ask("hello", 120)

    def _start(self) -> None:
        self.worker, self._resting = Worker("ours"), False
        self.worker.ask("open", 120, job=self._job)

    def rest(self) -> None:
        """End the process until something is asked of it. Until then it holds no memory of the device."""
        self.worker.close()
        self._resting = True

    def ask(self, do: str, limit_s: float, **args: Any) -> dict[str, Any]:
        """Call a method of `bench.peers.ours.Ours` in the process."""
        with self._lock:
            if self._resting:
                self._start()
            try:
                return self.worker.ask(do, limit_s, args=args)
            except PeerFailed as error:
                kind, _, said = str(error).partition(": ")
                raise InputError(said) if kind == "InputError" else error from None

    def ceilings(self, dtype: str, working_set: int) -> dict[str, float]:
        """Measure the device's ceilings now."""
        return self.ask("ceilings", 300, dtype=dtype, working_set=working_set)

    def open(self, job: dict[str, Any]) -> None:
        """Load the model of a job, with the job's quantisation, on one device."""
        self.worker.ask("open", 600, job=job | {"backend": "xla", "tp": 1, "dp": 1})

    def score(self, prompt: list[int], ids: list[int]) -> list[float]:
        """See `Score`."""
        return self.ask("score", 300, prompt=prompt, ids=ids)["gaps"]

    def __enter__(self) -> "Reference":
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()


def verify(score: Score, dtype: str, prompts: list[list[int]], ids: list[list[int]]) -> dict[str, Any]:
    """Check the first and the last row. A peer that returns no tokens passes, and its record says that they were not
    checked."""
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
            raise PeerFailed(f"the reference could not check the tokens: {error}") from None
    agreement, worst = sum(g <= TOLERANCE[dtype] for g in gaps) / len(gaps), max(gaps)
    return {"passed": agreement >= AGREEMENT and worst <= WORST, "agreement": agreement, "worst": worst}
