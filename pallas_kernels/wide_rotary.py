"""What ends a QKV product: the halves of heads are turned, queries written, keys and values put into the cache."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.wide_plan import Rotary, WideTiles

Refs = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """A few tokens of one sequence: the pairs' cosines and sines, and where they go."""

    cos: jax.Array  # [pairs of a tile, tokens]
    sin: jax.Array
    row: Any  # of the first, among all
    sequence: Any
    slot: Any  # of the first, in the cache


def look_up(refs: Refs, rotary: Rotary, out: Any, row: Any, tiles: WideTiles) -> Chunk:
    """The chunk from ``row`` on, for the tile from pair ``out`` on; values are not turned."""
    rows = rotary.batch * rotary.tokens
    turns = lax.div(out, rotary.pairs) < rotary.heads + rotary.kv_heads

    def load(name: str, otherwise: float) -> jax.Array:
        table = refs[name].at[:, pl.ds(row, tiles.chunk)]
        found = plgpu.load(table, layout=plgpu.Layout.WGMMA, optimized=False)
        return jnp.where(lax.broadcast(turns, found.shape), found, otherwise)

    first = jnp.minimum(row, rows - 1)
    sequence = lax.div(first, rotary.tokens)
    # Rows behind the last token have no place in the cache; past its end nothing is written.
    slot = jnp.where(row < rows, refs["start"][sequence] + lax.rem(first, rotary.tokens), refs["k"].shape[3])
    return Chunk(load("cos", 1.0), load("sin", 0.0), row, sequence, slot)


def turned(halves: list[jax.Array], by: Chunk) -> list[jax.Array]:
    """Both halves of the pairs, each [pairs, tokens]."""
    a, b = halves
    return [a * by.cos - b * by.sin, b * by.cos + a * by.sin]


def put(refs: Refs, rotary: Rotary, place: Any, half: int, out: Any, chunk: Chunk) -> None:
    """Copy one half of the pairs from ``place`` [tokens, pairs] to where every head belongs."""
    n = rotary.pairs
    tokens, layer = place.shape[0], refs["cache_layer"][0]
    for i in range(place.shape[1] // n):
        piece, head = place.at[:, pl.ds(i * n, n)], lax.div(out, n) + i
        columns = pl.ds(half * n, n)
        kv = head - rotary.heads

        @pl.when(kv < 0)
        def _(piece: Any = piece, head: Any = head) -> None:
            target = pl.ds(chunk.row, tokens), pl.ds(head * rotary.head_dim + half * n, n)
            plgpu.copy_smem_to_gmem(piece, refs["out"].at[target])

        def cache(name: str, kv: Any, piece: Any) -> None:
            slots = pl.ds(chunk.slot, tokens)
            plgpu.copy_smem_to_gmem(piece, refs[name].at[layer, chunk.sequence, kv, slots, columns])

        pl.when((kv >= 0) & (kv < rotary.kv_heads))(lambda: cache("k", kv, piece))
        pl.when(kv >= rotary.kv_heads)(lambda: cache("v", kv - rotary.kv_heads, piece))
