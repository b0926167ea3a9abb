"""jllama's engine: continuous batching over a paged cache. It is what a user runs who has many requests."""

import functools
import time
from typing import Any

from bench.peers import Output, Peer, _engine
from bench.peers.ours import PACKAGES, Ours, available
from bench.workloads import SAMPLING, SEED

BUDGET = 8192  # tokens of prompts a turn, as vLLM's server takes
SPARE = 4  # one page for so many slots stays free for rows that grow


class OursEngine(Ours):
    """`jllama.Engine` as a peer: one engine, with as many slots as the largest batch, for all workloads."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job | {"rooms": {"1": job["max_len"]}})  # loaded as `jllama.load` does by default
        from jllama import Engine
        from jllama.kernels import PAGE

        slots, pages = job["batch"], job.get("pages")  # None: as many as fit
        if "tokens" in job:
            pages = -(-job["tokens"] // PAGE) + -(-slots // SPARE)
        budget = job.get("budget", BUDGET)
        self.settings = dict(slots=slots, pages=pages, max_len=min(job["max_len"], job["context"]), budget=budget)
        assert self.params is not None
        self.engine = Engine(self.params, backend=job["backend"], **self.settings)
        if job["platform"] == "gpu":  # all at once: one by one, at the first use of each, takes minutes
            begin = time.perf_counter()
            self.engine.warm_up(kinds(job), scores=False)
            self.settings |= {"warm_up_s": time.perf_counter() - begin, "programs": len(self.engine.programs)}
        self._calls = 0
        self._timed = {s: _engine.Engine(functools.partial(self._complete, sampled=s)) for s in (False, True)}

    def generate(self, prompts: list[list[int]], new_tokens: int, *, sampled: bool = False) -> Output:
        """Generate, timed as the engines of serving systems are."""
        return self._timed[sampled].generate(prompts, new_tokens)

    def _complete(self, prompts: list[list[int]], n: int, *, sampled: bool) -> list[list[int]]:
        from jllama.engine.request import Request, SamplingSettings

        self._calls += 1  # a salt of its own: no prompt is found in the cache
        settings: dict[str, Any] = SAMPLING if sampled else {}
        requests = [
            Request(prompt, n, SamplingSettings(**settings, seed=SEED + i), stop_ids=(), salt=str(self._calls))
            for i, prompt in enumerate(prompts)
        ]
        handles = self.engine.submit_all(requests)
        for _ in self.engine.follow(handles):
            pass
        self.backends = self.engine.backends
        return [handle.completion.ids for handle in handles]


def kinds(job: dict[str, Any]) -> list[str]:
    """The kinds of drawing that a job asks for: see `jllama.engine.steps.KINDS`."""
    if "traffic" in job:
        return ["plain" if job["traffic"]["temperature"] > 0 else "greedy"]
    return ["greedy", "cut"] if job.get("sampled") else ["greedy"]


PEER = Peer("engine", "ours", available, OursEngine, PACKAGES)
