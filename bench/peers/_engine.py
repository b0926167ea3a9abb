"""Offline engines of serving systems: ids in, ids out, without the time of the first token."""

import time
from collections.abc import Callable
from typing import Any

from bench.peers import NotSupported, Output
from bench.peers._hf import peak_bytes

DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def float_dtype(job: dict[str, Any]) -> str:
    """The engine's name for a run's dtype. Quantised runs would need a checkpoint in the engine's own format."""
    if job["platform"] != "gpu":
        raise NotSupported("runs on GPUs only")
    if job["dtype"] not in DTYPES:
        raise NotSupported(f"reads these weights as floats only, not {job['dtype']}")
    return DTYPES[job["dtype"]]


class Engine:
    """A model whose ``complete(prompts, n)`` gives ``n`` new greedy ids for every prompt."""

    def __init__(self, complete: Callable[[list[list[int]], int], list[list[int]]]) -> None:
        self.complete = complete

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Output:
        """Generate twice: one token, then all. The difference is the decode time. A prefix cache would speed up the
        second call, so every engine is opened without one."""
        begin = time.perf_counter()
        ids = self.complete(prompts, 1)
        first = time.perf_counter() - begin
        if new_tokens == 1:
            return Output(ids, first, 0.0)
        begin = time.perf_counter()
        ids = self.complete(prompts, new_tokens)
        return Output(ids, first, max(time.perf_counter() - begin - first, 1e-9))

    def peak_bytes(self) -> int:
        """The peak of this process. It says little, because engines reserve most of the device in other processes."""
        return peak_bytes()
