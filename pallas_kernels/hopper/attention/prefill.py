"""Prefill attention on Hopper: causal, grouped-query, no score matrix in memory.

A block works through several items, each 128 queries of one head (`prefill_schedule`). Two consumer warpgroups hold 64
of the queries each. The producer streams tiles of keys and values into a ring in shared memory, and runs ahead from
item to item (`prefill_block`). The consumers take turns at the tensor cores: while one has products running, the other
turns scores into weights (`prefill_consumer`).
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...arch import planned
from ...dispatch import Unsupported
from ...layer_view import LayerView
from ..common.tiles import ACTIVATION_DTYPES, pad_rows, swizzled
from .cache import Cache, Ref
from .prefill_block import CONSUMERS, ITEM_QUERIES, Scratch, TileStream, run_block
from .prefill_schedule import schedule


@dataclass(frozen=True)
class PrefillTiles:
    """What can be tuned."""

    keys: int = 128  # of a tile
    stages: int = 2  # tiles in flight
    l2_bytes: int = 16 << 20  # keys and values that the running blocks may share, so that they stay in the L2 cache
    blocks: int | None = None  # at most; None: one a multiprocessor


TILES = {64: PrefillTiles(stages=4), 128: PrefillTiles()}  # by head_dim


def check(q: jax.Array, k: jax.Array | LayerView, v: jax.Array | LayerView, start: jax.Array) -> None:
    """Raise `Unsupported` where `flash_attention` cannot run these arguments."""
    del start
    D, heads, kv_heads = q.shape[-1], q.shape[2], k.shape[1]
    if D not in TILES:
        raise Unsupported(f"head_dim must be one of {', '.join(map(str, TILES))}, found {D}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in ACTIVATION_DTYPES:
        raise Unsupported(f"q, k and v must all be bfloat16 or all float16, found {q.dtype}, {k.dtype}, {v.dtype}")
    if heads % kv_heads:
        raise Unsupported(f"{heads} query heads do not divide among {kv_heads} key heads")


def check_paged(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, start: jax.Array, *, layer: Any) -> None:
    """Raise `Unsupported` where `flash_attention_paged` cannot run these arguments."""
    del table
    check(q, LayerView(k, layer), LayerView(v, layer), start)
    keys, size = TILES[q.shape[-1]].keys, k.shape[3]
    if size % 8 or keys % size:
        raise Unsupported(f"pages must hold a multiple of 8 positions that divides {keys}, found {size}")


# Jits of their own: all layers of a model share one lowering and one compiled kernel.
@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def flash_attention(
    q: jax.Array,
    k: jax.Array | LayerView,
    v: jax.Array | LayerView,
    start: jax.Array,
    *,
    tiles: PrefillTiles | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """q [B, T, heads, D], k and v [B, kv_heads, S, D], start [B] -> [B, T, heads, D]; see `attention_reference`.

    A cache whose S is a multiple of 8 is read in place. Any other is copied first.
    """
    return _attend(q, Cache.contiguous(k, v), start, tiles or TILES[q.shape[3]], interpret)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def flash_attention_paged(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array,
    start: jax.Array,
    *,
    layer: jax.Array | int,
    tiles: PrefillTiles | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """q [B, T, heads, D], k and v [layers, pages, kv_heads, size, D], table [B, P], start [B] -> [B, T, heads, D]; see
    `paged_attention_reference`. Several rows may be pieces of one sequence."""
    return _attend(q, Cache.in_place(k, v, table, layer), start, tiles or TILES[q.shape[3]], interpret)


def _attend(
    q: jax.Array, cache: Cache, start: jax.Array, tiles: PrefillTiles, interpret: plgpu.InterpretGPUParams | None
) -> jax.Array:
    T = q.shape[1]
    q = pad_rows(q, 1)
    B, padded, heads, D = q.shape
    # As many heads run together as have keys and values that fit.
    heads_together = max(1, tiles.l2_bytes // (cache.positions * D * 4)) * (heads // cache.k.shape[2])
    q_tiles, blocks = pl.cdiv(padded, ITEM_QUERIES), tiles.blocks or planned().sms
    if q_tiles == 1 and cache.table is not None:
        # Pieces of prompts. How long an item takes depends on the keys before it, which only the device knows. So the
        # rows are put in order there, and are then to the schedule what the tiles of one prompt's queries are. The
        # longest block then has 1.03 times the mean for 16 pieces of one prompt (1.19 in the order of the rows), and
        # for 4 pieces each of 8 prompts (1.47).
        order, items = jnp.argsort(start).astype(jnp.int32), schedule(heads, B, heads, blocks)
    else:
        order, items = None, schedule(B * heads, q_tiles, heads_together, blocks)

    def stream() -> TileStream:
        return TileStream(
            smem=swizzled((tiles.stages, tiles.keys, D), q.dtype),
            full=plgpu.Barrier(num_arrivals=cache.copies(tiles.keys), num_barriers=tiles.stages),
            free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tiles.stages),
        )

    scratch = Scratch(
        q=swizzled((ITEM_QUERIES, D), q.dtype),
        q_full=plgpu.Barrier(),
        q_free=plgpu.Barrier(num_arrivals=CONSUMERS),
        out=swizzled((ITEM_QUERIES, D), q.dtype),
        keys=stream(),
        values=stream(),
        turn=plgpu.Barrier(num_barriers=CONSUMERS),
        p=None if interpret is None else swizzled((ITEM_QUERIES, tiles.keys), q.dtype),
    )
    arguments, structure = jax.tree.flatten((order, q, cache))

    def body(start: Ref, items: Ref, *refs: Ref) -> None:
        *leaves, out, scratch = refs
        order, q, cache = jax.tree.unflatten(structure, leaves)
        run_block(start, items, order, q, cache, out, scratch, queries=T)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(scratch,),
        grid=(items.shape[0],),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="flash_attention" if cache.table is None else "flash_attention_paged",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(start, jnp.asarray(items), *arguments)
    return out[:, :T]
