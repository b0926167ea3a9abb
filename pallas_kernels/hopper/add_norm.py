"""What follows a product with K splits: their sums, the residual and RMSNorm, in one launch.

A block has one row. Its warpgroups share the columns, and exchange only the sums of squares: one a warp, because Mosaic
adds up the warps of a warpgroup in memory that all warpgroups of a block share.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..split_rows import SplitRows, digits, scale_and_inverse
from .common.ring import consumer_barrier
from .common.thread_ops import WARPGROUP_SIZE

MAX_WARPGROUPS = 4
WARPS, LANES = 4, 32  # of a warpgroup, of a warp
MAX_VECTOR = 8  # neighbouring columns of a thread
MAX_PER_THREAD = 32  # numbers of a row: those of all K splits are loaded before the first is used


def warpgroups_for(dim: int) -> int | None:
    """Warpgroups of a block for rows of ``dim``; None where it has none."""
    fitting = (n for n in range(MAX_WARPGROUPS, 0, -1) if dim % (n * WARPGROUP_SIZE) == 0)
    found = next(fitting, None)
    return found if found is not None and dim <= found * WARPGROUP_SIZE * MAX_PER_THREAD else None


# A jit of its own: all layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("eps", "split", "interpret"))
def add_norm(
    sums: jax.Array, residual: jax.Array, weight: jax.Array, *, eps: float, split: bool = False, interpret: Any = False
) -> tuple[jax.Array, jax.Array | SplitRows]:
    """sums [k_splits, rows, dim] in float32, residual [rows, dim], weight [dim] of a norm -> x = residual + sums, added
    in the order of the splits, and the norm of x; both [rows, dim] in the residual's dtype. With ``split``, the norm
    comes with its limbs: as `split_rows` would give it."""
    rows, dim = residual.shape
    warpgroups = warpgroups_for(dim)
    assert warpgroups is not None
    vector = math.gcd(dim // (warpgroups * WARPGROUP_SIZE), MAX_VECTOR)
    columns = (dim // (WARPGROUP_SIZE * vector), WARPS, LANES, vector)  # a thread takes those that lie together
    result = jax.ShapeDtypeStruct((rows, *columns), residual.dtype)
    of_limbs = jax.ShapeDtypeStruct((2, rows, *columns), jnp.int8), jax.ShapeDtypeStruct((rows,), jnp.float32)
    of_warps = plgpu.SMEM((warpgroups, WARPS), jnp.float32)
    x, normed, *split_into = plgpu.kernel(
        functools.partial(_body, eps=eps, dim=dim),
        out_type=(result, result, *(of_limbs if split else ())),
        scratch_types=(of_warps, of_warps, plgpu.Barrier(num_arrivals=warpgroups)),
        grid=(rows,),
        grid_names=("row",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="add_norm",
    )(sums.reshape(-1, rows, *columns), residual.reshape(rows, *columns), weight.reshape(columns))
    x, normed = (a.reshape(rows, dim) for a in (x, normed))
    if not split_into:
        return x, normed
    limbs, scale = split_into
    return x, SplitRows(normed, limbs.reshape(2, rows, dim), scale)


def _body(sums: Any, residual: Any, weight: Any, x_out: Any, normed_out: Any, *rest: Any, eps: float, dim: int) -> None:
    """One warpgroup's columns of one row: a list of units [warps, lanes, vector]. ``rest``: limbs and scales, where
    they are wanted, and the scratch."""
    *of_limbs, squares, largest, summed = rest
    row, me, warpgroups = lax.axis_index("row"), lax.axis_index("warpgroup"), squares.shape[0]
    own = [me + i * warpgroups for i in range(weight.shape[0] // warpgroups)]
    layout = plgpu.Layout.TILED(plgpu.Tiling((weight.shape[1:],)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def load(ref: Any) -> list[jax.Array]:
        return [plgpu.load(ref.at[unit], layout=layout, optimized=False) for unit in own]

    def store(ref: Any, units: list[jax.Array]) -> None:
        for number, unit in zip(own, units, strict=True):
            ref[number] = unit

    # All loads before the first use.
    parts = [load(sums.at[i, row]) for i in range(sums.shape[0])]
    before, gains = load(residual.at[row]), load(weight)
    totals = [functools.reduce(jnp.add, of_unit) for of_unit in zip(*parts, strict=True)]
    rounded = [(a + b.astype(jnp.float32)).astype(x_out.dtype) for a, b in zip(totals, before, strict=True)]
    store(x_out.at[row], rounded)
    x = [a.astype(jnp.float32) for a in rounded]
    gained = [a * gain.astype(jnp.float32) for a, gain in zip(x, gains, strict=True)]
    squares.at[me][...] = functools.reduce(jnp.add, [a * a for a in x]).sum(axis=2).sum(axis=1)
    if of_limbs:
        largest.at[me][...] = functools.reduce(jnp.maximum, [jnp.abs(a) for a in gained]).max(axis=2).max(axis=1)
    consumer_barrier(summed)

    def reduced(function: Any, of_warps: Any) -> jax.Array:
        return functools.reduce(function, [of_warps[i, j] for i in range(warpgroups) for j in range(WARPS)])

    inv_rms = lax.rsqrt(reduced(jnp.add, squares) / dim + eps)
    normed = [(a * inv_rms).astype(normed_out.dtype) for a in gained]
    store(normed_out.at[row], normed)
    if not of_limbs:
        return
    limbs_out, scale_out = of_limbs
    # Rounding keeps the order of numbers. So this is the largest of the rounded ones, before they are known.
    most = (reduced(jnp.maximum, largest) * inv_rms).astype(normed_out.dtype).astype(jnp.float32)
    scale, inverse = scale_and_inverse(most)
    both = [digits(a.astype(jnp.float32) * inverse) for a in normed]
    for limb, units in enumerate(zip(*both, strict=True)):
        store(limbs_out.at[limb, row], [a.astype(jnp.int32).astype(jnp.int8) for a in units])

    @pl.when(me == 0)
    def _() -> None:
        scale_out[row] = scale
