"""Products with a weight in checkpoint order: ``x [..., in]`` with ``w [out, in]`` gives ``[..., out]``.

`matmul` is the only op that knows how a weight is stored. Accumulation is always in float32.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import cpu
from .arch import planned
from .dispatch import Kernel, Op
from .formats import WeightFormat
from .hopper.common.tiles import Format, Weight, format_of
from .hopper.gemm.large_m import check_large_m, large_m_gemm
from .hopper.gemm.large_m_plan import tiles_for as large_m_tiles_for
from .hopper.gemm.medium_m import MEDIUM_M_MAX, check_medium_m, medium_m_gemm
from .hopper.gemm.medium_m_plan import LIMB_ROWS
from .hopper.gemm.small_m import SMALL_M_MAX, check_small_m, small_m_gemm
from .layer_view import LayerView, stack_of
from .quantized import QuantizedTensor, dequantize
from .split_rows import LIMB_INPUTS, SplitRows

INTEGERS_MEDIUM_M_MAX = 192  # rows of which the medium-M GEMM keeps the sums of three consumers of integers


def matmul_reference(
    x: jax.Array, w: Weight, *, residual: jax.Array | None = None, out_dtype: jnp.dtype | type | None = None
) -> jax.Array:
    """x [..., in] · w [out, in] (+ residual [..., out]) -> [..., out] in ``out_dtype`` (default: x's)."""
    y = cpu.product(float_product, x, w).astype(out_dtype or x.dtype)
    return y if residual is None else residual + y


def float_product(x: jax.Array, w: Weight) -> jax.Array:
    """The specification: x [..., in] · w [out, in] -> float32 [..., out], the weight as floats of x's dtype."""
    if isinstance(w, QuantizedTensor):
        if w.scale.shape[-1] == 1:  # one scale a row commutes with the sum, so it is applied after the product
            y = _dot(x, w.data.astype(x.dtype))
            return y * jnp.broadcast_to(w.scale[:, 0], y.shape)
        w = dequantize(w, x.dtype)
    return _dot(x, w.astype(x.dtype))


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    # dot_general on the stored order: `x @ w.T` makes XLA's CPU backend transpose the weight in memory, 20 times
    # slower for one row. HIGHEST keeps float32 products out of TF32 on GPUs; it changes nothing for 16-bit inputs.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, w, contract_last, precision=precision, preferred_element_type=jnp.float32)


def affine(
    product: Callable[..., jax.Array],
    x: jax.Array | SplitRows,
    w: Any,
    bias: jax.Array | None,
    *,
    residual: jax.Array | None = None,
) -> jax.Array:
    """`matmul_reference` by ``product``, with a bias [out] or None; it is added before the float32 sum is rounded."""
    if bias is None:
        return product(x, w, residual=residual)
    y = (product(x, w, out_dtype=jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
    return y if residual is None else residual + y


def takes_limbs(x: jax.Array | SplitRows, w: Weight | LayerView) -> bool:
    """Whether `product` multiplies the limbs of x [..., in] where it gets them: in batches of few rows."""
    w, _ = stack_of(w)
    rows, whole = math.prod(x.shape[:-1]), Format(WeightFormat.INT8)  # one scale a row
    return SMALL_M_MAX < rows <= LIMB_ROWS and format_of(w) == whole and x.shape[-1] <= LIMB_INPUTS


def check_product(x: jax.Array | SplitRows, w: Weight | LayerView, *, swiglu: bool = False, **_: Any) -> None:
    """Raise `Unsupported` where `product` cannot run."""
    w, _ = stack_of(w)
    x = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)
    if x.shape[0] <= SMALL_M_MAX:
        check_small_m(x, w)
    elif _large_m_pays(x.shape[0], w, swiglu):
        check_large_m(x, w, swiglu=swiglu)
    else:
        check_medium_m(x, w, swiglu=swiglu)


def _large_m_pays(rows: int, w: Weight, swiglu: bool) -> bool:
    """Whether the large-M GEMM should do this product, and not the medium-M GEMM, which takes `MEDIUM_M_MAX` rows.

    It is also faster with 193 to 256 rows if the weights are gate and up in integers, and its tiles can be halved so
    that all multiprocessors finish together. The medium-M GEMM has registers for small tiles only there: it needs a
    second round of tiles, in which most multiprocessors idle."""
    fmt = format_of(w)
    if rows > MEDIUM_M_MAX:
        return True
    if rows <= INTEGERS_MEDIUM_M_MAX or not (swiglu and fmt.quantized):
        return False
    tiles = large_m_tiles_for(fmt, rows, w.shape[-2] // 2, swiglu, planned().sms)
    return tiles.row_splits > 1 and w.shape[-2] % (2 * tiles.out) == 0


def product(
    x: jax.Array | SplitRows,
    w: Weight | LayerView,
    *,
    residual: jax.Array | None = None,
    swiglu: bool = False,
    **options: Any,
) -> jax.Array:
    """`matmul_reference`, or a feed-forward block's first product with ``swiglu``, by the small-M, medium-M or large-M
    GEMM, depending on the number of rows. ``options`` are those of that kernel."""
    if isinstance(x, SplitRows) and not takes_limbs(x, w):
        x = x.x
    w, layer = stack_of(w)
    lead = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    if residual is not None:
        residual = residual.reshape(-1, residual.shape[-1])
    kernel: Any = small_m_gemm
    if x.shape[0] > SMALL_M_MAX:
        kernel = large_m_gemm if _large_m_pays(x.shape[0], w, swiglu) else medium_m_gemm
    return kernel(x, w, layer=layer, residual=residual, swiglu=swiglu, **options).reshape(*lead, -1)


matmul = Op("matmul", matmul_reference, {"hopper": Kernel(product, check_product)})

NO_BIAS = "the model has biases, which the kernel does not add"

CASES = {
    "7b-qkv": dict(out=12288, inner=4096),
    "7b-o": dict(out=4096, inner=4096),
    "7b-gate-up": dict(out=22016, inner=4096),
    "7b-down": dict(out=4096, inner=11008),
    "7b-head": dict(out=32000, inner=4096),
    "13b-down": dict(out=5120, inner=13824),
    "70b-gate-up": dict(out=57344, inner=8192),
}
