"""The feed-forward block with its norm and residual: ``x + down(silu(gate(h)) * up(h))``, ``h = rms_norm(x)``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .dispatch import Kernel, Op, Unsupported
from .layer_view import LayerView
from .matmul import NO_BIAS, Weight, affine, check_product, matmul_reference, product
from .rms_norm import rms_norm, rms_norm_reference

Biases = tuple[jax.Array, jax.Array | None] | None


def swiglu(gate_up: jax.Array) -> jax.Array:
    """[..., 2 * hidden] with the gate in the first half -> [..., hidden]; the sigmoid in float32."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate_up.dtype)


def ffn_reference(
    x: jax.Array,
    norm: jax.Array,
    w_gate_up: Weight,
    w_down: Weight,
    *,
    eps: float,
    biases: Biases = None,
    residual: bool = True,
    product: Callable[..., jax.Array] = matmul_reference,
) -> jax.Array:
    """x [..., dim], norm [dim], w_gate_up [2 * hidden, dim], w_down [dim, hidden] -> [..., dim]. ``biases``, where
    there are any, are of the two products: [2 * hidden] and [dim]. ``residual``: whether x is added, which a shard
    leaves out whose result is a part of the sum. ``product`` multiplies."""
    first, second = biases or (None, None)
    h = rms_norm_reference(x, norm, eps=eps)
    gated = swiglu(affine(product, h, w_gate_up, first))
    return affine(product, gated, w_down, second, residual=x if residual else None)


def check_ffn(
    x: jax.Array,
    norm: jax.Array,
    w_gate_up: Weight | LayerView,
    w_down: Weight | LayerView,
    *,
    biases: Biases = None,
    **_: Any,
) -> None:
    """Raise `Unsupported` where `ffn_kernel` cannot run."""
    if biases is not None:
        raise Unsupported(NO_BIAS)
    if norm.shape != x.shape[-1:]:
        raise Unsupported(f"norm has shape {norm.shape}, activations have {x.shape[-1]} features")
    check_product(x, w_gate_up, swiglu=True)
    check_product(jax.ShapeDtypeStruct((*x.shape[:-1], w_down.shape[-1]), x.dtype), w_down)


def ffn_kernel(
    x: jax.Array,
    norm: jax.Array,
    w_gate_up: Weight | LayerView,
    w_down: Weight | LayerView,
    *,
    eps: float,
    residual: bool = True,
    **options: Any,
) -> jax.Array:
    """`ffn_reference` in two products. SwiGLU is the first one's epilogue, the residual add the second one's. The gate
    and up projections are never written to memory. The norm is the op `rms_norm`."""
    h = rms_norm(x, norm, eps=eps)
    gated = product(h, w_gate_up, swiglu=True, **options)
    return product(gated, w_down, residual=x if residual else None, **options)


ffn = Op("ffn", ffn_reference, {"hopper": Kernel(ffn_kernel, check_ffn)})

CASES = {
    "7b": dict(dim=4096, hidden=11008),
    "13b": dict(dim=5120, hidden=13824),
    "70b": dict(dim=8192, hidden=28672),
}
