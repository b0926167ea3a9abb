"""RMSNorm: ``x / rms(x) * weight``, statistics in float32; alone, and with the residual add before it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import BACKENDS, Choice, Op
from pallas_kernels.norm_rows import check_norm, norm_rows

ENOUGH_ROWS = 256  # below, a launch costs more than the fusion saves


def rms_norm_reference(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    """x [..., dim], weight [dim] -> [..., dim] in x's dtype."""
    x32 = x.astype(jnp.float32)
    inv_rms = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inv_rms * weight.astype(jnp.float32)).astype(x.dtype)


def add_rms_norm_reference(
    x: jax.Array, weight: jax.Array, *, delta: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """x and delta [..., dim], weight [dim] -> x + delta, and its norm."""
    x = x + delta
    return x, rms_norm_reference(x, weight, eps=eps)


class _Norm(Op):
    """A norm of few rows is not worth a launch: like an op that has no kernel, it is XLA's on every backend."""

    def choose(self, backend: str, *args: Any, **kwargs: Any) -> Choice:
        few = math.prod(args[0].shape[:-1]) < ENOUGH_ROWS
        if few and backend in BACKENDS and backend != "xla":
            return Choice("xla", f"fewer than {ENOUGH_ROWS} rows: XLA fuses it with its neighbours")
        return super().choose(backend, *args, **kwargs)


rms_norm = _Norm("rms_norm", rms_norm_reference, kernel=norm_rows, check=check_norm)
add_rms_norm = _Norm("add_rms_norm", add_rms_norm_reference, kernel=norm_rows, check=check_norm)

CASES = {
    "7b-decode": dict(rows=1, dim=4096),
    "7b-prefill": dict(rows=4096, dim=4096),
    "70b-decode": dict(rows=8, dim=8192),
    "odd-rows": dict(rows=37, dim=5120),
}
