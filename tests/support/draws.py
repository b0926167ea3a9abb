"""Random arrays for tests of kernels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Normally distributed numbers. A GPU makes its own; elsewhere NumPy does, which compiles nothing."""
    if jax.default_backend() == "gpu":
        return jax.random.normal(jax.random.key(seed), shape, dtype)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype))
