"""Ceilings measured on the device in the same run, and what they allow.

`measure_ceilings` needs jax; the rest is arithmetic on bytes and flops.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bench.measure import time_calls

BYTES = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Ceilings:
    """What the device reached: bytes/s of a copy (read and written) and of reading weights, flop/s, seconds."""

    copy: float  # bytes/s, counting reads and writes
    read: float  # bytes/s of the widest product with one row: reads without writes
    matrix: float  # flop/s of a large square product in the run's dtype
    launch: float  # s, one tiny operation, dispatched and waited for
    kernel: float  # s, one tiny operation among many in one compiled call

    @property
    def bandwidth(self) -> float:
        """The larger of the two: no operation moves bytes faster than both."""
        return max(self.copy, self.read)


@dataclass(frozen=True)
class Work:
    """The fewest bytes and operations that something takes."""

    bytes: float
    flops: float

    @property
    def intensity(self) -> float:
        """Flops a byte."""
        return self.flops / self.bytes


def floor_s(work: Work, ceilings: Ceilings) -> float:
    """The least time that the ceilings allow."""
    return max(work.bytes / ceilings.bandwidth, work.flops / ceilings.matrix)


def of_dict(values: Mapping[str, float]) -> Ceilings:
    """The ceilings of a record."""
    return Ceilings(**{name: values[name] for name in Ceilings.__dataclass_fields__})


def best_of(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """The better of two measurements of each ceiling: rates are high, latencies low."""
    return {name: (min if name in ("launch", "kernel") else max)(a[name], b[name]) for name in a}


def measure_ceilings(dtype: str, working_set: int = 0) -> dict[str, float]:
    """Measure on jax's default device. ``working_set``: weights that are smaller than the last cache are read from
    it, so on a CPU their reading is measured at their size."""
    import jax
    import jax.numpy as jnp

    cpu = jax.devices()[0].platform == "cpu"
    kind = jnp.dtype({"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[dtype])
    key = jax.random.key(42)

    def best(call: Callable[[], Any], repeat: int) -> float:
        return min(time_calls(call, jax.block_until_ready, warmup=2, iterations=repeat))

    side = 2048 if cpu else 8192
    a = jax.random.normal(key, (side, side), jnp.float32).astype(kind)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32).astype(kind))
    matrix = 2 * side**3 / best(lambda: product(a, a), 3 if cpu else 20)

    count = (256 << 20) // 4 if cpu else (4 << 30) // 4
    x = jnp.tile(jax.random.normal(key, (1 << 20,), jnp.float32), count >> 20)
    add = jax.jit(lambda a: a + 1)  # a plain copy would be aliased away
    copy = 8 * count / best(functools.partial(add, x), 5 if cpu else 10)
    del x

    read = _read_rate(jax, jnp, (512 << 20) if cpu else (4 << 30), kind, best)
    if cpu and 0 < working_set < (512 << 20):
        read = max(read, _read_rate(jax, jnp, working_set, kind, best))

    tiny = jnp.ones(8, jnp.float32)
    step = jax.jit(lambda x: x * 1.5)
    launch = best(lambda: step(tiny), 200)
    many = jax.jit(lambda x: jax.lax.fori_loop(0, 512, lambda _, x: jnp.sort(x * 1.5), x))
    kernel = best(lambda: many(tiny), 10) / 512
    return asdict(Ceilings(copy, read, matrix, launch, kernel))


def _read_rate(jax: Any, jnp: Any, size: int, kind: Any, best: Callable[[Callable[[], Any], int], float]) -> float:
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
            # All of the product is needed: were it a part, the compiler would read a part of the weight.
            return x + 1e-6 * jnp.max(jax.lax.dot_general(x, w, contract)).astype(kind)

        return jax.lax.fori_loop(0, loops, once, x)

    run = jax.jit(product)
    return loops * w.nbytes / best(lambda: run(x, w), 5)


def weight_bytes(dims: Mapping[str, int], dtype: str) -> float:
    """Bytes of the weights that one decode step reads; ``dims`` as `dims` makes them."""
    per_weight = BYTES[dtype.split("-")[0]]
    if dtype.startswith("int4"):
        per_weight += 2 / 128  # a float16 scale for every 128
    return dims["matrix_params"] * per_weight


def dims(config: Any) -> dict[str, int]:
    """What the floors need of a `LlamaConfig`, as plain numbers."""
    layer = config.dim * config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
    layer += 3 * config.dim * config.hidden_dim
    return {
        "matrix_params": config.n_layers * layer + config.vocab_size * config.dim,
        "kv_per_token": 2 * config.n_layers * config.n_kv_heads * config.head_dim,
        "attention_width": config.n_layers * config.n_heads * config.head_dim,
    }


def decode_work(dims: Mapping[str, int], dtype: str, batch: int, context: float) -> Work:
    """One step for ``batch`` rows that hold ``context`` tokens each."""
    activation = 4 if dtype == "f32" else 2
    cache = batch * context * dims["kv_per_token"] * activation
    flops = batch * (2 * dims["matrix_params"] + 4 * dims["attention_width"] * context)
    return Work(weight_bytes(dims, dtype) + cache, flops)


def prefill_work(dims: Mapping[str, int], dtype: str, batch: int, seq: int) -> Work:
    """A prompt of ``seq`` tokens a row: half of the square of scores is seen. Only the last token needs the head."""
    flops = batch * seq * (2 * dims["matrix_params"] + 2 * dims["attention_width"] * seq)
    activation = 4 if dtype == "f32" else 2
    return Work(weight_bytes(dims, dtype) + batch * seq * dims["kv_per_token"] * activation, flops)
