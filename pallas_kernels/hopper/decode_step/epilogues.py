"""What becomes of a product's sums before they are stored, in float32: one function per kind of phase.

``sums`` are [n] of each half of the weight; ``residual`` is [n] where the phase has one. The result is rounded once,
to the dtype of the buffer that the phase writes.
"""

import jax
import jax.numpy as jnp


def identity(sums: list[jax.Array], residual: jax.Array | None) -> jax.Array:
    """The product itself."""
    del residual
    return sums[0]


def add_residual(sums: list[jax.Array], residual: jax.Array | None) -> jax.Array:
    """The product plus the residual stream."""
    return sums[0] + residual


def swiglu(sums: list[jax.Array], residual: jax.Array | None) -> jax.Array:
    """silu(gate) * up."""
    del residual
    gate, up = sums
    return gate / (1 + jnp.exp(-gate)) * up
