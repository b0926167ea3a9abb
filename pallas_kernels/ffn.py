"""The feed-forward block with its norm and residual: ``x + down(silu(gate(h)) * up(h))``, ``h = rms_norm(x)``."""

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import Weight, matmul_reference
from pallas_kernels.rms_norm import rms_norm_reference
from pallas_kernels.dispatch import Op


def swiglu(gate_up: jax.Array) -> jax.Array:
    """[..., 2 * hidden] with the gate in the first half -> [..., hidden]; the sigmoid in float32."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(
        gate_up.dtype
    )


def ffn_reference(
    x: jax.Array, norm: jax.Array, w_gate_up: Weight, w_down: Weight, *, eps: float
) -> jax.Array:
    """x [..., dim], norm [dim], w_gate_up [2 * hidden, dim], w_down [dim, hidden] -> [..., dim]."""
    h = rms_norm_reference(x, norm, eps=eps)
    return x + matmul_reference(swiglu(matmul_reference(h, w_gate_up)), w_down)


ffn = Op("ffn", ffn_reference)

CASES = {
    "7b": dict(dim=4096, hidden=11008),
    "13b": dict(dim=5120, hidden=13824),
    "70b": dict(dim=8192, hidden=28672),
}
