"""RMSNorm: ``x / rms(x) * weight``, statistics in float32."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .dispatch import Kernel, Op
from .hopper.rms_norm import check_norm, norm_rows

ENOUGH_ROWS = 256  # below, a launch costs more than the fusion saves


def rms_norm_reference(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    """x [..., dim], weight [dim] -> [..., dim] in x's dtype."""
    x32 = x.astype(jnp.float32)
    inv_rms = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    gain = jnp.broadcast_to(weight.astype(jnp.float32), x.shape)
    return (x32 * inv_rms * gain).astype(x.dtype)


def skip_reason(x: jax.Array, *_: Any, **__: Any) -> str | None:
    """Why XLA computes the norm, for few rows; else None."""
    few = math.prod(x.shape[:-1]) < ENOUGH_ROWS
    return f"fewer than {ENOUGH_ROWS} rows: XLA fuses it with its neighbours" if few else None


rms_norm = Op("rms_norm", rms_norm_reference, {"hopper": Kernel(norm_rows, check_norm)}, skip_reason=skip_reason)

CASES = {
    "7b-decode": dict(rows=1, dim=4096),
    "7b-prefill": dict(rows=4096, dim=4096),
    "70b-decode": dict(rows=8, dim=8192),
    "odd-rows": dict(rows=37, dim=5120),
}
