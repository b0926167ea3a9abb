"""A whole decode step of a Llama: up to 8 new tokens through all layers, with the cache, to logits.

The reference is the composition of the other ops' references. The kernel is one persistent launch, in which every
multiprocessor does a part of every phase (see docs/kernels.md). So weights stream without a pause. With one launch per
op the memory is idle between launches.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .attention import attention_reference
from .dispatch import Kernel, Op
from .ffn import ffn_reference
from .hopper.decode_step.checks import check
from .hopper.decode_step.run import run_phases
from .matmul import matmul_reference
from .paged_attention import paged_attention_reference
from .qkv import rotate, split_heads, write, write_pages
from .rms_norm import rms_norm_reference
from .step_weights import StepWeights

Result = tuple[jax.Array, jax.Array, jax.Array]


def decode_step_reference(
    x: jax.Array,
    weights: StepWeights,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    table: jax.Array | None = None,
    axis: str | None = None,
) -> Result:
    """x [B, T, dim], k and v [L, B, kv_heads, S, D], start [B], cos and sin [B, T, D / 2] of the tokens' positions ->
    float32 logits [B, T, vocab], and the cache with the new keys and values from ``start`` on.

    With a ``table`` [B, P] the cache is paged: k and v are [L, pages, kv_heads, size, D], as in `paged_attention`. Rows
    may share pages, but none may read a position that another row of the same call writes: the kernel reads the cache
    as it was before the step. Without a page, a new token's key and value are dropped, and its logits mean nothing.

    With an ``axis`` of `jax.shard_map`, every device along it has a part of the heads, of the hidden units and of the
    vocabulary; x and the norms are the same on all, and the logits are those of the device's part. Where the mesh has
    other axes, every group of devices along ``axis`` has its own sums. But the kernel is one launch of all devices of
    the mesh, so all must run it the same number of times."""
    summed = functools.partial(lax.psum, axis_name=axis) if axis else lambda y: y
    w, (_, _, kv_heads, _, D) = weights, k.shape
    for i in range(k.shape[0]):
        h = rms_norm_reference(x, w.attn_norm[i], eps=eps)
        q, k_new, v_new = split_heads(matmul_reference(h, w.wqkv[i]), w.wo.shape[-1] // D // kv_heads, D)
        q, k_new = rotate(q, cos, sin), rotate(k_new, cos, sin)
        if table is None:
            k, v = write(k, k_new, start, i), write(v, v_new, start, i)
            out = attention_reference(q, k[i], v[i], start)
        else:
            k, v = write_pages(k, k_new, table, start, i), write_pages(v, v_new, table, start, i)
            out = paged_attention_reference(q, k, v, table, start, layer=i)
        x = x + summed(matmul_reference(out.reshape(*x.shape[:2], -1), w.wo[i]))
        x = x + summed(ffn_reference(x, w.ffn_norm[i], w.w_gate_up[i], w.w_down[i], eps=eps, residual=False))
    x = rms_norm_reference(x, w.norm, eps=eps)
    return matmul_reference(x, w.head, out_dtype=jnp.float32), k, v


def decode_step_kernel(
    x: jax.Array,
    weights: StepWeights,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    table: jax.Array | None = None,
    axis: str | None = None,
    **options: Any,
) -> Result:
    """`decode_step_reference` in one launch. Inside a jit that owns the cache, the cache is updated in place.
    ``options`` are those of `run_phases`."""
    left = run_phases(x, weights, k, v, start, cos, sin, eps=eps, table=table, axis=axis, **options)
    B, T = x.shape[:2]
    return left.logits[: B * T].reshape(B, T, -1), left.k, left.v


decode_step = Op("decode_step", decode_step_reference, {"hopper": Kernel(decode_step_kernel, check)})

CASES = {
    "7b": dict(dim=4096, hidden=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000, layers=32),
    "13b": dict(dim=5120, hidden=13824, heads=40, kv_heads=40, head_dim=128, vocab=32000, layers=40),
    "70b": dict(dim=8192, hidden=28672, heads=64, kv_heads=8, head_dim=128, vocab=32000, layers=80),
    "tinyllama": dict(dim=2048, hidden=5632, heads=32, kv_heads=4, head_dim=64, vocab=32000, layers=22),
}
