"""Pieces of the attention kernels: a ring of tiles in shared memory, and softmax over scores that come tile by tile."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

QUERY_TILE = 64  # query rows of one warpgroup: a wgmma tile
EMPTY_MAX = -1e30  # a maximum of nothing: finite, so that differences of maxima are numbers

Ref = Any  # of pallas, which has no public type for it


def empty_statistics() -> tuple[jax.Array, jax.Array]:
    """The statistics of a softmax over nothing, for each row: maximum (times scale) and sum."""
    row = plgpu.Layout.WGMMA.reduce(1)
    return tuple(plgpu.layout_cast(jnp.full((QUERY_TILE,), x, jnp.float32), row) for x in (EMPTY_MAX, 0.0))


def mask(s: jax.Array, last: jax.Array) -> jax.Array:
    """Take the keys behind ``last`` out of the scores."""
    key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where(key <= last, s, -jnp.inf)


def update_softmax(s: jax.Array, m: jax.Array, total: jax.Array, scale: float) -> tuple[jax.Array, ...]:
    """Weights of a tile of scores, the factor for what was summed before, and the statistics brought up to date."""
    m_new = jnp.maximum(m, s.max(axis=1) * scale)
    alpha = jnp.exp2(m - m_new)
    p = jnp.exp2(s * scale - lax.broadcast_in_dim(m_new, s.shape, (0,)))
    return p, alpha, m_new, total * alpha + p.sum(axis=1)


def rescale(acc: jax.Array, factor: jax.Array) -> jax.Array:
    """Each row of ``acc`` times its factor."""
    return acc * lax.broadcast_in_dim(factor, acc.shape, (0,))


def pv_product(acc: jax.Array, p: jax.Array, values: Ref, p_smem: Ref | None) -> jax.Array:
    """acc + p @ values. The interpreter has no wgmma with A in registers: there the weights go through ``p_smem``."""
    if p_smem is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, p, values))(plgpu.ACC.init(acc))
    p_smem[...] = p
    plgpu.commit_smem()

    def product(ref):
        plgpu.wgmma(ref, p_smem, values)
        return ref[...]

    return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))
