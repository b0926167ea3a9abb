"""One block of prefill attention: its items, its producer, and the order in which its consumers take them."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.online_softmax import QUERY_TILE, Ref
from ..common.ring import TileRing
from ..common.warp_specialize import warp_specialize
from .cache import Cache
from .prefill_consumer import Queries, attend

CONSUMERS = 2
ITEM_QUERIES = CONSUMERS * QUERY_TILE
PRODUCER_REGISTERS = 40


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TileStream:
    """Shared memory and barriers of a ring of tiles."""

    smem: Ref  # [stages, keys, D]
    full: Ref  # a barrier a stage: the tile has arrived
    free: Ref  # a barrier a stage: both consumers are done with it

    @property
    def ring(self) -> TileRing:
        """The ring, whose tile 0 is the first that comes through."""
        return TileRing(self.smem, self.full, self.free, self.smem.shape[0])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scratch:
    """Shared memory and barriers of a block. Pallas lays them out in the order of the fields."""

    q: Ref  # [ITEM_QUERIES, D]
    q_full: Ref
    q_free: Ref
    out: Ref  # [ITEM_QUERIES, D]
    keys: TileStream
    values: TileStream
    turn: Ref  # a barrier a consumer: it may use the tensor cores
    p: Ref | None  # [ITEM_QUERIES, keys], only for the interpreter


@dataclass(frozen=True)
class Item:
    """128 queries of one head of one row of the batch."""

    b: jax.Array
    head: jax.Array
    first: jax.Array | int  # first query
    start: jax.Array  # cached keys before the first query of the row
    last: jax.Array  # the last key that some query sees
    whole: jax.Array  # the first tiles of keys, which every query sees
    count: jax.Array  # tiles of keys that some query sees


@dataclass(frozen=True)
class Block:
    """One warpgroup of one block."""

    me: Any  # index of this warpgroup
    index: Any  # of this block
    start: Ref  # [B]
    items: Ref  # [blocks, 1 + most], see `schedule`
    order: Ref | None  # [B]: the rows by their length, if an item is a head of a whole row
    q: Ref  # [B, T, heads, D]
    cache: Cache
    out: Ref  # [B, T, heads, D]
    scratch: Scratch
    queries: int  # how many of T are real; those that fill up may stand where their row has no page

    @property
    def tile_keys(self) -> int:
        """Keys of a tile."""
        return self.scratch.keys.smem.shape[1]

    def item(self, nth: jax.Array) -> Item:
        """The ``nth`` item of this block."""
        (B, _, heads, _), S = self.q.shape, self.cache.positions
        index, q_tiles = self.items[self.index, 1 + nth], pl.cdiv(self.queries, ITEM_QUERIES)
        tiles = q_tiles if self.order is None else B
        row, tile = lax.div(index, tiles), lax.rem(index, tiles)
        if self.order is None:
            b, head, first = lax.div(row, heads), lax.rem(row, heads), tile * ITEM_QUERIES
        else:
            b, head, first = self.order[tile], row, 0
        start = self.start[b]
        whole = lax.div(jnp.minimum(start + first + 1, S), self.tile_keys)
        last = jnp.minimum(start + jnp.minimum(first + ITEM_QUERIES, self.queries), S) - 1
        return Item(b, head, first, start, last, whole, lax.div(last, self.tile_keys) + 1)

    def each_item(self, visit: Callable[[Item, jax.Array, jax.Array], None]) -> Any:
        """Visit all items in order, each with its number and how many tiles of keys went before it. Returns how many
        tiles there were."""

        def one(nth: jax.Array, done: jax.Array) -> jax.Array:
            item = self.item(nth)
            visit(item, nth, done)
            return done + item.count

        return lax.fori_loop(0, self.items[self.index, 0], one, jnp.int32(0))


def run_block(start: Ref, items: Ref, order: Ref | None, q: Ref, cache: Cache, out: Ref, scratch: Scratch, *,
              queries: int) -> None:  # fmt: skip
    """What the three warpgroups of a block do. ``queries`` of a row are real; the rest of q fills up."""
    me, index = lax.axis_index("warpgroup"), lax.axis_index("block")
    block = Block(me, index, start, items, order, q, cache, out, scratch, queries)
    warp_specialize(
        me,
        functools.partial(_produce, block),
        functools.partial(_consume, block),
        consumers=CONSUMERS,
        producer_registers=PRODUCER_REGISTERS if scratch.p is None else None,
    )


def _produce(block: Block) -> None:
    """Load the queries of every item, and stream its keys and values."""
    scratch, cache, keys, values = block.scratch, block.cache, block.scratch.keys.ring, block.scratch.values.ring
    shared = block.q.shape[2] // cache.k.shape[2]  # query heads of a key head

    def load(item: Item, nth: jax.Array, done: jax.Array) -> None:
        pl.when(nth > 0)(lambda: plgpu.barrier_wait(scratch.q_free))
        queries = block.q.at[item.b, pl.ds(item.first, ITEM_QUERIES), item.head]
        plgpu.copy_gmem_to_smem(queries, scratch.q, scratch.q_full)
        kv_head = lax.div(item.head, shared)

        @pl.loop(0, item.count)
        def _(j: jax.Array) -> None:
            for ring, array in ((keys, cache.k), (values, cache.v)):
                load = functools.partial(cache.load, array, item.b, kv_head, j, item.last)
                ring.from_here(done).fetch(j, load)

    done = block.each_item(load)
    keys.from_here(done).drain()
    values.from_here(done).drain()
    plgpu.barrier_wait(scratch.q_free)


def _consume(block: Block) -> None:
    """Compute this warpgroup's 64 queries of every item."""
    scratch, me = block.scratch, block.me
    D, S = block.q.shape[3], block.cache.positions
    own = pl.ds(me * QUERY_TILE, QUERY_TILE)

    @pl.when(me == 1)
    def _() -> None:
        plgpu.barrier_arrive(scratch.turn.at[0])

    def answer(item: Item, _: jax.Array, done: jax.Array) -> None:
        first = item.first + me * QUERY_TILE

        def last_key(j: jax.Array | int) -> jax.Array:
            row = plgpu.broadcasted_iota(jnp.int32, (QUERY_TILE, block.tile_keys), 0, layout=plgpu.Layout.WGMMA)
            return jnp.minimum(item.start + first + row, S - 1) - j * block.tile_keys

        plgpu.barrier_wait(scratch.q_full)
        queries = Queries(
            q=scratch.q.at[own],
            q_free=scratch.q_free,
            keys=scratch.keys.ring.from_here(done),
            values=scratch.values.ring.from_here(done),
            take_turn=lambda: plgpu.barrier_wait(scratch.turn.at[me]),
            pass_turn=lambda: plgpu.barrier_arrive(scratch.turn.at[1 - me]),
            last_key=last_key,
            whole=item.whole,
            count=item.count,
            scale=D**-0.5 * math.log2(math.e),  # exp2 is the hardware's exponential
            p_smem=None if scratch.p is None else scratch.p.at[own],
        )
        out = attend(queries)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous item's result may still be on its way
        scratch.out[own] = out
        plgpu.commit_smem()
        target = block.out.at[item.b, pl.ds(first, QUERY_TILE), item.head]
        plgpu.copy_smem_to_gmem(scratch.out.at[own], target)

    block.each_item(answer)

    @pl.when(me == 0)
    def _() -> None:
        plgpu.barrier_wait(scratch.turn.at[0])  # the last turn that was passed

    plgpu.wait_smem_to_gmem(0)
