"""The key/value cache: keys and values of every layer, a length for every row."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jllama.config import LlamaConfig
from pallas_kernels import Indexed

Layers = tuple[jax.Array, ...] | jax.Array  # one array a layer, or all on a leading axis


@struct.dataclass
class KVCache:
    """Keys and values seen so far. Slots at or past a row's length are free: their content is never read.

    Like the weights, a tuple of arrays for XLA, which copies every slice of a stacked one before a product, or one
    array with a leading axis for kernels that index it themselves."""

    k: Layers  # of every layer, [B, kv_heads, S, head_dim], after rotary
    v: Layers  # of every layer, [B, kv_heads, S, head_dim]
    lengths: jax.Array  # [B] int32

    @property
    def stacked(self) -> bool:
        """Whether the layers are on a leading axis."""
        return not isinstance(self.k, tuple)

    @property
    def max_len(self) -> int:
        """How many positions every row can hold."""
        return self.k[0].shape[-2] if isinstance(self.k, tuple) else self.k.shape[-2]

    def layer(self, index: int) -> tuple[jax.Array, jax.Array] | tuple[Indexed, Indexed]:
        """Keys and values of a layer as ops take them; nothing is copied."""
        if isinstance(self.k, tuple):
            return self.k[index], self.v[index]
        return Indexed(self.k, index), Indexed(self.v, index)  # pyright: ignore[reportArgumentType]

    def write(self, layer: int, k: jax.Array, v: jax.Array) -> "KVCache":
        """Put k and v [B, T, kv_heads, head_dim] behind each row's length, which stays; what has no room is dropped."""
        return replace(self, k=self._write(self.k, layer, k), v=self._write(self.v, layer, v))

    def _write(self, arrays: Layers, layer: int, new: jax.Array) -> Layers:
        B, T, kv_heads, _ = new.shape
        rows, slots = jnp.arange(B)[:, None], self.lengths[:, None] + jnp.arange(T)  # [B, T]
        if not isinstance(arrays, tuple):
            # Every axis but the last is indexed, in order: else XLA on a GPU transposes, and so copies, the whole.
            places = arrays.at[layer, rows[:, :, None], jnp.arange(kv_heads), slots[:, :, None]]
            return places.set(new.astype(arrays.dtype), mode="drop", unique_indices=True)
        old = arrays[layer]
        written = old.at[rows, :, slots].set(new.astype(old.dtype), mode="drop", unique_indices=True)
        # Attention reads what is written here. Without the barrier XLA's CPU backend fuses the write into that read as
        # well, and so writes, and first copies, every layer twice.
        return (
            *arrays[:layer],
            lax.optimization_barrier(written),
            *arrays[layer + 1 :],
        )


def init_cache(
    config: LlamaConfig, batch: int, max_len: int, dtype: jnp.dtype | type, *, stacked: bool = False
) -> KVCache:
    """An empty cache with room for ``max_len`` positions a row, or a few more; ``stacked`` as the params are."""
    shape = (batch, config.n_kv_heads, _whole_tiles(max_len), config.head_dim)
    return _empty(config.n_layers, shape, jnp.dtype(dtype), stacked)


# One program for all layers: their arrays made one by one take longer than a short prompt.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(n_layers: int, shape: tuple[int, ...], dtype: jnp.dtype, stacked: bool) -> KVCache:
    def arrays() -> Layers:
        if stacked:
            return jnp.zeros((n_layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(n_layers))

    return KVCache(arrays(), arrays(), jnp.zeros(shape[0], jnp.int32))


def _whole_tiles(max_len: int) -> int:
    # The GPU's copy engine takes tiles of 8 rows: kernels would have to pad, and so copy, a cache of another size.
    return -(-max_len // 8) * 8


def grow(cache: KVCache, max_len: int) -> KVCache:
    """The same content with room for ``max_len`` positions."""
    room = _whole_tiles(max_len) - cache.max_len

    def wider(a: jax.Array) -> jax.Array:
        return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, room), (0, 0)])

    return replace(cache, k=jax.tree.map(wider, cache.k), v=jax.tree.map(wider, cache.v))


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
