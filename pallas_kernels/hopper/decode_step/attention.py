"""The attention phase of a decode step: rotary, the cache write, and attention over splits of the keys. The prologue of
the o product joins the splits.

A *work item* is a row of the batch, a key head and a split of that row's cached keys. Its queries are all 8 tokens of
all heads that share the key head, whichever row of the batch they belong to: what a token computes against the cache of
another row is not stored. The new keys are not in the cache yet. They are one more tile, the same for all rows of the
batch, in which a token sees its own row up to itself; the item with the last split adds that tile, and writes the new
keys and values to the cache.
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
from ..common.online_softmax import KeyValueTile, attend_tiles, empty_softmax
from ..common.tiles import store
from .block import Block
from .cache import CachedRow, cached_row
from .plan import MAX_TOKENS
from .schedule import over_items


@dataclass(frozen=True)
class WorkItem:
    """A row of the batch, a key head, and a split of its keys: tiles ``low`` to ``high`` of ``start`` cached keys."""

    row: Any
    head: Any
    split: Any
    start: Any
    low: Any
    high: Any
    cache: CachedRow

    @staticmethod
    def of(b: Block, index: Any) -> "WorkItem":
        """Item ``index`` of all."""
        splits, kv_heads, keys = b.plan.key_splits, b.plan.shape.kv_heads, b.plan.tiles.keys
        row_and_head, split = index // splits, lax.rem(index, splits)
        row, head = row_and_head // kv_heads, lax.rem(row_and_head, kv_heads)
        start = b.inputs.start[row]
        tiles = (start + keys - 1) // keys
        low, high = split * tiles // splits, (split + 1) * tiles // splits
        return WorkItem(row, head, split, start, low, high, cached_row(b, row, head))

    def fetch(self, b: Block, j: Any, found: Any) -> None:
        """Start to load cached tile ``j``, which the cache ``found``."""
        s, slot = b.scratch, lax.rem(j - self.low, b.plan.tiles.stages)
        for cached, ring in zip(self.cache.tile(j, found), (b.attention.k, b.attention.v), strict=True):
            plgpu.copy_gmem_to_smem(cached, ring.at[slot], s.keys_full.at[slot])

    def fetch_first(self, b: Block) -> None:
        """Start to load the first tiles. The ring's last slot is the new keys' first."""
        plgpu.commit_smem()  # ordinary accesses to what shares this memory are over before TMA writes it
        high = jnp.minimum(self.low + b.plan.tiles.stages - 1, self.high)
        lax.fori_loop(self.low, high, lambda j, _: self.fetch(b, j, self.cache.find(j)), None)

    def fetch_last_slot(self, b: Block) -> None:
        """Load a tile into the ring's last slot too, where the new keys do not take it."""
        j = self.low + b.plan.tiles.stages - 1
        pl.when(j < self.high)(lambda: self.fetch(b, j, self.cache.find(j)))


def prefetch(b: Block) -> None:
    """Start to load the first item's keys before the grid barrier: they were written in earlier steps."""

    @pl.when(b.index < b.plan.attention_items)
    def _() -> None:
        WorkItem.of(b, b.index).fetch_first(b)


def attend(b: Block) -> None:
    """Every work item of this block."""

    def one_item(index: Any, turn: Any) -> None:
        item = WorkItem.of(b, index)
        pl.when(turn > 0)(lambda: item.fetch_first(b))  # the first item's were prefetched
        _attend_item(b, item)

    over_items(b, b.plan.attention_items, one_item)


def _attend_item(b: Block, item: WorkItem) -> None:
    """Attention of the queries over a split of the cache, and over the new keys where it is the last split."""
    shape, keys, stages, s = b.plan.shape, b.plan.tiles.keys, b.plan.tiles.stages, b.attention
    scale = shape.head_dim**-0.5 * math.log2(math.e)
    # All loads before the first store, which they could not pass.
    q = b.ops.rotate_heads(b, item.head * shape.heads_per_key, shape.heads_per_key)
    _store_new_tile(b, item.head)
    s.q.at[pl.ds(0, q.shape[0])][...] = q
    plgpu.commit_smem()

    def tile(j: Any) -> KeyValueTile:
        """Cached tile ``j``; the one before the first is the new keys, in the ring's last slot."""
        new = j < item.low
        slot = jnp.where(new, stages - 1, lax.rem(j - item.low, stages))
        next_found = item.cache.find(j + stages)  # on its way while this tile is multiplied

        def wait() -> None:  # one barrier for keys and values
            pl.when(j >= item.low)(lambda: plgpu.barrier_wait(b.scratch.keys_full.at[slot]))

        def release() -> None:
            pl.when(new)(plgpu.commit_smem)
            pl.when(j + stages < item.high)(lambda: item.fetch(b, j + stages, next_found))

        def mask(scores: jax.Array) -> jax.Array:
            return mask_tile(scores, new, item.start - 1 - j * keys, shape.queries)

        return KeyValueTile(s.k.at[slot], s.v.at[slot], wait, lambda: None, release, mask)

    softmax = empty_softmax(shape.head_dim)
    is_last = (item.split == b.plan.key_splits - 1).astype(jnp.int32)
    pl.when(is_last == 0)(lambda: item.fetch_last_slot(b))
    p_smem = b.scratch.softmax_weights
    softmax = attend_tiles(softmax, item.low - is_last, item.high, tile, q=s.q, scale=scale, p_smem=p_smem)
    pl.when(item.split == b.plan.key_splits - 1)(lambda: _write_cache(b, item))
    store(b.attention_output, softmax.output())
    store(b.scratch.log_sums, softmax.log_total())
    _store_output(b, item)


