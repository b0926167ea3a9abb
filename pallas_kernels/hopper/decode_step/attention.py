"""The attention phase of a decode step as functions over tiles: parts of the keys, with rotary and the cache write.
Whoever reads the parts joins them.

An *item* is a row of the batch, a key head and a part of that row's cached keys. Its queries are all 8 token rows of
all heads that share the key head, whichever row of the batch they belong to: what a row computes against the cache of
another is not stored. The new keys are no part of the cache yet. They are one more tile, the same for all rows of the
batch, in which a token sees its own row up to itself; the item with the last part of the keys adds it, and writes it.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.layouts import one_per_lane, one_per_thread, pair_per_thread
from ..common.online_softmax import QUERY_TILE, empty_statistics, pv_product, rescale, update_softmax
from .plan import ROWS, Plan
from .products import Refs
from .prologues import load


def begin_first(plan: Plan, layer: Any, block: Any, refs: Refs, smem: Refs) -> None:
    """What can be done before the phase begins: cached keys were written in earlier steps."""

    @pl.when(block < plan.items)
    def _() -> None:
        begin(plan, item_of(plan, layer, block, refs), smem)


def attend(plan: Plan, layer: Any, block: Any, refs: Refs, smem: Refs) -> None:
    """Every item of this block, by one warpgroup."""

    def turn(i: Any, _: Any) -> None:
        item = item_of(plan, layer, i * plan.blocks + block, refs)
        pl.when(i > 0)(lambda: begin(plan, item, smem))
        one_item(plan, item, refs, smem)

    lax.fori_loop(0, (plan.items - block + plan.blocks - 1) // plan.blocks, turn, None)


@dataclass(frozen=True)
class Item:
    """A row of the batch, a key head, a part of its keys: tiles ``low`` to ``high`` of the ``start`` that are there."""

    b: Any
    head: Any
    split: Any
    start: Any
    low: Any
    high: Any
    k: Any
    v: Any

    def fetch(self, plan: Plan, j: Any, smem: Refs) -> None:
        """Start to load tile ``j``."""
        slot, part = lax.rem(j - self.low, plan.tiles.stages), pl.ds(j * plan.tiles.keys, plan.tiles.keys)
        plgpu.copy_gmem_to_smem(self.k.at[part], smem["k"].at[slot], smem["keys_full"].at[slot])
        plgpu.copy_gmem_to_smem(self.v.at[part], smem["v"].at[slot], smem["keys_full"].at[slot])


def item_of(plan: Plan, layer: Any, index: Any, refs: Refs) -> Item:
    """Item ``index`` of all."""
    row_and_head, split = index // plan.splits, lax.rem(index, plan.splits)
    b, head = row_and_head // plan.shape.kv_heads, lax.rem(row_and_head, plan.shape.kv_heads)
    start = refs["start"][b]
    count = (start + plan.tiles.keys - 1) // plan.tiles.keys
    low, high = split * count // plan.splits, (split + 1) * count // plan.splits
    k, v = (refs[name].at[layer, b, head] for name in ("k", "v"))
    return Item(b, head, split, start, low, high, k, v)


def begin(plan: Plan, item: Item, smem: Refs) -> None:
    """Start to load the first tiles of keys. The last place is the new keys' first."""
    plgpu.commit_smem()  # ordinary accesses to what shares this memory are over before TMA writes it
    high = jnp.minimum(item.low + plan.tiles.stages - 1, item.high)
    lax.fori_loop(item.low, high, lambda j, _: item.fetch(plan, j, smem), None)


