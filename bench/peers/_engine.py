"""Offline engines of serving systems: ids in, ids out, without the time of the first token."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.peers import NotSupported, Output
from bench.peers._hf import peak_bytes
from bench.workloads import DRAWN

DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def float_dtype(job: dict[str, Any]) -> str:
    """The engine's name for a run's dtype. Quantised runs would need a checkpoint in the engine's own format."""
    if job["platform"] != "gpu":
        raise NotSupported("runs on GPUs only")
    if job["dtype"] not in DTYPES:
        raise NotSupported(f"reads these weights as floats only, not {job['dtype']}")
    return DTYPES[job["dtype"]]


def model_folder(job: dict[str, Any]) -> tuple[str, bool]:
    """The folder of the job's model, and whether it lacks the weights because the engine shall make random ones."""
    if not job["model"].startswith(DRAWN):
        return job["model"], False
    folder = Path(tempfile.mkdtemp(prefix="bench-config-"))
    (folder / "config.json").write_text(json.dumps(job["config"]))
    return str(folder), True


class Engine:
    """A model whose ``complete(prompts, n)`` gives ``n`` new greedy ids for every prompt."""

    def __init__(
        self, complete: Callable[[list[list[int]], int], list[list[int]]], settings: dict[str, Any] | None = None
    ) -> None:
        self._complete, self.settings = complete, settings or {}
        self._first: dict[tuple[int, int], float] = {}  # the least seconds to the first token, by rows and length

    def complete(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        """``n`` new ids for every prompt. Fewer would be a wrong rate."""
        ids = self._complete(prompts, n)
        if found := {len(row) for row in ids} - {n} or len(ids) != len(prompts):
            raise ValueError(f"expected {len(prompts)} rows of {n} new ids, found {len(ids)} rows of {found}")
        return ids

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Output:
        """Generate twice: one token, then all. The decode time is the difference to the shortest first time so far; the
        whole, where that is longer. A prefix cache would speed up the second call, so no prompt may be found in one."""
        begin = time.perf_counter()
        ids = self.complete(prompts, 1)
        first = time.perf_counter() - begin
        if new_tokens == 1:
            return Output(ids, first, 0.0)
        workload = len(prompts), len(prompts[0])
        least = self._first[workload] = min(first, self._first.get(workload, first))
        begin = time.perf_counter()
        ids = self.complete(prompts, new_tokens)
        total = time.perf_counter() - begin
        return Output(ids, first, total - least if total > least else total)

    def peak_bytes(self) -> int:
        """The peak of this process. It says little, because engines reserve most of the device in other processes."""
        return peak_bytes()
