"""What the offline engines of serving systems have in common: ids in, ids out, and no time of the first token."""

import time
from collections.abc import Callable
from typing import Any

from bench.peers import NotSupported, Output
from bench.peers._hf import peak_bytes

DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def float_dtype(job: dict[str, Any]) -> str:
    """The engine's name of a run's dtype; quantised runs need a checkpoint in the engine's own format."""
    if job["platform"] != "gpu":
        raise NotSupported("runs on GPUs only here")
    if job["dtype"] not in DTYPES:
        raise NotSupported(f"reads these weights as floats only, not {job['dtype']}")
    return DTYPES[job["dtype"]]


class Engine:
    """``complete(prompts, n)`` gives the new ids of every prompt, greedily."""

    def __init__(self, complete: Callable[[list[list[int]], int], list[list[int]]]) -> None:
        self.complete = complete

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Output:
        """Twice: for one token, and for all. The difference is decoding. An engine that finds the prompt of the first
        call in its prefix cache would flatter itself, so every engine is opened without one."""
        begin = time.perf_counter()
        ids = self.complete(prompts, 1)
        first = time.perf_counter() - begin
        if new_tokens == 1:
            return Output(ids, first, 0.0)
        begin = time.perf_counter()
        ids = self.complete(prompts, new_tokens)
        return Output(ids, first, max(time.perf_counter() - begin - first, 1e-9))

    def peak_bytes(self) -> int:
        """Engines reserve most of the device beforehand, in other processes: what this one holds says little."""
        return peak_bytes()
