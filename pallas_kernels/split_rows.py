"""Rows of activations as two int8 limbs and a scale: what integer weights multiply in integers.

A row is about ``(first + second / 254) * scale``. What is lost is x behind its second limb, at most 1 / 64,516 of the
row's largest value.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

LIMB_STEPS = 254  # of the second limb in one step of the first: both stay in [-127, 127]
LIMB_INPUTS = 2**17  # at most: 127 * 128 * inputs must stay below 2 ** 31


def limbs(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [M, in] as int8 [2 * M, in], all first limbs before all second ones, and float32 scales [M, 1]."""
    x = x.astype(jnp.float32)
    scale, inverse = scale_and_inverse(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    return jnp.concatenate(digits(x * inverse)).astype(jnp.int8), scale


def scale_and_inverse(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scale of rows with these largest magnitudes, and the factor of their numbers: 0 where the scale has no
    inverse in float32."""
    tiny = jnp.finfo(jnp.float32).tiny
    scale = largest / 127
    return scale, jnp.where(scale >= tiny, 1 / jnp.maximum(scale, tiny), 0)


def digits(steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both limbs of numbers in [-127, 127], as floats."""
    first = jnp.round(steps)
    return first, jnp.round((steps - first) * LIMB_STEPS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SplitRows:
    """Stands for activations ``x``, and has their shape and dtype. A kernel may take their limbs instead; a reference
    gets ``x``: see `materialize`."""

    x: jax.Array  # [..., in]
    limbs: jax.Array  # [2, rows, in] int8, where x has so many rows in all
    scale: jax.Array  # [rows] float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.x.dtype

    def __getitem__(self, rows: slice) -> "SplitRows":
        """Some rows of x [rows, in]."""
        return SplitRows(self.x[rows], self.limbs[:, rows], self.scale[rows])

    def reshape(self, *shape: int) -> "SplitRows":
        """The same rows, with other axes before the last one."""
        return replace(self, x=self.x.reshape(*shape))


def split_rows(x: jax.Array) -> SplitRows:
    """Activations [..., in] and their limbs."""
    both, scale = limbs(x.reshape(-1, x.shape[-1]))
    return SplitRows(x, both.reshape(2, -1, x.shape[-1]), scale[:, 0])