def one_item(plan: Plan, item: Item, refs: Refs, smem: Refs) -> None:
    """Attention of the queries over a part of the cache, and over the new keys where it is the last part."""
    shape, keys, stages = plan.shape, plan.tiles.keys, plan.tiles.stages
    scale = shape.head_dim**-0.5 * math.log2(math.e)
    # All loads before the first store, which they could not pass.
    q = [rotated(plan, item.head * shape.group + g, refs) for g in range(shape.group)]
    new_tile(plan, item.head, refs, smem)
    for g in range(shape.group):
        smem["q"].at[pl.ds(g * ROWS, ROWS)][...] = q[g]
    plgpu.commit_smem()

    def scores(k: Any) -> jax.Array:
        def product(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, smem["q"], k.T)
            return acc[...]

        return pl.run_scoped(product, plgpu.ACC((QUERY_TILE, keys), jnp.float32))

    def add(s: jax.Array, slot: Any, carry: Any) -> Any:
        acc, m, total = carry
        p, alpha, m, total = update_softmax(s, m, total, scale)
        acc = pv_product(rescale(acc, alpha), p.astype(jnp.bfloat16), smem["v"].at[slot], smem.get("weights"))
        return acc, m, total

    def tile(j: Any, carry: Any) -> Any:
        """Cached tile ``j``; the one before the first is the new keys, in the ring's last place."""
        new = j < item.low
        slot = jnp.where(new, stages - 1, lax.rem(j - item.low, stages))
        pl.when(j >= item.low)(lambda: plgpu.barrier_wait(smem["keys_full"].at[slot]))
        s = visible(scores(smem["k"].at[slot]), new, item.start - 1 - j * keys, shape.queries)
        carry = add(s, slot, carry)
        pl.when(new)(plgpu.commit_smem)
        pl.when(j + stages < item.high)(lambda: item.fetch(plan, j + stages, smem))
        return carry

    zeros = plgpu.layout_cast(jnp.zeros((QUERY_TILE, shape.head_dim), jnp.float32), plgpu.Layout.WGMMA)
    last = (item.split == plan.splits - 1).astype(jnp.int32)
    pl.when(last == 0)(lambda: fetch_last(plan, item, smem))
    acc, m, total = lax.fori_loop(item.low - last, item.high, tile, (zeros, *empty_statistics()))
    pl.when(item.split == plan.splits - 1)(lambda: write_cache(plan, item, smem))

    share = 1 / jnp.where(total > 0, total, 1.0)  # a part without keys is zero, not 0 / 0
    smem["part"][...] = rescale(acc, share)
    smem["log"][...] = m + jnp.log2(total)
    D = shape.head_dim
    for g in range(shape.group):
        column = item.head * shape.group + g

        def save(t: Any, _: Any, g: int = g, column: Any = column) -> None:
            token = item.b * shape.queries + t
            place = refs["parts"].at[item.split, token, pl.ds(column * D, D)]
            place[...] = load(smem["part"].at[g * ROWS + token], one_per_thread(D))
            # Once for every 8 columns, as those who join the parts read them.
            log = jnp.full(D // 8, smem["log"][g * ROWS + token])
            refs["logs"].at[item.split, token, pl.ds(column * (D // 8), D // 8)][...] = plgpu.layout_cast(
                log, one_per_lane(D // 8)
            )

        lax.fori_loop(0, shape.queries, save, None)


def rotated(plan: Plan, column: Any, refs: Refs) -> jax.Array:
    """One head of all tokens [8, D], turned by the tokens' positions; in float32, as the reference does."""
    D, layout = plan.shape.head_dim, pair_per_thread()
    first, second = (
        load(refs["qkv"].at[:, pl.ds(column * D + half * (D // 2), D // 2)], layout).astype(jnp.float32)
        for half in range(2)
    )
    cos, sin = load(refs["cos"], layout), load(refs["sin"], layout)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
    return turned.astype(jnp.bfloat16)


def new_tile(plan: Plan, head: Any, refs: Refs, smem: Refs) -> None:
    """The new keys and values of a key head, as a tile of their own in the last place of the ring, and once more to be
    written to the cache."""
    shape, D = plan.shape, plan.shape.head_dim
    k = rotated(plan, shape.heads + head, refs)
    column = (shape.heads + shape.kv_heads + head) * D
    v = load(refs["qkv"].at[:, pl.ds(column, D)], pair_per_thread())
    # Weights of keys that are not there are zero, but zero times what happens to lie there may be no number.
    token = plgpu.broadcasted_iota(jnp.int32, (ROWS, D), 0, layout=pair_per_thread())
    v = jnp.where(token < shape.rows, v.astype(jnp.float32), 0.0).astype(jnp.bfloat16)
    behind = plan.tiles.keys - ROWS
    zeros = plgpu.layout_cast(jnp.zeros((behind, D), jnp.bfloat16), pair_per_thread())
    for name, value in (("k", k), ("v", v)):
        tile = smem[name].at[plan.tiles.stages - 1]
        tile.at[pl.ds(0, ROWS)][...] = value
        tile.at[pl.ds(ROWS, behind)][...] = zeros
    smem["new_k"][...] = k
    smem["new_v"][...] = v


def write_cache(plan: Plan, item: Item, smem: Refs) -> None:
    """Put the new keys and values of a row behind its length; what has no room is dropped."""
    shape = plan.shape

    def token(t: Any, _: Any) -> None:
        @pl.when(item.start + t < shape.max_len)
        def _() -> None:
            for cache, new in ((item.k, smem["new_k"]), (item.v, smem["new_v"])):
                cache.at[item.start + t][...] = load(new.at[item.b * shape.queries + t], one_per_thread(shape.head_dim))

    lax.fori_loop(0, shape.queries, token, None)


def fetch_last(plan: Plan, item: Item, smem: Refs) -> None:
    """Load into the ring's last place, too, where no new keys take it."""
    j = item.low + plan.tiles.stages - 1
    pl.when(j < item.high)(lambda: item.fetch(plan, j, smem))


def visible(s: jax.Array, new: Any, last: Any, queries: int) -> jax.Array:
    """Scores [64, keys] of cached keys up to ``last``; or of the new ones: token row i % 8 sees those of its own row of
    the batch, up to itself."""
    row = lax.rem(plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA), ROWS)
    key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
    new, last = (lax.broadcast(a, s.shape) for a in (new, last))
    first = jnp.where(new, lax.div(row, queries) * queries, 0)
    return jnp.where((key >= first) & (key <= jnp.where(new, row, last)), s, -jnp.inf)
