"""The key/value cache: one pair of arrays for all layers, a length for every row."""

import jax
import jax.numpy as jnp
from flax import struct

from jllama.config import LlamaConfig


@struct.dataclass
class KVCache:
    """Keys and values seen so far. Slots at or past a row's length are free: their content is never read."""

    k: jax.Array  # [layers, B, kv_heads, S, head_dim], after rotary
    v: jax.Array  # [layers, B, kv_heads, S, head_dim]
    lengths: jax.Array  # [B] int32

    @property
    def max_len(self) -> int:
        """How many positions every row can hold."""
        return self.k.shape[3]

    def write(self, layer: int, k: jax.Array, v: jax.Array) -> "KVCache":
        """Put k and v [B, T, kv_heads, head_dim] behind each row's length, which stays. What does not fit is dropped."""
        return self.replace(k=_write(self.k, layer, k, self.lengths), v=_write(self.v, layer, v, self.lengths))


def _write(cache: jax.Array, layer: int, new: jax.Array, lengths: jax.Array) -> jax.Array:
    B, T = new.shape[:2]
    rows = jnp.arange(B)[:, None]
    slots = lengths[:, None] + jnp.arange(T)  # [B, T]
    return cache.at[layer, rows, :, slots].set(new.astype(cache.dtype), mode="drop", unique_indices=True)


def init_cache(config: LlamaConfig, batch: int, max_len: int, dtype: jnp.dtype | type) -> KVCache:
    """An empty cache."""
    shape = (config.n_layers, batch, config.n_kv_heads, max_len, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))


def cache_bytes(config: LlamaConfig, batch: int, max_len: int, dtype: jnp.dtype | type) -> int:
    """What `init_cache` would take on the device."""
    return 2 * config.n_layers * batch * config.n_kv_heads * max_len * config.head_dim * jnp.dtype(dtype).itemsize
