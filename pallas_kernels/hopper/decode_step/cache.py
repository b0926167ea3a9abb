"""Where the cached keys and values of a row lie: in one array, or in pages that a table lists.

`cached_row` is the only place where the kernel tells one from the other. Attention loads tiles of keys, and writes new
ones, through what it returns. A page is a tile of keys: both caches have the same tiles in the same order, and give the
same bits.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .block import Block
from .memory import Ref

KeysAndValues = tuple[Ref, Ref]


class CachedRow(Protocol):
    """The keys and values of one row of the batch and one key head, in one layer."""

    def find(self, j: Any) -> Any:
        """What a load of tile ``j`` must know. It may be in global memory: find it long before the load."""
        ...

    def tile(self, j: Any, found: Any) -> KeysAndValues:
        """Tile ``j``, each [keys, head_dim]; ``found`` is what `find` gave."""
        ...

    def slot(self, position: Any) -> tuple[Any, KeysAndValues]:
        """Whether the cache has room for a position, and where it lies, each [head_dim]."""
        ...


def cached_row(b: Block, row: Any, head: Any) -> CachedRow:
    """Where row ``row`` of the batch has the keys and values of a key head."""
    if b.inputs.table is None:
        k, v = (cache.at[b.layer, row, head] for cache in (b.buffers.k, b.buffers.v))
        return ContiguousRow(k, v, b.plan.tiles.keys)
    return PagedRow(b.buffers.k, b.buffers.v, b.inputs.table, b.layer, row, head)


@dataclass(frozen=True)
class ContiguousRow:
    """A row that has its keys side by side."""

    k: Ref  # [max_len, head_dim]
    v: Ref
    keys: int  # of a tile

    def find(self, j: Any) -> None:
        return None

    def tile(self, j: Any, found: None) -> KeysAndValues:
        keys = pl.ds(j * self.keys, self.keys)
        return self.k.at[keys], self.v.at[keys]

    def slot(self, position: Any) -> tuple[Any, KeysAndValues]:
        return position < self.k.shape[0], (self.k.at[position], self.v.at[position])


@dataclass(frozen=True)
class PagedRow:
    """A row whose tile ``j`` is page ``table[row, j]``. A number that is no page is never followed: a load reads
    another page instead, whose keys are of no matter, and a write is dropped."""

    k: Ref  # [L, pages, kv_heads, keys, head_dim]
    v: Ref
    table: Ref  # [batch, P] int32
    layer: Any
    row: Any
    head: Any

    def find(self, j: Any) -> Any:
        return self.table[self.row, jnp.minimum(j, self.table.shape[1] - 1)]

    def tile(self, j: Any, found: Any) -> KeysAndValues:
        at = self.layer, self._existing(found), self.head  # here, not in `find`: a use of the number waits for its load
        return self.k.at[at], self.v.at[at]

    def slot(self, position: Any) -> tuple[Any, KeysAndValues]:
        j, within = lax.div(position, self.k.shape[3]), lax.rem(position, self.k.shape[3])
        page = self.find(j)
        exists = (j < self.table.shape[1]) & (page >= 0) & (page < self.k.shape[1])
        at = self.layer, self._existing(page), self.head, within
        return exists, (self.k.at[at], self.v.at[at])

    def _existing(self, page: Any) -> Any:
        return lax.clamp(0, page, self.k.shape[1] - 1)
