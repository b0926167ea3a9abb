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
from jax.experimental.pallas import mosaic_gpu as plgpu

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
@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def add_norm(
    sums: jax.Array, residual: jax.Array, weight: jax.Array, *, eps: float, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """sums [k_splits, rows, dim] in float32, residual [rows, dim], weight [dim] of a norm -> x = residual + sums, added
    in the order of the splits, and the norm of x; both [rows, dim] in the residual's dtype."""
    rows, dim = residual.shape
    warpgroups = warpgroups_for(dim)
    assert warpgroups is not None
    vector = math.gcd(dim // (warpgroups * WARPGROUP_SIZE), MAX_VECTOR)
    columns = (dim // (WARPGROUP_SIZE * vector), WARPS, LANES, vector)  # a thread takes those that lie together
    result = jax.ShapeDtypeStruct((rows, *columns), residual.dtype)
    outputs = plgpu.kernel(
        functools.partial(_body, eps=eps, dim=dim),
        out_type=(result, result),
        scratch_types=(plgpu.SMEM((warpgroups, WARPS), jnp.float32), plgpu.Barrier(num_arrivals=warpgroups)),
        grid=(rows,),
        grid_names=("row",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="add_norm",
    )(sums.reshape(-1, rows, *columns), residual.reshape(rows, *columns), weight.reshape(columns))
    x, normed = (a.reshape(rows, dim) for a in outputs)
    return x, normed


def _body(sums: Any, residual: Any, weight: Any, x_out: Any, normed_out: Any, squares: Any, summed: Any, *,
          eps: float, dim: int) -> None:  # fmt: skip
    """One warpgroup's columns of one row: a list of units [warps, lanes, vector]."""
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
    squares.at[me][...] = functools.reduce(jnp.add, [a * a for a in x]).sum(axis=2).sum(axis=1)
    consumer_barrier(summed)
    of_warps = [squares[i, j] for i in range(warpgroups) for j in range(WARPS)]
    inv_rms = lax.rsqrt(functools.reduce(jnp.add, of_warps) / dim + eps)
    normed = [a * inv_rms * gain.astype(jnp.float32) for a, gain in zip(x, gains, strict=True)]
    store(normed_out.at[row], [a.astype(normed_out.dtype) for a in normed])
