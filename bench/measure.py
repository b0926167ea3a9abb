"""Timing that is right on devices that run asynchronously, and the statistics of what was timed.

An iteration is some compiled calls that are under way together, and its figure their time divided by the operations
inside. These are chained within a call, each fed with the one before it, so that no compiler removes or reorders
work: straight, not in a loop, whose every turn costs a GPU microseconds. On a GPU an iteration's time is what twice as
many calls take longer, so that the way to the device and back is no part of it, as it is none where events time a CUDA
graph; and calls so short that the host may hand them over more slowly than the device runs them are lined up behind
other work first (`Queue`). Inputs rotate through more bytes than the last cache holds, and are random, never zeros.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import NotSupported

ITERATION_S = 10e-3  # how long an iteration should take: what the host adds at its end is under a percent of it
MAX_CHAIN = 96  # operations in one compiled call
MAX_CALLS = 8  # calls of an iteration, under way at once
MAX_SETS = 12  # input sets to rotate through


@dataclass(frozen=True)
class Stats:
    """What issue and tables want to know about samples (seconds, or whatever they are in)."""

    n: int
    mean: float
    std: float
    min: float
    max: float
    p50: float
    p95: float
    p99: float


def summarise(samples: Sequence[float]) -> Stats:
    """Statistics of at least one sample."""
    array = np.asarray(samples, np.float64)
    if array.size == 0 or not np.isfinite(array).all() or (array <= 0).any():
        raise ValueError(f"samples: expected finite numbers above zero, found {samples!r}")
    p50, p95, p99 = np.percentile(array, [50, 95, 99])
    std = float(array.std(ddof=1)) if array.size > 1 else 0.0
    return Stats(
        array.size, float(array.mean()), std, float(array.min()), float(array.max()), float(p50), float(p95), float(p99)
    )


def stats_dict(samples: Sequence[float]) -> dict[str, float]:
    """`summarise` as a plain dictionary, for a record."""
    return asdict(summarise(samples))


def spread(samples: Sequence[float]) -> float:
    """Half the distance between the quartiles over the median: how far two medians may differ by chance."""
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    middle = statistics.median(samples)
    return (high - low) / 2 / middle if middle else 0.0


def wait_quiet(seconds: float, wanted: float = 0.9) -> float | None:
    """Wait until the CPUs are idle, or ``seconds`` have passed: on a shared machine, a run that begins while others
    compute measures them. Returns the idle share seen last; None where it was not asked for or cannot be read."""
    until, idle = time.monotonic() + seconds, None
    while seconds and (before := _cpu_times()) is not None and time.monotonic() < until:
        time.sleep(0.4)
        after = _cpu_times() or before
        total = after[1] - before[1]
        idle = round((after[0] - before[0]) / total, 3) if total else 0.0
        if idle >= wanted:
            break
    return idle


def _cpu_times() -> tuple[int, int] | None:
    """Ticks of all CPUs: idle, and altogether."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    ticks = [int(n) for n in first[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def sets_needed(bytes_each: int, cache_bytes: int, limit_bytes: int) -> int:
    """How many input sets go past twice the last cache, within the memory that may be used."""
    wanted = 1 + 2 * cache_bytes // max(bytes_each, 1)
    return max(1, min(wanted, MAX_SETS, max(1, limit_bytes // max(bytes_each, 1))))


def time_calls(call: Callable[[], Any], block: Callable[[Any], Any], *, warmup: int, iterations: int) -> list[float]:
    """Seconds of each of ``iterations`` calls, every one finished before the clock is read."""
    for _ in range(warmup):
        block(call())
    samples = []
    for _ in range(iterations):
        begin = time.perf_counter()
        block(call())
        samples.append(time.perf_counter() - begin)
    return samples


@dataclass(frozen=True)
class Chain:
    """What an iteration runs: ``calls`` compiled calls under way together, each a chain of ``length`` operations."""

    call: Callable[[], Any]
    sets: int
    length: int
    calls: int
    gpu: bool
    queued: bool  # behind other work

    @property
    def how(self) -> dict[str, Any]:
        """For the record."""
        timed = {"difference": self.gpu, "queued": self.queued}
        return {"sets": self.sets, "ops_per_call": self.length, "calls": self.calls, **timed}

    def samples(self, warmup: int, iterations: int) -> list[float]:
        """Seconds of one operation, for every iteration."""
        import jax

        def run(calls: int) -> list[Any]:
            return [self.call() for _ in range(calls)]

        if self.gpu:
            seconds, n = Queue().seconds if self.queued else _seconds, self.calls
            times = [seconds(lambda: run(2 * n)) - seconds(lambda: run(n)) for _ in range(warmup + iterations)][warmup:]
        else:
            times = time_calls(lambda: run(self.calls), jax.block_until_ready, warmup=warmup, iterations=iterations)
        return [s / (self.length * self.calls) for s in times]


def _seconds(calls: Callable[[], Any]) -> float:
    import jax

    (sample,) = time_calls(calls, jax.block_until_ready, warmup=0, iterations=1)
    return sample


class Queue:
    """Keeps a GPU busy while the host lines up what is to be timed behind that."""

    TURNS = 8  # and twice an iteration's calls: jax lets the host run 32 ahead
    SIZES = (1 << 28, 1 << 29, 1 << 30)  # float32 numbers; a turn over the first takes half a millisecond

    def __init__(self) -> None:
        import jax
        import jax.numpy as jnp

        self._turn = jax.jit(lambda a: a + 1, donate_argnums=0)
        self._make = jax.jit(jnp.zeros, static_argnums=0)
        self._sizes = list(self.SIZES)
        self._next_size()

    def _next_size(self) -> None:
        if not self._sizes:
            raise NotSupported("not timed: the host hands over so short operations more slowly than they run")
        self._work: Any = None  # before the next: the device need not hold both
        self._work = self._turn(self._make(self._sizes.pop(0)))

    def seconds(self, calls: Callable[[], Any]) -> float:
        """From the end of the work before ``calls`` to the end of theirs, as the host hears of them, late by up
        to 0.4 ms. Where the device was done too soon, once more with more of it."""
        import jax

        while True:
            for _ in range(self.TURNS):
                self._work = self._turn(self._work)
            results = calls()
            if not self._work.is_ready():
                break
            jax.block_until_ready(results)
            self._next_size()
        jax.block_until_ready(self._work)
        begin = time.perf_counter()
        jax.block_until_ready(results)
        return time.perf_counter() - begin


def rough_s(once: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    """Seconds of one call, about: what a chain's length is chosen by."""
    import jax

    return min(time_calls(lambda: once(*inputs), jax.block_until_ready, warmup=2, iterations=10))


def chain_jax_op(
    op: Callable[..., Any], sets: Sequence[tuple[Any, ...]], advance: Callable[[Any, Any], Any], rough: float
) -> Chain:
    """Compile a chain of ``op(x, *rest)``, which takes about ``rough`` seconds. ``sets`` are inputs (x first) to rotate
    through; ``advance(x, out)`` makes the next x of an operation's output."""
    import jax

    length = max(1, min(MAX_CHAIN, round(ITERATION_S / rough)))

    def chained(sets):
        x = sets[0][0]
        for i in range(length):
            # The barrier ties the weights to this step: what is made of them alone is not shared between steps.
            x, *rest = jax.lax.optimization_barrier((x, *sets[i % len(sets)][1:]))
            x = advance(x, op(x, *rest))
        return x

    compiled = jax.jit(chained).lower(sets).compile()
    gpu, each = jax.default_backend() == "gpu", rough_s(compiled, (sets,))
    calls = max(1, min(MAX_CALLS, round(ITERATION_S / each)))
    return Chain(lambda: compiled(sets), len(sets), length, calls, gpu, gpu and each * MAX_CALLS < ITERATION_S)


def time_jax_op(
    op: Callable[..., Any],
    sets: Sequence[tuple[Any, ...]],
    advance: Callable[[Any, Any], Any],
    *,
    warmup: int = 10,
    iterations: int = 50,
) -> tuple[list[float], dict[str, Any]]:
    """Seconds of one ``op(x, *rest)``, for every iteration, and how they were taken: see `chain_jax_op`."""
    import jax

    chain = chain_jax_op(op, sets, advance, rough_s(jax.jit(op), sets[0]))
    return chain.samples(warmup, iterations), chain.how
