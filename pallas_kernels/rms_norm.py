"""RMSNorm: ``x / rms(x) * weight``, statistics in float32."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import Op


def rms_norm_reference(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    """x [..., dim], weight [dim] -> [..., dim] in x's dtype."""
    x32 = x.astype(jnp.float32)
    inv_rms = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inv_rms * weight.astype(jnp.float32)).astype(x.dtype)


rms_norm = Op("rms_norm", rms_norm_reference)

CASES = {
    "7b-decode": dict(rows=1, dim=4096),
    "7b-prefill": dict(rows=4096, dim=4096),
    "70b-decode": dict(rows=8, dim=8192),
    "odd-rows": dict(rows=37, dim=5120),
}
