"""Causal attention of new queries over a key/value cache.

Query ``i`` of row ``b`` has position ``start[b] + i`` and sees the keys at positions ``0 .. start[b] + i``.
This one rule covers the causal mask, ragged batches and continued prompts. Keys after a row's position (padding, or
what an older sequence left) are never seen, so no length of keys is needed.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .dispatch import Kernel, Op
from .hopper.attention import decode as flash_decode
from .hopper.attention import prefill as flash_attention


def attention_reference(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array) -> jax.Array:
    """q [B, T, heads, D], k and v [B, kv_heads, S, D], start [B] -> [B, T, heads, D]; softmax in float32."""
    B, T, heads, D = q.shape
    kv_heads, S = k.shape[1:3]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    # The query heads that share a key head are rows of one product: nothing is repeated in memory.
    rows = (
        q.reshape(B, T, kv_heads, -1, D).transpose(0, 2, 3, 1, 4).reshape(B, kv_heads, -1, D)
    )  # [B, kv, group * T, D]
    scores = jnp.einsum(
        "bkrd,bksd->bkrs",
        rows,
        k,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    positions = start[:, None] + jnp.arange(T)[None]  # [B, T]
    visible = jnp.arange(S)[None, None, None, None] <= positions[:, None, None, :, None]  # [B, 1, 1, T, S]
    scores = jnp.where(visible, scores.reshape(B, kv_heads, -1, T, S) * D**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, kv_heads, -1, S)
    out = jnp.einsum(
        "bkrs,bksd->bkrd",
        weights,
        v,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(B, kv_heads, -1, T, D).transpose(0, 3, 1, 2, 4).reshape(B, T, heads, D).astype(q.dtype)


# Two ops with one specification. Many queries are bound by arithmetic, few by the bytes of the cache, so each has its
# own kernel.
attention = Op(
    "attention", attention_reference, {"hopper": Kernel(flash_attention.flash_attention, flash_attention.check)}
)
decode_attention = Op(
    "decode_attention", attention_reference, {"hopper": Kernel(flash_decode.flash_decode, flash_decode.check)}
)

DECODE_QUERIES = 8  # up to this many queries a row, `decode_attention` is used

CASES = {
    "7b": dict(heads=32, kv_heads=32, head_dim=128),
    "70b": dict(heads=64, kv_heads=8, head_dim=128),
    "tinyllama": dict(heads=32, kv_heads=4, head_dim=64),
}
