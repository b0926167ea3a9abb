"""Prefill attention on Hopper: causal, grouped-query, no score matrix in memory.

An item is 128 queries of one head; a block has several, one after the other. Two consumer warpgroups hold 64 of the
queries each; a third streams tiles of keys and values into a ring in shared memory, ahead from item to item. The
consumers take turns at the tensor cores: while one has products running the other turns scores into weights. Within a
warpgroup too, the scores of tile j are formed together with the weighted values of tile j - 1, so that the weights of
tile j can be found while the latter product still runs.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...dispatch import Unsupported
from ...layer_view import Indexed, in_place
from ..common.online_softmax import (
    QUERY_TILE,
    Ref,
    empty_statistics,
    mask_after,
    pv_product,
    rescale,
    update_softmax,
)
from ..common.ring import TileRing
from ..common.tiles import ACTIVATION_DTYPES, pad_rows, sm_count, swizzled

CONSUMERS = 2
BLOCK_ROWS = CONSUMERS * QUERY_TILE


@dataclasses.dataclass(frozen=True)
class PrefillTiles:
    """What can be tuned: keys per tile, tiles in flight, the bytes of keys and values that the blocks running at a
    time share, so that they find them in the L2 cache, and the most blocks (None: one a multiprocessor)."""

    keys: int = 128
    stages: int = 2
    l2_bytes: int = 16 << 20
    blocks: int | None = None


TILES = {64: PrefillTiles(stages=4), 128: PrefillTiles()}  # by head_dim


def check(q: jax.Array, k: jax.Array | Indexed, v: jax.Array | Indexed, start: jax.Array) -> None:
    """Raise `Unsupported` where `flash_attention` cannot run these arguments."""
    del start
    D, heads, kv_heads = q.shape[-1], q.shape[2], k.shape[1]
    if D not in TILES:
        raise Unsupported(f"head_dim is one of {', '.join(map(str, TILES))}, found {D}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in ACTIVATION_DTYPES:
        raise Unsupported(f"q, k and v are all bfloat16 or all float16, found {q.dtype}, {k.dtype}, {v.dtype}")
    if heads % kv_heads:
        raise Unsupported(f"{heads} query heads do not divide among {kv_heads} key heads")


# A jit of its own: all layers of a model share one lowering, and the compiled kernel with it.
@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def flash_attention(
    q: jax.Array,
    k: jax.Array | Indexed,
    v: jax.Array | Indexed,
    start: jax.Array,
    *,
    tiles: PrefillTiles | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """q [B, T, heads, D], k and v [B, kv_heads, S, D], start [B] -> [B, T, heads, D]; see `attention_reference`.

    A cache whose S is a multiple of 8 is read where it lies; any other is copied first.
    """
    T = q.shape[1]
    (k, layer), (v, _) = in_place(k), in_place(v)
    q, k, v = pad_rows(q, 1), pad_rows(k, 3), pad_rows(v, 3)
    B, padded, heads, D = q.shape
    tiles = tiles or TILES[D]
    # As many heads together as share so many bytes of keys and values.
    fit = max(1, tiles.l2_bytes // (k.shape[3] * D * 4)) * (heads // k.shape[2])
    items = schedule(B * heads, pl.cdiv(padded, BLOCK_ROWS), fit, tiles.blocks or sm_count())
    ring = {"num_barriers": tiles.stages}
    stream = (
        swizzled((tiles.stages, tiles.keys, D), q.dtype),
        plgpu.Barrier(**ring),
        plgpu.Barrier(num_arrivals=CONSUMERS, **ring),
    )
    queries = swizzled((BLOCK_ROWS, D), q.dtype)
    out = plgpu.kernel(
        functools.partial(block, tiles=tiles),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(
            (queries, plgpu.Barrier(), plgpu.Barrier(num_arrivals=CONSUMERS)),
            queries,
            stream,
            stream,
            plgpu.Barrier(num_barriers=CONSUMERS),
            None if interpret is None else swizzled((BLOCK_ROWS, tiles.keys), q.dtype),
        ),
        grid=(items.shape[0],),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        interpret=interpret,
        kernel_name="flash_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(layer, start, jnp.asarray(items), q, k, v)
    return out[:, :T]


@functools.lru_cache(maxsize=64)
def schedule(rows: int, q_tiles: int, fit: int, blocks: int) -> np.ndarray:
    """The items [blocks, 1 + most] of every block, in order, behind their number. ``row * q_tiles + tile`` is a tile
    of the queries of a row, a head of the batch; each goes to the block that is done first.

    At most ``fit`` rows go through together, whose keys and values fit the L2 cache; of these, the longest items go
    first, so that short ones are left to fill the end."""
    together = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= fit)
    blocks = min(blocks, rows * q_tiles)
    taken: list[list[int]] = [[] for _ in range(blocks)]
    free = [(0, block) for block in range(blocks)]
    for first in range(0, rows, together):
        for tile in reversed(range(q_tiles)):
            for row in range(first, first + together):
                busy, block = free[0]
                taken[block].append(row * q_tiles + tile)
                heapq.heapreplace(free, (busy + tile + 2, block))  # an item's ends take as long as a tile
    most = max(map(len, taken))
    return np.array([[len(own), *own, *[0] * (most - len(own))] for own in taken], np.int32)


def block(
    layer_ref: Ref,
    start_ref: Ref,
    items_ref: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    out_ref: Ref,
    q_stream: tuple[Ref, Ref, Ref],  # of both consumers
    out_smem: Ref,
    k_stream: tuple[Ref, Ref, Ref],
    v_stream: tuple[Ref, Ref, Ref],
    turn: Ref,
    p_smem: Ref | None,  # for the interpreter
    *,
    tiles: PrefillTiles,
) -> None:
    """What the three warpgroups of a block do."""
    q_smem, q_full, q_free = q_stream
    k_ref, v_ref = k_ref.at[layer_ref[0]], v_ref.at[layer_ref[0]]
    T, heads, D, S = *q_ref.shape[1:], k_ref.shape[2]
    wg, me = lax.axis_index("wg"), lax.axis_index("block")
    keys, values = TileRing(*k_stream, tiles.stages), TileRing(*v_stream, tiles.stages)

    def item(nth: jax.Array) -> Item:
        index, q_tiles = items_ref[me, 1 + nth], pl.cdiv(T, BLOCK_ROWS)
        row, tile = lax.div(index, q_tiles), lax.rem(index, q_tiles)
        b, head, first = lax.div(row, heads), lax.rem(row, heads), tile * BLOCK_ROWS
        begin = start_ref[b]
        whole = lax.div(jnp.minimum(begin + first + 1, S), tiles.keys)
        count = lax.div(jnp.minimum(begin + jnp.minimum(first + BLOCK_ROWS, T), S) - 1, tiles.keys) + 1
        return Item(b, head, first, begin, whole, count)

    def each(visit: Callable[[Item, jax.Array, jax.Array], None]) -> Any:
        """Visit all items in order, each with its number and how many tiles precede it; returns how many there were."""

        def one(nth: jax.Array, done: jax.Array) -> jax.Array:
            its = item(nth)
            visit(its, nth, done)
            return done + its.count

        return lax.fori_loop(0, items_ref[me, 0], one, jnp.int32(0))

    @pl.when(wg == CONSUMERS)
    def _() -> None:
        if p_smem is None:
            plgpu.set_max_registers(40, action="decrease")

        def load(its: Item, nth: jax.Array, done: jax.Array) -> None:
            pl.when(nth > 0)(lambda: plgpu.barrier_wait(q_free))
            plgpu.copy_gmem_to_smem(q_ref.at[its.b, pl.ds(its.first, BLOCK_ROWS), its.head], q_smem, q_full)
            kv_head = lax.div(its.head, heads // k_ref.shape[1])

            @pl.loop(0, its.count)
            def _(j: jax.Array) -> None:
                tile = pl.ds(j * tiles.keys, tiles.keys)
                keys.from_here(done).fetch(j, k_ref.at[its.b, kv_head, tile])
                values.from_here(done).fetch(j, v_ref.at[its.b, kv_head, tile])

        done = each(load)
        keys.from_here(done).drain()
        values.from_here(done).drain()
        plgpu.barrier_wait(q_free)

    @pl.when(wg < CONSUMERS)
    def _() -> None:
        if p_smem is None:
            plgpu.set_max_registers(232, action="increase")
        mine = pl.ds(wg * QUERY_TILE, QUERY_TILE)

        @pl.when(wg == 1)
        def _() -> None:
            plgpu.barrier_arrive(turn.at[0])

        def answer(its: Item, _: jax.Array, done: jax.Array) -> None:
            my_first = its.first + wg * QUERY_TILE

            def last(j: jax.Array) -> jax.Array:
                """The last key of tile j that each query sees."""
                row = plgpu.broadcasted_iota(jnp.int32, (QUERY_TILE, tiles.keys), 0, layout=plgpu.Layout.WGMMA)
                return jnp.minimum(its.begin + my_first + row, S - 1) - j * tiles.keys

            plgpu.barrier_wait(q_full)
            out = consume(
                q_smem.at[mine],
                q_free,
                keys.from_here(done),
                values.from_here(done),
                (lambda: plgpu.barrier_wait(turn.at[wg]), lambda: plgpu.barrier_arrive(turn.at[1 - wg])),
                last,
                (its.whole, its.count),
                D**-0.5 * math.log2(math.e),  # exp2 is the hardware's exponential
                None if p_smem is None else p_smem.at[mine],
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the item before may still be on its way
            out_smem[mine] = out
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[mine], out_ref.at[its.b, pl.ds(my_first, QUERY_TILE), its.head])

        each(answer)

        @pl.when(wg == 0)
        def _() -> None:
            plgpu.barrier_wait(turn.at[0])  # the last that was given

        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class Item:
    """128 queries of a head of a row of the batch, behind ``begin`` keys. The first ``whole`` tiles of keys are seen by
    every query, none at or past ``count`` by any."""

    b: jax.Array
    head: jax.Array
    first: jax.Array
    begin: jax.Array
    whole: jax.Array
    count: jax.Array


def consume(
    q: Ref,
    q_free: Ref,
    keys: TileRing,
    values: TileRing,
    turn: tuple[Callable[[], None], Callable[[], None]],
    last: Callable[[jax.Array | int], jax.Array],
    bounds: tuple[jax.Array, jax.Array],
    scale: float,
    p_smem: Ref | None,
) -> jax.Array:
    """Attention of one warpgroup's queries, in their dtype."""
    take_turn, give_turn = turn
    whole, count = bounds
    dtype, n_keys, D = keys.smem.dtype, *keys.smem.shape[1:]
    scores_type = plgpu.ACC((QUERY_TILE, n_keys), jnp.float32)

    def find_weights(s, j, m, total, *, masked):
        keys.release(j)
        return update_softmax(mask_after(s, last(j)) if masked else s, m, total, scale)

    def first_scores(s_ref):
        keys.wait(0)
        take_turn()
        plgpu.wgmma(s_ref, q, keys.tile(0).T)
        give_turn()
        return s_ref[...]

    def step(j, carry, *, masked):
        """Scores and weights of tile j, weighted values of tile j - 1."""
        acc, p, m, total = carry
        keys.wait(j)
        values.wait(j - 1)
        take_turn()

        def overlapped(refs):
            acc_ref, p_ref, alpha_ref, m_ref, total_ref = refs

            def products(s_ref):
                plgpu.wgmma(s_ref, q, keys.tile(j).T)
                plgpu.wgmma(acc_ref, p, values.tile(j - 1))
                give_turn()
                return plgpu.wgmma_accumulator_load(s_ref, wait_n=1)

            s = pl.run_scoped(products, scores_type)
            p_ref[...], alpha_ref[...], m_ref[...], total_ref[...] = find_weights(s, j, m, total, masked=masked)

        def scores(s_ref):
            plgpu.wgmma(s_ref, q, keys.tile(j).T)
            return s_ref[...]

        if p_smem is None:
            empty = plgpu.layout_cast(jnp.zeros((QUERY_TILE, n_keys), jnp.float32), plgpu.Layout.WGMMA)
            state = (plgpu.ACC.init(acc), empty, m, m, total)
            acc, p, alpha, m, total = pl.run_state(overlapped)(state)
        else:
            s = pl.run_scoped(scores, scores_type)
            acc = pv_product(acc, p, values.tile(j - 1), p_smem)
            give_turn()
            p, alpha, m, total = find_weights(s, j, m, total, masked=masked)
        # The weights are rounded only now that the product which reads those of tile j - 1 is done: they may get the
        # same registers, and the compiler, where it sees that, runs all products one by one.
        acc, p = lax.optimization_barrier((acc, p))
        values.release(j - 1)
        return rescale(acc, alpha), p.astype(dtype), m, total

    s = pl.run_scoped(first_scores, scores_type)
    p, _, m, total = find_weights(s, 0, *empty_statistics(), masked=True)
    acc = plgpu.layout_cast(jnp.zeros((QUERY_TILE, D), jnp.float32), plgpu.Layout.WGMMA)
    carry = (acc, p.astype(dtype), m, total)
    carry = lax.fori_loop(1, whole, functools.partial(step, masked=False), carry)
    acc, p, _, total = lax.fori_loop(jnp.maximum(whole, 1), count, functools.partial(step, masked=True), carry)
    plgpu.barrier_arrive(q_free)
    values.wait(count - 1)
    acc = pv_product(acc, p, values.tile(count - 1), p_smem)
    values.release(count - 1)
    return rescale(acc, 1 / total).astype(dtype)
