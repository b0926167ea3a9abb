"""The timing of single operations in chains, on a CPU and on a simulated GPU."""

import pytest

from bench import ceilings, measure
from bench.peers import NotSupported


def test_ceilings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.peers.ours import Ours

    monkeypatch.setattr(ceilings, "LARGE", {"cpu": 4 << 20, "gpu": 64 << 20})
    monkeypatch.setattr(ceilings, "SIDES", {"cpu": {64: 1}, "gpu": {1024: 2}})
    found = Ours({}).ceilings("int8", 1 << 16)
    assert found.keys() - {"stream"} == {"copy", "read", "matrix", "launch", "kernel"}
    assert all(value > 0 for value in found.values())


@pytest.mark.parametrize("seconds", [1e-9, 1e9])
def test_every_operation_of_an_iteration_runs(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import jax
    import jax.numpy as jnp

    monkeypatch.setattr(measure, "ITERATION_S", seconds)
    monkeypatch.setattr(measure, "MAX_CHAIN", 5)
    ran = []

    def op(x: jax.Array, w: jax.Array) -> jax.Array:
        jax.debug.callback(lambda w: ran.append(float(w[0])), w)
        return x * w

    sets = [(jnp.full(4, 2.0), jnp.full(4, 1.0 + i)) for i in range(2)]
    samples, how = measure.time_jax_op(op, sets, lambda x, out: out, warmup=1, iterations=4)
    jax.effects_barrier()
    assert len(samples) == 4
    assert all(s > 0 for s in samples)
    length, calls = (5, measure.MAX_CALLS) if seconds > 1 else (1, 1)
    assert how == {"sets": 2, "ops_per_call": length, "calls": calls, "difference": False, "queued": False}
    assert len(ran) == 12 + 12 * length + 5 * length * calls  # rough timings, then warm-up and iterations
    assert (2.0 in ran) == (length > 1)  # inputs rotate


@pytest.mark.parametrize("queued", [False, True])
def test_the_way_to_a_gpu_and_back_is_not_timed(queued: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated GPU and clock. The device takes 20 s for a call. The host takes 5 s to dispatch one, or 50 s when
    queued, for which the first size of work is too short. The host sees every end 3 s late."""
    import jax

    now, free, sizes = 0.0, 0.0, []

    class Work:
        def __init__(self, seconds: float) -> None:
            nonlocal free
            self.seconds = seconds
            self.end = free = max(free, now) + seconds

        def is_ready(self) -> bool:
            return self.end <= now

    def jit(function: object, **how: object) -> object:
        if "static_argnums" not in how:
            return lambda work: Work(work.seconds)
        return lambda size: sizes.append(size) or Work(size)

    def wait(works: object) -> None:
        nonlocal now
        now = max(now, *(work.end for work in jax.tree.leaves(works))) + 3

    def host() -> Work:
        nonlocal now
        now += 50 if queued else 5
        return Work(20)

    monkeypatch.setattr(jax, "jit", jit)
    monkeypatch.setattr(jax, "block_until_ready", wait)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    monkeypatch.setattr(measure.Queue, "SIZES", (1, 30))
    chain = measure.Chain(host, sets=1, length=2, calls=1, gpu=True, queued=queued)
    assert chain.samples(1, 3) == [10, 10, 10]
    assert sizes == ([1, 30] if queued else [])
    if queued:
        monkeypatch.setattr(measure.Queue, "SIZES", (1,))
        with pytest.raises(NotSupported, match="not timed: the host dispatches"):
            chain.samples(1, 2)
