"""A medium-M GEMM of int8 weights with x in int8 limbs: what its consumers do besides wgmma.

Nothing is widened. wgmma multiplies 8-bit integers at twice the rate of 16-bit floats, so two limbs of x take as long
as x in bfloat16, and as many bytes. A row of x has one scale, and so has a row of the weight. So the sums of each limb
are integers from the first input to the last, and exact.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...split_rows import LIMB_STEPS
from ..common.tiles import broadcast_rows
from .medium_m_block import Block


def row_scales(block: Block) -> jax.Array:
    """The scales of the rows of x, as those of an accumulator's columns."""
    assert block.x_scale is not None
    return plgpu.load(block.x_scale, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def joined_limbs(sums: list[jax.Array], of_weights: jax.Array, of_rows: jax.Array) -> jax.Array:
    """The product [64, rows] of int32 sums [64, 2 * rows], those of the upper limbs first, in one array or two."""
    rows = of_rows.shape[0]
    upper, lower = sums if len(sums) == 2 else (sums[0][:, :rows], sums[0][:, rows:])
    upper, lower = upper.astype(jnp.float32), lower.astype(jnp.float32)
    total = (upper + lower * (1 / LIMB_STEPS)) * broadcast_rows(of_weights, upper.shape)
    return total * lax.broadcast_in_dim(of_rows, total.shape, (1,))
