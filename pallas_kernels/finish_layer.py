"""All of a layer that follows its attention, and the norm that follows the layer.

A decode step of a batch runs it in five launches with nothing between them: three products and two kernels that add K
splits and the residual, and normalise. So the caller keeps two arrays from layer to layer: x, and h, the norm of x.
"""

import math
from typing import Any

import jax

from .dispatch import Kernel, Op, Unsupported
from .ffn import ffn_reference
from .hopper.add_norm import add_norm, warpgroups_for
from .hopper.common.tiles import Weight, pad_rows
from .hopper.gemm.medium_m import MEDIUM_M_MAX, check_medium_m, medium_m_sums
from .layer_view import LayerView, stack_of
from .matmul import SMALL_M_MAX, check_product, matmul_reference, product, takes_limbs
from .rms_norm import rms_norm_reference
from .split_rows import SplitRows, split_rows

Result = tuple[jax.Array, jax.Array | SplitRows]


def finish_layer_reference(
    out: jax.Array,
    x: jax.Array,
    wo: Weight,
    ffn_norm: jax.Array,
    w_gate_up: Weight,
    w_down: Weight,
    next_norm: jax.Array,
    *,
    eps: float,
    split: bool = False,
) -> Result:
    """out [..., q_width] of attention, x [..., dim], wo [dim, q_width], w_gate_up [2 * hidden, dim], w_down
    [dim, hidden], norms [dim] -> x [..., dim] after the layer, and its norm with ``next_norm``: that of the next layer,
    or of the head. With ``split`` the norm comes with its limbs, for a product that takes them."""
    x = matmul_reference(out, wo, residual=x)
    x = ffn_reference(x, ffn_norm, w_gate_up, w_down, eps=eps)
    h = rms_norm_reference(x, next_norm, eps=eps)
    return x, split_rows(h) if split else h


def check_finish_layer(
    out: jax.Array,
    x: jax.Array,
    wo: Weight | LayerView,
    ffn_norm: jax.Array,
    w_gate_up: Weight | LayerView,
    w_down: Weight | LayerView,
    next_norm: jax.Array,
    **_: Any,
) -> None:
    """Raise `Unsupported` where `finish_layer_kernel` cannot run."""
    rows, dim = math.prod(x.shape[:-1]), x.shape[-1]
    if not SMALL_M_MAX < rows <= MEDIUM_M_MAX:
        raise Unsupported(f"{rows} rows: from {SMALL_M_MAX + 1} to {MEDIUM_M_MAX} gain")
    if {ffn_norm.shape, next_norm.shape} != {(dim,)}:
        raise Unsupported(f"norms have shapes {ffn_norm.shape} and {next_norm.shape}, activations have {dim} features")
    if warpgroups_for(dim) is None:
        raise Unsupported(f"{dim} features: too many, or not a multiple of 256")
    for width, w in ((out.shape[-1], wo), (w_down.shape[-1], w_down)):
        w, _ = stack_of(w)
        check_medium_m(jax.ShapeDtypeStruct((rows, width), x.dtype), w)
    check_product(jax.ShapeDtypeStruct((rows, dim), x.dtype), w_gate_up, swiglu=True)


def finish_layer_kernel(
    out: jax.Array,
    x: jax.Array,
    wo: Weight | LayerView,
    ffn_norm: jax.Array,
    w_gate_up: Weight | LayerView,
    w_down: Weight | LayerView,
    next_norm: jax.Array,
    *,
    eps: float,
    split: bool = False,
    interpret: Any = False,
    **options: Any,
) -> Result:
    """`finish_layer_reference` in five launches; ``options`` are those of the kernels of products."""
    shape, options = x.shape, options | {"interpret": interpret}
    rows = math.prod(shape[:-1])
    # TMA takes 8 rows at a time. Padded here, no kernel has to do it again.
    out, x = (pad_rows(a.reshape(rows, -1), 0) for a in (out, x))
    sums = _sums(out, wo, options)
    x, h = add_norm(sums, x, ffn_norm, eps=eps, split=takes_limbs(x, w_gate_up), interpret=interpret)
    gated = product(h, w_gate_up, swiglu=True, **options)
    x, h = add_norm(_sums(gated, w_down, options), x, next_norm, eps=eps, split=split, interpret=interpret)
    return x[:rows].reshape(shape), h[:rows].reshape(shape)


def _sums(x: jax.Array | SplitRows, w: Weight | LayerView, options: dict[str, Any]) -> jax.Array:
    w, layer = stack_of(w)
    return medium_m_sums(x, w, layer=layer, **options)


finish_layer = Op("finish_layer", finish_layer_reference, {"hopper": Kernel(finish_layer_kernel, check_finish_layer)})

CASES = {
    "7b": dict(dim=4096, hidden=11008, q_width=4096),
    "llama3-8b": dict(dim=4096, hidden=14336, q_width=4096),
    "70b": dict(dim=8192, hidden=28672, q_width=8192),
    "tinyllama": dict(dim=2048, hidden=5632, q_width=2048),
}
