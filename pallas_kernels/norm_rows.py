"""RMSNorm as a kernel, with the residual add before it: every element is read once and written once.

Nothing is shared between rows, and a row fits the registers of a warpgroup: so a block is one warpgroup with a few
rows, and enough blocks stand on a multiprocessor that some load while others reduce. There is no pipeline to write.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.tiles import FLOATS

THREADS = 128
MAX_DIM = 16384  # 128 numbers a thread


def check_norm(x: jax.Array, weight: jax.Array, *, delta: jax.Array | None = None, **_: Any) -> None:
    """Raise `Unsupported` where `norm_rows` cannot run."""
    dim = x.shape[-1]
    if x.dtype not in FLOATS:
        raise Unsupported(f"activations must be bfloat16 or float16, found {x.dtype}")
    if delta is not None and (delta.shape, delta.dtype) != (x.shape, x.dtype):
        raise Unsupported(f"delta is {delta.dtype} {delta.shape} but activations are {x.dtype} {x.shape}")
    if weight.shape != (dim,):
        raise Unsupported(f"norm has shape {weight.shape}, activations have {dim} features")
    if dim % THREADS or dim > MAX_DIM:
        raise Unsupported(f"{dim} features: must be a multiple of {THREADS} and at most {MAX_DIM}")


def norm_rows(
    x: jax.Array,
    weight: jax.Array,
    *,
    eps: float,
    delta: jax.Array | None = None,
    rows: int | None = None,
    interpret: Any = False,
) -> Any:
    """The normed x [..., dim]; with ``delta`` (x + delta, which is what is normed, and its norm).

    ``rows``: how many a block has."""
    flat = [a.reshape(-1, x.shape[-1]) for a in (x, delta) if a is not None]
    count = flat[0].shape[0]
    out = _norm_rows(flat, weight, eps=eps, rows=rows or (2 if count >= 1024 else 1), interpret=interpret)
    out = [a.reshape(x.shape) for a in out]
    return out[0] if delta is None else tuple(out)


# Compiled as a function of its own: the layers of a model then share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("eps", "interpret", "rows"))
def _norm_rows(x: list[jax.Array], weight: jax.Array, *, eps: float, rows: int, interpret: Any) -> list[jax.Array]:
    count, dim = x[0].shape
    return plgpu.kernel(
        functools.partial(_body, terms=len(x), eps=eps, rows=rows),
        out_type=[jax.ShapeDtypeStruct(x[0].shape, x[0].dtype) for _ in x],
        grid=(math.ceil(count / rows),),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="norm_rows",
    )(*x, weight)


def _body(*refs: Any, terms: int, eps: float, rows: int) -> None:
    terms_of_x, weight_ref, (*sum_ref, normed_ref) = refs[:terms], refs[terms], refs[terms + 1 :]
    count, dim = normed_ref.shape
    a_thread = dim // THREADS
    layout = plgpu.Layout.WG_STRIDED((dim,), vec_size=math.gcd(a_thread, 8))

    def load(ref: Any) -> jax.Array:
        return plgpu.load(ref, layout=layout, optimized=False)

    # The last block is moved up where it would pass the end: two blocks then write the same values there.
    first = jnp.maximum(jnp.minimum(lax.axis_index("block") * rows, count - rows), 0)
    mine = [first + i for i in range(min(rows, count))]
    loaded = [[load(ref.at[row]) for ref in terms_of_x] for row in mine]  # all before the first is used
    gain = load(weight_ref)
    for row, values in zip(mine, loaded, strict=True):
        x = values[0]
        if sum_ref:
            x = (x.astype(jnp.float32) + values[1].astype(jnp.float32)).astype(x.dtype)
            sum_ref[0][row] = x
        x = x.astype(jnp.float32)
        inv_rms = lax.rsqrt(jnp.sum(x * x) / dim + eps)
        normed_ref[row] = (x * inv_rms * gain.astype(jnp.float32)).astype(normed_ref.dtype)
