"""RMSNorm as a kernel: every element is read once and written once.

A block is one warpgroup with one row, which fits its registers. Enough blocks share an SM that some load while others
reduce, so no pipeline is needed.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..dispatch import Unsupported
from .common.thread_ops import WARPGROUP_SIZE
from .common.tiles import ACTIVATION_DTYPES

MAX_DIM = 16384  # 128 numbers a thread


def check_norm(x: jax.Array, weight: jax.Array, **_: Any) -> None:
    """Raise `Unsupported` where `norm_rows` cannot run."""
    dim = x.shape[-1]
    if x.dtype not in ACTIVATION_DTYPES:
        raise Unsupported(f"activations must be bfloat16 or float16, found {x.dtype}")
    if weight.shape != (dim,):
        raise Unsupported(f"norm has shape {weight.shape}, activations have {dim} features")
    if dim % WARPGROUP_SIZE or dim > MAX_DIM:
        raise Unsupported(f"{dim} features: must be a multiple of {WARPGROUP_SIZE} and at most {MAX_DIM}")


def norm_rows(x: jax.Array, weight: jax.Array, *, eps: float, interpret: Any = False) -> jax.Array:
    """The norm of x [..., dim]."""
    return _norm_rows(x.reshape(-1, x.shape[-1]), weight, eps=eps, interpret=interpret).reshape(x.shape)


# A jit of its own: all layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def _norm_rows(x: jax.Array, weight: jax.Array, *, eps: float, interpret: Any) -> jax.Array:
    return plgpu.kernel(
        functools.partial(_body, eps=eps),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[0],),
        grid_names=("row",),
        num_threads=1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="norm_rows",
    )(x, weight)


def _body(x_ref: Any, weight_ref: Any, normed_ref: Any, *, eps: float) -> None:
    """One row."""
    row, dim = lax.axis_index("row"), x_ref.shape[1]
    layout = plgpu.Layout.WG_STRIDED((dim,), vec_size=math.gcd(dim // WARPGROUP_SIZE, 8))

    def load(ref: Any) -> jax.Array:
        return plgpu.load(ref, layout=layout, optimized=False)

    x, gain = load(x_ref.at[row]), load(weight_ref).astype(jnp.float32)  # both loads before the first use
    x = x.astype(jnp.float32)
    inv_rms = lax.rsqrt(jnp.sum(x * x) / dim + eps)
    normed_ref[row] = (x * inv_rms * gain).astype(normed_ref.dtype)
