"""Floors: the least time that bytes and flops take at the ceilings that `bench.ceilings` measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
# Operations a second, times those that `bench.ceilings` measures. Weights in int8 and int4 meet bf16 activations, but
# fp8 weights meet fp8 ones, which a tensor core multiplies twice as fast.
RATE = {"fp8": 2.0}


@dataclass(frozen=True)
class Ceilings:
    """The device's ceilings: memory rates in bytes/s, flop/s, and latencies in seconds."""

    copy: float  # bytes/s, counting reads and writes
    read: float  # bytes/s of a product with one row, which only reads
    matrix: float  # flop/s of the faster of some square products in the run's dtype
    launch: float  # s, one tiny operation, dispatched and waited for
    kernel: float  # s, one tiny operation among many in one compiled call
    stream: float = 0.0  # bytes/s of a kernel that only reads (`bench.stream`); 0 where it did not run

    @property
    def bandwidth(self) -> float:
        """The highest memory rate that was measured."""
        return max(self.copy, self.read, self.stream)


@dataclass(frozen=True)
class Work:
    """The fewest bytes and floating-point operations that an operation or a step needs."""

    bytes: float
    flops: float

    @property
    def intensity(self) -> float:
        """Flops per byte."""
        return self.flops / self.bytes


def floor_s(work: Work, ceilings: Ceilings, dtype: str = "") -> float:
    """The least time that the ceilings allow for products in ``dtype`` (see `RATE`)."""
    return max(work.bytes / ceilings.bandwidth, work.flops / (ceilings.matrix * RATE.get(dtype, 1.0)))


def of_dict(values: Mapping[str, float]) -> Ceilings:
    """The ceilings of a record. Old ones lack `stream`."""
    return Ceilings(**{name: values[name] for name in Ceilings.__dataclass_fields__ if name in values})


def best_of(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """The better of two measurements of each ceiling: the higher rate, the lower latency."""
    better = {name: min if name in ("launch", "kernel") else max for name in {**a, **b}}
    return {name: pick(m[name] for m in (a, b) if name in m) for name, pick in better.items()}


def weight_bytes(dims: Mapping[str, int], dtype: str) -> float:
    """Bytes of the weights that one decode step reads. ``dims`` comes from `dims`."""
    per_weight = BYTES[dtype.split("-")[0]]
    if dtype.startswith("int4"):
        per_weight += 2 / 128  # a float16 scale for every 128
    return dims["matrix_params"] * per_weight


def cache_bytes(dims: Mapping[str, int], dtype: str, batch: int, context: float) -> float:
    """Bytes of the keys and values of ``batch`` rows that hold ``context`` tokens each."""
    return batch * context * dims["kv_per_token"] * (4 if dtype == "f32" else 2)


def dims(config: Any) -> dict[str, int]:
    """What the least possible time of a step is computed from: numbers of a `LlamaConfig`."""
    layer = config.dim * config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
    layer += 3 * config.dim * config.hidden_dim
    return {
        "matrix_params": config.n_layers * layer + config.vocab_size * config.dim,
        "kv_per_token": 2 * config.n_layers * config.n_kv_heads * config.head_dim,
        "attention_width": config.n_layers * config.n_heads * config.head_dim,
    }


def decode_work(dims: Mapping[str, int], dtype: str, batch: int, context: float) -> Work:
    """The work of one decode step for ``batch`` rows that hold ``context`` tokens each."""
    flops = batch * (2 * dims["matrix_params"] + 4 * dims["attention_width"] * context)
    return Work(weight_bytes(dims, dtype) + cache_bytes(dims, dtype, batch, context), flops)


def prefill_work(dims: Mapping[str, int], dtype: str, batch: int, seq: int) -> Work:
    """The work of a prefill of ``seq`` tokens a row. Attention is causal, so half of the scores count. Only the last
    token needs the head."""
    flops = batch * seq * (2 * dims["matrix_params"] + 2 * dims["attention_width"] * seq)
    return Work(weight_bytes(dims, dtype) + cache_bytes(dims, dtype, batch, seq), flops)
