"""RMSNorm as a kernel, with the residual add before it: every element is read once and written once.

Nothing is shared between rows, and a row fits the registers of a warpgroup: so a block is one warpgroup with one row,
and enough blocks stand on a multiprocessor that some load while others reduce. There is no pipeline to write.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..dispatch import Unsupported
from .common.tiles import ACTIVATION_DTYPES

THREADS = 128
MAX_DIM = 16384  # 128 numbers a thread


def check_norm(x: jax.Array, weight: jax.Array, *, delta: jax.Array | None = None, **_: Any) -> None:
    """Raise `Unsupported` where `norm_rows` cannot run."""
    dim = x.shape[-1]
    if x.dtype not in ACTIVATION_DTYPES:
        raise Unsupported(f"activations must be bfloat16 or float16, found {x.dtype}")
    if delta is not None and (delta.shape, delta.dtype) != (x.shape, x.dtype):
        raise Unsupported(f"delta is {delta.dtype} {delta.shape} but activations are {x.dtype} {x.shape}")
    if weight.shape != (dim,):
        raise Unsupported(f"norm has shape {weight.shape}, activations have {dim} features")
    if dim % THREADS or dim > MAX_DIM:
        raise Unsupported(f"{dim} features: must be a multiple of {THREADS} and at most {MAX_DIM}")


def norm_rows(
    x: jax.Array, weight: jax.Array, *, eps: float, delta: jax.Array | None = None, interpret: Any = False
) -> Any:
    """The norm of x [..., dim]; with ``delta``, x + delta and its norm."""
    terms = [a.reshape(-1, x.shape[-1]) for a in (x, delta) if a is not None]
    out = [a.reshape(x.shape) for a in _norm_rows(terms, weight, eps=eps, interpret=interpret)]
    return out[0] if delta is None else tuple(out)


# Compiled as a function of its own: the layers of a model then share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def _norm_rows(terms: list[jax.Array], weight: jax.Array, *, eps: float, interpret: Any) -> list[jax.Array]:
    return plgpu.kernel(
        functools.partial(_body, eps=eps),
        out_type=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in terms],
        grid=(terms[0].shape[0],),
        grid_names=("row",),
        num_threads=1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="norm_rows",
    )(*terms, weight)


def _body(*refs: Any, eps: float) -> None:
    """One row. ``refs``: x, maybe delta, the weight, maybe their sum, the norm."""
    (*term_refs, weight_ref), (*sum_ref, normed_ref) = refs[: len(refs) // 2 + 1], refs[len(refs) // 2 + 1 :]
    row, dim = lax.axis_index("row"), normed_ref.shape[1]
    layout = plgpu.Layout.WG_STRIDED((dim,), vec_size=math.gcd(dim // THREADS, 8))

    def load(ref: Any) -> jax.Array:
        return plgpu.load(ref, layout=layout, optimized=False)

    terms = [load(ref.at[row]) for ref in term_refs]
    gain = load(weight_ref).astype(jnp.float32)
    x = terms[0]
    if sum_ref:
        x = (x.astype(jnp.float32) + terms[1].astype(jnp.float32)).astype(x.dtype)
        sum_ref[0][row] = x
    x = x.astype(jnp.float32)
    inv_rms = lax.rsqrt(jnp.sum(x * x) / dim + eps)
    normed_ref[row] = (x * inv_rms * gain).astype(normed_ref.dtype)
