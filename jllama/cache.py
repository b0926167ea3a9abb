"""The key/value cache: the keys and values of every layer, and the length of every row."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jllama.config import LlamaConfig
from jllama.kernels import DECODE_QUERIES, LayerView, attention, decode_attention, paged_attention
from jllama.mesh.layout import DATA, MODEL, AnyMesh, axis_size, spec

Layers = tuple[jax.Array, ...] | jax.Array  # one array per layer, or one stacked array with a leading layer axis


@struct.dataclass
class KVCache:
    """Keys and values of the tokens so far. Slots at or past the length of a row are free; attention ignores them.

    The layers have two forms, as in `Params`. A tuple of arrays is for XLA, which copies every slice of a stacked array
    before a matmul. One array with a leading layer axis is for kernels that index the layer themselves."""

    k: Layers  # of every layer, [B, kv_heads, S, head_dim], after rotary
    v: Layers  # of every layer, [B, kv_heads, S, head_dim]
    lengths: jax.Array  # [B] int32

    @property
    def stacked(self) -> bool:
        """Whether the layers are stacked on a leading axis."""
        return not isinstance(self.k, tuple)

    @property
    def max_len(self) -> int:
        """The number of positions that every row has room for."""
        return self.k[0].shape[-2] if isinstance(self.k, tuple) else self.k.shape[-2]

    @property
    def table(self) -> None:
        """The page table of every row: None, because the keys of a row are contiguous."""
        return None

    @property
    def aligned(self) -> bool:
        """Whether lengths are known to be multiples of something: see `PagedCache`. Rows without pages need not be."""
        return False

    def specs(self, mesh: AnyMesh) -> "KVCache":
        """The `PartitionSpec` of every array on a mesh."""
        layers: Any = cache_spec(mesh, stacked=self.stacked)
        k, v = jax.tree.map(lambda _: layers, (self.k, self.v))
        return KVCache(k, v, spec(mesh, DATA))  # pyright: ignore[reportArgumentType]

    def layer(self, index: int) -> tuple[jax.Array, jax.Array] | tuple[LayerView, LayerView]:
        """The keys and values of a layer as ops take them. Nothing is copied."""
        if isinstance(self.k, tuple):
            return self.k[index], self.v[index]
        return LayerView(self.k, index), LayerView(self.v, index)  # pyright: ignore[reportArgumentType]

    def arrays(self, index: int) -> tuple[jax.Array, jax.Array, int | None]:
        """The arrays that hold the keys and values of a layer. The third value is the layer's index in them if they are
        stacked, else None."""
        if isinstance(self.k, tuple):
            return self.k[index], self.v[index], None
        return self.k, self.v, index  # pyright: ignore[reportReturnType]

    def with_arrays(self, index: int, k: jax.Array, v: jax.Array) -> "KVCache":
        """The cache with ``k`` and ``v`` in place of what `arrays` returns."""
        if self.stacked:
            return replace(self, k=k, v=v)
        return replace(self, k=_replaced(self.k, index, k), v=_replaced(self.v, index, v))

    def advanced(self, lengths: jax.Array) -> "KVCache":
        """The cache with new lengths."""
        return replace(self, lengths=lengths)


def cached_attention(
    q: jax.Array,  # [B, T, heads, D]: the first query of a row is at the position ``start`` says
    k: jax.Array,  # what `KVCache.arrays` or `PagedCache.arrays` gives
    v: jax.Array,
    table: jax.Array | None,
    start: jax.Array,  # [B]
    *,
    layer: jax.Array | int | None,
    backend: str = "auto",
) -> jax.Array:
    """Attention [B, T, heads, D] over the keys and values of a layer, by the op for its kind of cache."""
    if table is not None:
        return paged_attention(q, k, v, table, start, layer=layer, backend=backend)
    op = decode_attention if q.shape[1] <= DECODE_QUERIES else attention
    return op(q, *(a if layer is None else LayerView(a, layer) for a in (k, v)), start, backend=backend)


def _replaced(arrays: Layers, index: int, new: jax.Array) -> Layers:
    return (*arrays[:index], new, *arrays[index + 1 :])


def init_cache(
    config: LlamaConfig,
    batch: int,
    max_len: int,
    dtype: DTypeLike,
    *,
    stacked: bool = False,
    mesh: Mesh | None = None,
) -> KVCache:
    """An empty cache with room for at least ``max_len`` positions per row. ``stacked`` and ``mesh`` must be as in the
    params. On a mesh, rows are divided over ``data`` and heads over ``model``."""
    kv_heads = max(config.n_kv_heads, axis_size(mesh, MODEL))  # each shard that holds a key head stores it
    shape = (batch, kv_heads, _whole_tiles(max_len), config.head_dim)
    empty = _empty if mesh is None else _empty_on(mesh, stacked)
    return empty(config.n_layers, shape, jnp.dtype(dtype), stacked)


@functools.cache
def _empty_on(mesh: Mesh, stacked: bool) -> Callable[..., KVCache]:
    layers = NamedSharding(mesh, cache_spec(mesh, stacked=stacked))
    lies = KVCache(layers, layers, NamedSharding(mesh, spec(mesh, DATA)))  # pyright: ignore[reportArgumentType]
    return jax.jit(_new, static_argnums=(0, 1, 2, 3), out_shardings=lies)


def cache_spec(mesh: AnyMesh, *, stacked: bool) -> PartitionSpec:
    """How the keys, and the values, of a layer or of all stacked layers are divided."""
    return spec(mesh, *(None,) * stacked, DATA, MODEL)


def _new(n_layers: int, shape: tuple[int, ...], dtype: jnp.dtype, stacked: bool) -> KVCache:
    def arrays() -> Layers:
        if stacked:
            return jnp.zeros((n_layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(n_layers))

    return KVCache(arrays(), arrays(), jnp.zeros(shape[0], jnp.int32))


# One program allocates all layers. One allocation per layer would take longer than the prefill of a short prompt.
_empty = jax.jit(_new, static_argnums=(0, 1, 2, 3))


def _whole_tiles(max_len: int) -> int:
    # The GPU's copy engine works on tiles of 8 rows. Kernels would have to pad, and so copy, a cache of another size.
    return -(-max_len // 8) * 8


def grow(cache: KVCache, max_len: int) -> KVCache:
    """The cache with the same content and room for ``max_len`` positions."""
    room = _whole_tiles(max_len) - cache.max_len

    def padded(a: jax.Array) -> jax.Array:
        return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, room), (0, 0)])

    return replace(cache, k=jax.tree.map(padded, cache.k), v=jax.tree.map(padded, cache.v))


def cache_bytes(config: LlamaConfig, batch: int, max_len: int, dtype: DTypeLike) -> int:
    """Bytes that the cache of `init_cache` takes on the device."""
    return (
        2
        * config.n_layers
        * batch
        * config.n_kv_heads
        * _whole_tiles(max_len)
        * config.head_dim
        * jnp.dtype(dtype).itemsize
    )
