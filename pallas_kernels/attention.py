"""Causal attention of new queries over a key/value cache.

Query ``i`` of row ``b`` stands at position ``start[b] + i`` and sees the keys at positions ``0 .. start[b] + i``.
That one rule is the causal mask, the ragged batch and the continued prompt: what lies behind a row's position,
padding or an older sequence's remains, is never seen, so no length of keys is needed.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import Op


def reference(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array) -> jax.Array:
    """q [B, T, heads, D], k and v [B, kv_heads, S, D], start [B] -> [B, T, heads, D]; softmax in float32."""
    B, T, heads, D = q.shape
    kv_heads, S = k.shape[1:3]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    # Query heads that share a key head become rows of one product: nothing is repeated in memory.
    q = q.reshape(B, T, kv_heads, heads // kv_heads, D)
    scores = jnp.einsum("btkgd,bksd->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32) * D**-0.5
    positions = start[:, None] + jnp.arange(T)  # [B, T]
    seen = jnp.arange(S) <= positions[:, None, None, :, None]  # [B, 1, 1, T, S]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bksd->btkgd", weights, v, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(B, T, heads, D).astype(q.dtype)


# Two names for one specification: many queries are bound by arithmetic, few by the bytes of the cache,
# so that each gets a kernel of its own.
attention = Op("attention", reference)
decode_attention = Op("decode_attention", reference)

DECODE_QUERIES = 8  # up to so many queries a row count as decoding

CASES = {
    "7b": dict(heads=32, kv_heads=32, head_dim=128),
    "70b": dict(heads=64, kv_heads=8, head_dim=128),
    "tinyllama": dict(heads=32, kv_heads=4, head_dim=64),
}
