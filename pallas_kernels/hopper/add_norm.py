"""What follows a product with K splits: their sums, the residual and RMSNorm, in one launch.

A block has one row. Its warpgroups share the columns, and exchange only the sums of squares.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .common.ring import consumer_barrier
from .common.thread_ops import WARPGROUP_SIZE

MAX_WARPGROUPS = 4
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
    result = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    return plgpu.kernel(
        functools.partial(_body, eps=eps, width=dim // warpgroups),
        out_type=(result, result),
        scratch_types=(plgpu.SMEM((warpgroups,), jnp.float32), plgpu.Barrier(num_arrivals=warpgroups)),
        grid=(rows,),
        grid_names=("row",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="add_norm",
    )(sums, residual, weight)


def _body(sums: Any, residual: Any, weight: Any, x_out: Any, normed_out: Any, squares: Any, summed: Any, *,
          eps: float, width: int) -> None:  # fmt: skip
    """One warpgroup's columns of one row."""
    row, me = lax.axis_index("row"), lax.axis_index("warpgroup")
    own = pl.ds(pl.multiple_of(me * width, width), width)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(width // WARPGROUP_SIZE, 8))

    def load(ref: Any) -> jax.Array:
        return plgpu.load(ref, layout=layout, optimized=False)

    # All loads before the first use.
    parts = [load(sums.at[i, row, own]) for i in range(sums.shape[0])]
    before, gain = load(residual.at[row, own]), load(weight.at[own])
    total = functools.reduce(jnp.add, parts) + before.astype(jnp.float32)
    rounded = total.astype(x_out.dtype)
    x_out[row, own] = rounded
    x = rounded.astype(jnp.float32)
    squares[me] = jnp.sum(x * x)
    consumer_barrier(summed)
    mean = functools.reduce(jnp.add, [squares[i] for i in range(squares.shape[0])]) / residual.shape[1]
    normed_out[row, own] = (x * lax.rsqrt(mean + eps) * gain.astype(jnp.float32)).astype(normed_out.dtype)