def _store_output(b: Block, item: WorkItem) -> None:
    """Write the item's output, and log2 of its softmax sums, for the o product's prologue."""
    shape, parts, logs, D = b.plan.shape, b.buffers.parts, b.buffers.logs, b.plan.shape.head_dim

    def one_token(t: Any, _: Any) -> None:
        token = item.row * shape.queries + t
        rows = [g * MAX_TOKENS + token for g in range(shape.heads_per_key)]
        outputs = b.ops.load_rows(b.attention_output, rows)
        log_sums = b.ops.load_scalars(b.scratch.log_sums, [(row,) for row in rows])
        for g, (output, log_sum) in enumerate(zip(outputs, log_sums, strict=True)):
            head = item.head * shape.heads_per_key + g
            store(parts.at[item.split, token, pl.ds(head * D, D)], output)
            # Once for every 8 columns, as the prologue that joins the splits reads them.
            log = plgpu.layout_cast(jnp.full(D // 8, log_sum), one_per_lane(D // 8))
            store(logs.at[item.split, token, pl.ds(head * (D // 8), D // 8)], log)

    lax.fori_loop(0, shape.queries, one_token, None)


def _store_new_tile(b: Block, head: Any) -> None:
    """Put the new keys and values of a key head into the ring's last slot, as a tile of their own, and once more where
    they are written to the cache from."""
    shape, D = b.plan.shape, b.plan.shape.head_dim
    k = b.ops.rotate_heads(b, shape.heads + head, 1)
    column = (shape.heads + shape.kv_heads + head) * D
    v = b.ops.load(b.buffers.qkv.at[:, pl.ds(column, D)], pair_per_thread())
    # Softmax weights of missing tokens are zero, but zero times a stale NaN is NaN.
    token = plgpu.broadcasted_iota(jnp.int32, (MAX_TOKENS, D), 0, layout=pair_per_thread())
    v = jnp.where(token < shape.tokens, v.astype(jnp.float32), 0.0).astype(jnp.bfloat16)
    missing = b.plan.tiles.keys - MAX_TOKENS
    zeros = plgpu.layout_cast(jnp.zeros((missing, D), jnp.bfloat16), pair_per_thread())
    for ring, value in ((b.attention.k, k), (b.attention.v, v)):
        tile = ring.at[b.plan.tiles.stages - 1]
        tile.at[pl.ds(0, MAX_TOKENS)][...] = value
        tile.at[pl.ds(MAX_TOKENS, missing)][...] = zeros
    store(b.scratch.new_k, k)
    store(b.scratch.new_v, v)


def _write_cache(b: Block, item: WorkItem) -> None:
    """Write the new keys and values of a row of the batch at its length; what the cache has no room for is dropped."""
    shape = b.plan.shape

    def one_token(t: Any, _: Any) -> None:
        has_room, slots = item.cache.slot(item.start + t)

        @pl.when(has_room)
        def _() -> None:
            for slot, new in zip(slots, (b.scratch.new_k, b.scratch.new_v), strict=True):
                token = b.ops.load(new.at[item.row * shape.queries + t], one_per_thread(shape.head_dim))
                store(slot, token)

    lax.fori_loop(0, shape.queries, one_token, None)


def mask_tile(scores: jax.Array, new: Any, last: Any, queries: int) -> jax.Array:
    """Scores [64, keys] with the keys that a query does not see masked: cached keys after ``last``; of the ``new``
    ones, those of other rows of the batch and those after the token itself, which is row i % 8."""
    row = lax.rem(plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA), MAX_TOKENS)
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
    new, last = (lax.broadcast(a, scores.shape) for a in (new, last))
    first = jnp.where(new, lax.div(row, queries) * queries, 0)
    return jnp.where((key >= first) & (key <= jnp.where(new, row, last)), scores, -jnp.inf)
