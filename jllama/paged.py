"""The paged key/value cache: a pool of pages that sequences take and share, and a table that says which are whose.

It stands where a `KVCache` does: `forward` takes either, and asks it to write new keys and to attend.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jllama.config import LlamaConfig
from jllama.errors import InputError
from jllama.kernels import PAGE
from jllama.mesh.layout import DATA, MODEL, AnyMesh, axis_size, spec


@struct.dataclass
class PagedCache:
    """Position ``p`` of row ``b`` is slot ``p % PAGE`` of page ``table[b, p // PAGE]``. A row is what one call of
    `forward` continues; several rows may share pages. Several pieces of one prompt may be rows of one call if they have
    more than `DECODE_QUERIES` tokens: then every layer writes its keys before it attends. Shorter ones may run as one
    launch, which reads the cache as it was before the call. A page number past the last is none: what goes there is
    dropped."""

    k: jax.Array  # [layers, pages, kv_heads, PAGE, head_dim], after rotary
    v: jax.Array  # [layers, pages, kv_heads, PAGE, head_dim]
    table: jax.Array  # [B, P] int32
    lengths: jax.Array  # [B] int32
    # Whether all lengths are known to be multiples of `START_MULTIPLE`, as a kernel needs them that writes long pieces.
    aligned: bool = struct.field(pytree_node=False, default=False)

    @property
    def stacked(self) -> bool:
        """Pages hold all layers, on a leading axis."""
        return True

    def specs(self, mesh: AnyMesh) -> "PagedCache":
        """The `PartitionSpec` of every array on a mesh. The pages of a row lie where the row does: the numbers in its
        table are those of that part of the pool."""
        rows: Any = spec(mesh, DATA)
        pages: Any = pages_spec(mesh)
        return PagedCache(pages, pages, rows, rows, self.aligned)

    def arrays(self, index: int) -> tuple[jax.Array, jax.Array, int]:
        """The arrays that hold the keys and values of a layer, and the layer's index in them."""
        return self.k, self.v, index

    def with_arrays(self, index: int, k: jax.Array, v: jax.Array) -> "PagedCache":
        """The cache with ``k`` and ``v`` in place of what `arrays` returns."""
        del index
        return replace(self, k=k, v=v)

    def advanced(self, lengths: jax.Array) -> "PagedCache":
        """The cache with new lengths, which may be any."""
        return replace(self, lengths=lengths, aligned=False)


def pages_spec(mesh: AnyMesh) -> PartitionSpec:
    """How the keys, and the values, of a pool are divided: pages over ``data``, heads over ``model``."""
    return spec(mesh, None, DATA, MODEL)


def init_pages(
    config: LlamaConfig, pages: int, dtype: jnp.dtype | type, *, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of an empty pool."""
    if pages < 1:
        raise InputError(f"pages: expected at least 1, found {pages}")
    kv_heads = max(config.n_kv_heads, axis_size(mesh, MODEL))  # a key head that several shards have is there as often
    shape = (config.n_layers, pages, kv_heads, PAGE, config.head_dim)
    lies = None if mesh is None else NamedSharding(mesh, pages_spec(mesh))
    return jnp.zeros(shape, dtype, device=lies), jnp.zeros(shape, dtype, device=lies)


def page_bytes(config: LlamaConfig, dtype: jnp.dtype | type) -> int:
    """What one page takes on the device."""
    return 2 * config.n_layers * config.n_kv_heads * PAGE * config.head_dim * jnp.dtype(dtype).itemsize


def pages_for(positions: int) -> int:
    """How many pages hold so many positions."""
    return -(-positions // PAGE)
