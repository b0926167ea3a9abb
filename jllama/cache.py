"""The key/value cache: an array of keys and one of values for every layer, a length for every row."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jllama.config import LlamaConfig


@struct.dataclass
class KVCache:
    """Keys and values seen so far. Slots at or past a row's length are free: their content is never read.

    Like the weights, a tuple of arrays for XLA, which copies every slice of a stacked one before a product."""

    k: tuple[jax.Array, ...]  # of every layer, [B, kv_heads, S, head_dim], after rotary
    v: tuple[jax.Array, ...]  # of every layer, [B, kv_heads, S, head_dim]
    lengths: jax.Array  # [B] int32

    @property
    def max_len(self) -> int:
        """How many positions every row can hold."""
        return self.k[0].shape[-2]

    def write(self, layer: int, k: jax.Array, v: jax.Array) -> "KVCache":
        """Put k and v [B, T, kv_heads, head_dim] behind each row's length, which stays; what has no room is dropped."""
        return replace(self, k=self._write(self.k, layer, k), v=self._write(self.v, layer, v))

    def _write(self, arrays: tuple[jax.Array, ...], layer: int, new: jax.Array) -> tuple[jax.Array, ...]:
        B, T = new.shape[:2]
        rows = jnp.arange(B)[:, None]
        slots = self.lengths[:, None] + jnp.arange(T)  # [B, T]
        old = arrays[layer]
        written = old.at[rows, :, slots].set(new.astype(old.dtype), mode="drop", unique_indices=True)
        # Attention reads what is written here. Without the barrier XLA's CPU backend fuses the write into that read as
        # well, and so writes, and first copies, every layer twice.
        return (
            *arrays[:layer],
            lax.optimization_barrier(written),
            *arrays[layer + 1 :],
        )


def init_cache(config: LlamaConfig, batch: int, max_len: int, dtype: jnp.dtype | type) -> KVCache:
    """An empty cache with room for ``max_len`` positions a row, or a few more."""
    shape = (batch, config.n_kv_heads, _whole_tiles(max_len), config.head_dim)
    k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)) for _ in "kv")
    return KVCache(k, v, jnp.zeros(batch, jnp.int32))


def _whole_tiles(max_len: int) -> int:
    # The GPU's copy engine takes tiles of 8 rows: kernels would have to pad, and so copy, a cache of another size.
    return -(-max_len // 8) * 8


def grow(cache: KVCache, max_len: int) -> KVCache:
    """The same content with room for ``max_len`` positions."""
    room = [(0, 0), (0, 0), (0, _whole_tiles(max_len) - cache.max_len), (0, 0)]
    k, v = (tuple(jnp.pad(a, room) for a in arrays) for arrays in (cache.k, cache.v))
    return replace(cache, k=k, v=v)


def cache_bytes(config: LlamaConfig, batch: int, max_len: int, dtype: jnp.dtype | type) -> int:
    """What `init_cache` would take on the device."""
    return (
        2
        * config.n_layers
        * batch
        * config.n_kv_heads
        * _whole_tiles(max_len)
        * config.head_dim
        * jnp.dtype(dtype).itemsize
    )
