"""Prompts on an idle engine: the time to the first token of all, and where the device spends it."""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bench import trace

if TYPE_CHECKING:
    from jllama.engine.engine import Engine

Shape = tuple[int, int]  # prompts, and tokens of each
_salts = itertools.count()  # no prompt is found in the cache


def first_tokens(engine: "Engine", prompts: Sequence[Sequence[int]]) -> float:
    """Seconds until every prompt has its first token."""
    from jllama.engine.request import Request

    salt = f"prefill {next(_salts)}"
    begin = time.perf_counter()
    handles = engine.submit_all([Request(prompt, 1, stop_ids=(), salt=salt) for prompt in prompts])
    for _ in engine.follow(handles):
        pass
    return time.perf_counter() - begin


def prefills(
    engine: "Engine", shapes: Sequence[Shape], prompt: Sequence[int], runs: int, backend: str
) -> Iterator[dict[str, Any]]:
    """The record fields of each shape: tokens a second of ``runs`` runs, and milliseconds by kernel of one more.
    ``prompt`` is repeated to the length of a shape."""
    for rows, length in shapes:
        prompts = [[*itertools.islice(itertools.cycle(prompt), i, i + length)] for i in range(rows)]
        for _ in range(2):  # the first one compiles, and the next may find its arrays moved
            first_tokens(engine, prompts)
        seconds = [first_tokens(engine, prompts) for _ in range(runs)]
        fields: dict[str, Any] = dict(batch=rows, seq=length, context=length + 1, impl=backend)
        rates = [rows * length / s for s in seconds]
        yield fields | dict(case="engine-prefill", metric="tokens_per_s", samples=rates, seconds=seconds)
        found = trace.traced(lambda prompts=prompts: first_tokens(engine, prompts))
        yield fields | dict(case="engine-prefill-kernels") | trace.per(found, 1)
