"""Measures the device's ceilings, in the same process as the run. `bench.roofline` computes floors from them.

Every figure is the best of several tries, because a ceiling is the most that the device can do.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp

from bench.measure import time_calls
from bench.roofline import Ceilings

LARGE = {"cpu": 256 << 20, "gpu": 4 << 30}  # bytes, more than every cache holds
SIDES = {"cpu": {2048: 1}, "gpu": {4096: 16, 8192: 4}}  # side of the square products -> how many are chained
PASSES = 4  # over `LARGE` in one launch, so that the launch itself takes less than 1 %


def measure_ceilings(dtype: str, working_set: int = 0) -> dict[str, float]:
    """Measure jax's default device. ``working_set`` is the bytes of the weights. Weights smaller than a CPU's last
    cache are read from it, so their read rate is measured at their size."""
    size = "cpu" if jax.devices()[0].platform == "cpu" else "gpu"
    kind = jnp.dtype({"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[dtype])
    read = _read_rate(LARGE[size] * (2 if size == "cpu" else 1), kind)
    if size == "cpu" and 0 < working_set < 2 * LARGE[size]:
        read = max(read, _read_rate(working_set, kind))
    found = Ceilings(
        copy=_copy_rate(LARGE[size]),
        read=read,
        matrix=max(_matrix_rate(side, chain, kind) for side, chain in SIDES[size].items()),
        **_latencies(),
        stream=_stream_rate(LARGE[size]),
    )
    return {name: value for name, value in asdict(found).items() if value}


def _best(call: Callable[[], Any], repeat: int) -> float:
    return min(time_calls(call, jax.block_until_ready, warmup=2, iterations=repeat))


def _matrix_rate(side: int, chain: int, kind: Any) -> float:
    """Flop/s of square products. Each takes the previous result as input."""
    a = jax.random.normal(jax.random.key(42), (side, side), jnp.float32)
    b = a * side**-0.5  # so that the values keep their magnitude

    @jax.jit
    def products(a: jax.Array, b: jax.Array) -> jax.Array:
        for _ in range(chain):
            a = a @ b
        return a

    call = functools.partial(products, a.astype(kind), b.astype(kind))
    return 2 * chain * side**3 / _best(call, 3 if side < 4096 else 20)


def _copy_rate(size: int) -> float:
    """Bytes/s, read and written."""
    x = jnp.tile(jax.random.normal(jax.random.key(42), (1 << 20,), jnp.float32), size >> 22)
    add = jax.jit(lambda a: a + 1)  # a plain copy would be aliased away
    return 2 * x.nbytes / _best(lambda: add(x), 5 if size < 1 << 30 else 10)


def _read_rate(size: int, kind: Any) -> float:
    """Bytes/s of a product of one row with a weight of about ``size`` bytes."""
    inner = 4096 if size >= 64 << 20 else 256
    block = min(256, max(8, size // (inner * kind.itemsize)))
    w = jax.random.normal(jax.random.key(1), (block, inner), kind)
    w = jnp.tile(w, (max(1, size // w.nbytes), 1))
    x = jax.random.normal(jax.random.key(2), (1, inner), kind)
    contract = (((1,), (1,)), ((), ()))
    loops = max(1, (64 << 20) // w.nbytes)

    def product(x, w):
        def once(_, x):
            # Use the whole product. If only a part were used, the compiler would read a part of the weight.
            return x + 1e-6 * jnp.max(jax.lax.dot_general(x, w, contract)).astype(kind)

        return jax.lax.fori_loop(0, loops, once, x)

    run = jax.jit(product)
    return loops * w.nbytes / _best(lambda: run(x, w), 5)


def _stream_rate(size: int) -> float:
    """Bytes/s of a kernel that only reads; 0 where it cannot run."""
    from pallas_kernels import Unsupported
    from pallas_kernels.dispatch import require_kernels

    try:
        require_kernels()
    except Unsupported:
        return 0.0
    from bench.stream import STAGE, stream

    some = jax.random.bits(jax.random.key(3), (64, *STAGE), jnp.uint32).astype(jnp.int32)
    words = jnp.tile(some, (size // some.nbytes, 1, 1))
    return PASSES * words.nbytes / _best(lambda: stream(words, passes=PASSES), 10)


def _latencies() -> dict[str, float]:
    """Seconds of a tiny operation: dispatched alone and waited for, and as one of many in a compiled call."""
    tiny = jnp.ones(8, jnp.float32)
    step = jax.jit(lambda x: x * 1.5)
    many = jax.jit(lambda x: jax.lax.fori_loop(0, 512, lambda _, x: jnp.sort(x * 1.5), x))
    return {"launch": _best(lambda: step(tiny), 200), "kernel": _best(lambda: many(tiny), 10) / 512}
