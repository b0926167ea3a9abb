"""Timing on devices that run asynchronously, and statistics of the samples.

* An iteration dispatches several compiled calls before it waits. Its figure is their time divided by the number of
  operations in them.
* The operations of a call are chained: each takes the previous output as input, so the compiler can neither remove nor
  reorder them. The chain is unrolled, because each turn of a loop costs a GPU microseconds.
* On a GPU, n and 2n calls are timed and the difference is reported, so launch latency cancels. (CUDA events around a
  CUDA graph, which time PyTorch, do not include it either.)
* The host may dispatch very short calls more slowly than the device runs them. Such calls are queued behind other work
  (`Queue`).
* Inputs rotate through more bytes than the last cache holds. They are random, never zeros.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import NotSupported

ITERATION_S = 10e-3  # aim for the time of an iteration, so that the host's part at its end is under 1 %
MAX_CHAIN = int(os.environ.get("JLLAMA_BENCH_CHAIN", "96"))  # operations in one compiled call: fewer compile sooner
MAX_CALLS = 8  # calls of an iteration, all dispatched before it waits
MAX_SETS = 12  # input sets to rotate through


@dataclass(frozen=True)
class Stats:
    """Statistics of samples, in the samples' unit."""

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
    """Half the distance between the quartiles, divided by the median: an estimate of how far two medians may differ
    by chance."""
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    middle = statistics.median(samples)
    return (high - low) / 2 / middle if middle else 0.0


def wait_quiet(seconds: float, wanted: float = 0.9) -> float | None:
    """Wait until the CPUs are idle, at most ``seconds``, because other load on a shared machine would be measured, too.
    Returns the idle fraction seen last; None where ``seconds`` is 0 or it cannot be read."""
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
    """Ticks of all CPUs: idle ones, and the total."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    ticks = [int(n) for n in first[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def sets_needed(bytes_each: int, cache_bytes: int, limit_bytes: int) -> int:
    """How many input sets it takes to exceed twice the last cache, within a limit of memory."""
    wanted = 1 + 2 * cache_bytes // max(bytes_each, 1)
    return max(1, min(wanted, MAX_SETS, max(1, limit_bytes // max(bytes_each, 1))))


def time_calls(call: Callable[[], Any], block: Callable[[Any], Any], *, warmup: int, iterations: int) -> list[float]:
    """Seconds of each of ``iterations`` calls. Each call is finished before the clock is read."""
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
    """What an iteration runs: ``calls`` compiled calls, each a chain of ``length`` operations."""

    call: Callable[[], Any]
    sets: int
    length: int
    calls: int
    gpu: bool
    queued: bool  # behind other work, see `Queue`

    @property
    def how(self) -> dict[str, Any]:
        """How the samples are taken, for the record."""
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
    """Keeps a GPU busy while the host dispatches the calls to be timed, so that they run back to back."""

    TURNS = 8  # with twice an iteration's calls it stays below the 32 computations that jax lets the host run ahead
    SIZES = (1 << 28, 1 << 29, 1 << 30)  # float32 elements; one pass over the smallest takes half a millisecond

    def __init__(self) -> None:
        import jax
        import jax.numpy as jnp

        self._turn = jax.jit(lambda a: a + 1, donate_argnums=0)
        self._make = jax.jit(jnp.zeros, static_argnums=0)
        self._sizes = list(self.SIZES)
        self._next_size()

    def _next_size(self) -> None:
        if not self._sizes:
            raise NotSupported("not timed: the host dispatches these operations more slowly than they run")
        self._work: Any = None  # free the old array first, so that the device need not hold both
        self._work = self._turn(self._make(self._sizes.pop(0)))

    def seconds(self, calls: Callable[[], Any]) -> float:
        """Seconds from the end of the work in front to the end of ``calls``. The host sees each end up to 0.4 ms late.
        If the device finished the work in front too early, this repeats with more work."""
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
    """The rough time of one call in seconds, by which a chain's length is chosen."""
    import jax

    return min(time_calls(lambda: once(*inputs), jax.block_until_ready, warmup=2, iterations=10))


def chain_jax_op(
    op: Callable[..., Any], sets: Sequence[tuple[Any, ...]], advance: Callable[[Any, Any], Any], rough: float
) -> Chain:
    """Compile a chain of ``op(x, *rest)``, where one op takes about ``rough`` seconds. The chain rotates through the
    input ``sets`` (x first). ``advance(x, out)`` makes the next x from an output."""
    import jax

    length = max(1, min(MAX_CHAIN, round(ITERATION_S / rough)))

    def chained(sets):
        x = sets[0][0]
        for i in range(length):
            # The barrier ties the weights to this step, so the compiler cannot share work on them between steps.
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
    """Seconds of one ``op(x, *rest)`` for every iteration, and how they were measured: see `chain_jax_op`."""
    import jax

    chain = chain_jax_op(op, sets, advance, rough_s(jax.jit(op), sets[0]))
    return chain.samples(warmup, iterations), chain.how
