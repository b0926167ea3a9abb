"""Where the keys and values of a row lie: in rows of their own, or in pages that a table lists."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...layer_view import LayerView, as_stacked, layer_index
from ..common.tiles import pad_rows

Ref = Any  # Pallas has no public type for a reference


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of all layers, and which of them to read. On the host the fields are arrays, in a kernel
    references to them."""

    layer: Any  # int32 [1]
    k: Any  # [layers, B, kv_heads, S, D]; with a table [layers, pages, kv_heads, size, D]
    v: Any
    table: Any = None  # int32 [B, P]: the pages of each row

    @staticmethod
    def contiguous(k: jax.Array | LayerView, v: jax.Array | LayerView) -> "Cache":
        """Keys and values [B, kv_heads, S, D]. An S that is no multiple of 8 is padded, and so copied."""
        (k, layer), (v, _) = as_stacked(k), as_stacked(v)
        return Cache(layer, pad_rows(k, 3), pad_rows(v, 3))

    @staticmethod
    def in_place(k: Any, v: Any, table: jax.Array | None, layer: jax.Array | int | None) -> "Cache":
        """Keys and values of all layers, arrays or references: in pages [layers, pages, kv_heads, size, D] or, without
        a table, side by side [layers, B, kv_heads, S, D], where S is a multiple of 8."""
        return Cache(layer_index(layer), k, v, table)

    @property
    def positions(self) -> int:
        """How many positions a row may have."""
        size = self.k.shape[3]
        return size if self.table is None else self.table.shape[1] * size

    def copies(self, keys: int) -> int:
        """How many copies, and so arrivals at its barrier, load a tile of ``keys`` keys or values."""
        return 1 if self.table is None else keys // self.k.shape[3]

    def find(self, row: Any, head: Any, position: Any) -> tuple[Any, tuple[Any, ...]]:
        """Whether there is room for a position of a row, and the indices of its slot in `k` and `v`.

        It may have to look into the table: find a slot long before it is used."""
        layer, size = self.layer[0], self.k.shape[3]
        if self.table is None:
            return position < size, (layer, row, head, jnp.minimum(position, size - 1))
        number, count = lax.div(position, size), self.k.shape[1]
        page = self.table[row, jnp.minimum(number, self.table.shape[1] - 1)]
        exists = (number < self.table.shape[1]) & (page >= 0) & (page < count)
        return exists, (layer, jnp.clip(page, 0, count - 1), head, lax.rem(position, size))

    def load(self, array: Ref, row: Any, head: Any, j: Any, last: Any, tile: Ref, barrier: Ref) -> None:
        """Start to load tile ``j`` of a row's keys or values, as ``array`` says, into ``tile`` [keys, D].

        ``last`` is the last position that a query sees. Pages after it are not read: in their place the tile gets the
        page of ``last`` again, which the mask hides. A page number outside the pool is clamped into it."""
        keys, layer = tile.shape[0], self.layer[0]
        if self.table is None:
            plgpu.copy_gmem_to_smem(array.at[layer, row, head, pl.ds(j * keys, keys)], tile, barrier)
            return
        pages, size = array.shape[1], array.shape[3]
        for i in range(keys // size):
            number = jnp.minimum(j * (keys // size) + i, lax.div(last, size))
            page = jnp.clip(self.table[row, number], 0, pages - 1)
            plgpu.copy_gmem_to_smem(array.at[layer, page, head], tile.at[pl.ds(i * size, size)], barrier)
