"""The key/value cache: keys and values of every layer, a length for every row."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from jllama.config import LlamaConfig
from jllama.kernels import DECODE_QUERIES, LayerView, attention, decode_attention, write

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

    def layer(self, index: int) -> tuple[jax.Array, jax.Array] | tuple[LayerView, LayerView]:
        """Keys and values of a layer as ops take them; nothing is copied."""
        if isinstance(self.k, tuple):
            return self.k[index], self.v[index]
        return LayerView(self.k, index), LayerView(self.v, index)  # pyright: ignore[reportArgumentType]

    def arrays(self, index: int) -> tuple[jax.Array, jax.Array, int | None]:
        """The arrays that hold a layer's keys and values, and its number where they hold those of all."""
        if isinstance(self.k, tuple):
            return self.k[index], self.v[index], None
        return self.k, self.v, index  # pyright: ignore[reportReturnType]

    def with_arrays(self, index: int, k: jax.Array, v: jax.Array) -> "KVCache":
        """With others in the place of `arrays`."""
        if self.stacked:
            return replace(self, k=k, v=v)
        return replace(self, k=_replaced(self.k, index, k), v=_replaced(self.v, index, v))

    def attend(self, index: int, q: jax.Array, *, backend: str = "auto") -> jax.Array:
        """Attention of the queries [B, T, heads, D] that stand behind each row's length over a layer's keys and
        values."""
        op = decode_attention if q.shape[1] <= DECODE_QUERIES else attention
        return op(q, *self.layer(index), self.lengths, backend=backend)

    def write(self, index: int, k: jax.Array, v: jax.Array) -> "KVCache":
        """Put k and v [B, T, kv_heads, head_dim] behind each row's length, which stays; what has no room is dropped."""
        *old, layer = self.arrays(index)
        return self.with_arrays(
            index, *(write(a, new, self.lengths, layer) for a, new in zip(old, (k, v), strict=True))
        )


def _replaced(arrays: Layers, index: int, new: jax.Array) -> Layers:
    return (*arrays[:index], new, *arrays[index + 1 :])


def init_cache(config: LlamaConfig, batch: int, max_len: int, dtype: DTypeLike, *, stacked: bool = False) -> KVCache:
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


def cache_bytes(config: LlamaConfig, batch: int, max_len: int, dtype: DTypeLike) -> int:
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
