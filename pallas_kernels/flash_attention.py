"""Prefill attention on Hopper: causal, grouped-query, no score matrix in memory.

Each block owns an SM and walks over its share of (batch row, head, query tile) items. Two consumer warpgroups hold 64
query rows each; a third streams the item's query, key and value tiles into shared memory. The consumers take turns at
the tensor cores: while one forms its products the other turns scores into weights, and within one warpgroup the scores
of tile j are formed together with the weighted values of tile j - 1, so that the tensor cores have work queued
throughout.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import Unsupported

ROWS = 64  # query rows of one consumer warpgroup: one wgmma tile
CONSUMERS = 2
DTYPES = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What can be tuned: keys per tile, tiles in flight, heads whose keys share the L2 cache, blocks launched."""

    keys: int = 128
    stages: int = 2
    heads: int = 32
    blocks: int = 132


TILES = {64: Tiles(stages=4), 128: Tiles()}  # by head_dim


def check(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array) -> None:
    """Raise `Unsupported` where `flash_attention` cannot run these arguments."""
    del start
    D, heads, kv_heads = q.shape[-1], q.shape[2], k.shape[1]
    if D not in TILES:
        raise Unsupported(f"head_dim is one of {', '.join(map(str, TILES))}, found {D}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise Unsupported(f"q, k and v are all bfloat16 or all float16, found {q.dtype}, {k.dtype}, {v.dtype}")
    if heads % kv_heads:
        raise Unsupported(f"{heads} query heads do not divide among {kv_heads} key heads")


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    *,
    tiles: Tiles | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """q [B, T, heads, D], k and v [B, kv_heads, S, D], start [B] -> [B, T, heads, D]; see `attention_reference`."""
    B, real_T, heads, D = q.shape
    kv_heads, S = k.shape[1:3]
    q, k, v = pad_rows(q, 1), pad_rows(k, 2), pad_rows(v, 2)
    T = q.shape[1]
    tiles = tiles or TILES[D]
    item_rows = CONSUMERS * ROWS
    q_tiles = pl.cdiv(T, item_rows)
    items = q_tiles * B * heads
    blocks = min(tiles.blocks, items)
    # Heads that run together, as many as divide evenly: their keys and values stay in the L2 cache.
    together = math.gcd(B * heads, tiles.heads)
    scale = D**-0.5 * math.log2(math.e)  # exp2 is the hardware's exponential

    def body(start_ref, q_ref, k_ref, v_ref, out_ref, q_smem, k_smem, v_smem, out_smem, p_smem, barriers):
        q_full, q_free, k_full, k_free, v_full, v_free, turn = barriers
        block, wg = lax.axis_index("block"), lax.axis_index("wg")

        def locate(index):
            """The batch row, head, first query and the bounds of the keys of a work item."""
            group, within = lax.div(index, together * q_tiles), lax.rem(index, together * q_tiles)
            row = group * together + lax.rem(within, together)
            # The longest first: what is left for the end is short, and the blocks finish together.
            first = (q_tiles - 1 - lax.div(within, together)) * item_rows
            b, head = lax.div(row, heads), lax.rem(row, heads)
            begin = start_ref[b]
            # Keys 0 .. last are seen by the item's first and by its last query.
            last_of_first = jnp.minimum(begin + first, S - 1)
            last_of_all = jnp.minimum(begin + jnp.minimum(first + item_rows, T) - 1, S - 1)
            whole = lax.div(last_of_first + 1, tiles.keys)
            count = lax.div(last_of_all, tiles.keys) + 1
            return b, head, first, begin, whole, count

        def for_items(visit, carry):
            """carry = visit(nth, item, carry) over this block's items."""

            def one(nth, carry):
                # Back and forth over the blocks, so that none gets the longest item of every round.
                place = jnp.where(lax.rem(nth, 2) == 0, block, blocks - 1 - block)
                index = nth * blocks + place
                return lax.cond(index < items, lambda c: visit(nth, locate(index), c), lambda c: c, carry)

            return lax.fori_loop(0, pl.cdiv(items, blocks), one, carry)

        @pl.when(wg == CONSUMERS)
        def _load():
            if interpret is None:
                plgpu.set_max_registers(40, action="decrease")

            def visit(nth, item, loaded):
                b, head, first, _, _, count = item
                kv_head = lax.div(head, heads // kv_heads)

                @pl.when(nth > 0)
                def _():
                    plgpu.barrier_wait(q_free)

                plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(first, item_rows), head], q_smem, q_full)

                def fetch(j, ref, smem, full, free):
                    slot = lax.rem(loaded + j, tiles.stages)

                    @pl.when(loaded + j >= tiles.stages)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    keys = pl.ds(j * tiles.keys, tiles.keys)
                    plgpu.copy_gmem_to_smem(ref.at[b, kv_head, keys], smem.at[slot], full.at[slot])

                @pl.loop(0, count)
                def _(j):
                    fetch(j, k_ref, k_smem, k_full, k_free)
                    fetch(j, v_ref, v_smem, v_full, v_free)

                return loaded + count

            loaded = for_items(visit, jnp.int32(0))

            @pl.loop(jnp.maximum(loaded - tiles.stages, 0), loaded)
            def _(n):
                plgpu.barrier_wait(k_free.at[lax.rem(n, tiles.stages)])
                plgpu.barrier_wait(v_free.at[lax.rem(n, tiles.stages)])

            plgpu.barrier_wait(q_free)

        @pl.when(wg < CONSUMERS)
        def _compute():
            if interpret is None:
                plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(wg * ROWS, ROWS)

            @pl.when(wg == 1)
            def _():
                plgpu.barrier_arrive(turn.at[0])

            def visit(nth, item, used):
                b, head, first, begin, whole, count = item
                my_first = first + wg * ROWS

                def issue_scores(s_ref, slot):
                    plgpu.wgmma(s_ref, q_smem.at[mine], k_smem.at[slot].T)

                def hide(s, j):
                    """Take the keys that a query must not see out of the scores."""
                    shape, layout = (ROWS, tiles.keys), plgpu.Layout.WGMMA
                    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
                    key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
                    last = jnp.minimum(row + (begin + my_first), S - 1)
                    return jnp.where(key + j * tiles.keys <= last, s, -jnp.inf)

                def soften(s, m, total):
                    """Weights of a tile, the factor for what came before, and the new statistics (m times scale)."""
                    m_new = jnp.maximum(m, s.max(axis=1) * scale)
                    alpha = jnp.exp2(m - m_new)
                    p = jnp.exp2(s * scale - lax.broadcast_in_dim(m_new, s.shape, (0,)))
                    return p.astype(q.dtype), alpha, m_new, total * alpha + p.sum(axis=1)

                def rescale(acc, alpha):
                    return acc * lax.broadcast_in_dim(alpha, acc.shape, (0,))

                def take_turn():
                    plgpu.barrier_wait(turn.at[wg])

                def give_turn():
                    plgpu.barrier_arrive(turn.at[1 - wg])

                def weigh_interpreted(acc, p, slot):
                    # The interpreter has no wgmma with A in registers: the weights go through shared memory.
                    p_smem[mine] = p
                    plgpu.commit_smem()

                    def weigh(pv_ref):
                        plgpu.wgmma(pv_ref, p_smem.at[mine], v_smem.at[slot])
                        return pv_ref[...]

                    return acc + pl.run_scoped(weigh, plgpu.ACC((ROWS, D), jnp.float32))

                def step(j, carry, *, masked):
                    """Scores of tile j, weighted values of tile j - 1."""
                    acc, p, m, total = carry
                    slot, before = lax.rem(used + j, tiles.stages), lax.rem(used + j - 1, tiles.stages)
                    plgpu.barrier_wait(k_full.at[slot])
                    plgpu.barrier_wait(v_full.at[before])
                    take_turn()

                    def finish_scores(s):
                        plgpu.barrier_arrive(k_free.at[slot])
                        s = hide(s, j) if masked else s
                        return soften(s, m, total)

                    if interpret is not None:

                        def scores(s_ref):
                            issue_scores(s_ref, slot)
                            return s_ref[...]

                        s = pl.run_scoped(scores, plgpu.ACC((ROWS, tiles.keys), jnp.float32))
                        acc = weigh_interpreted(acc, p, before)
                        give_turn()
                        p, alpha, m, total = finish_scores(s)
                    else:

                        def both(refs):
                            acc_ref, p_ref, alpha_ref, m_ref, total_ref = refs

                            def run(s_ref):
                                issue_scores(s_ref, slot)
                                plgpu.wgmma(acc_ref, p_ref[...], v_smem.at[before])
                                give_turn()
                                return plgpu.wgmma_accumulator_load(s_ref, wait_n=1)

                            s = pl.run_scoped(run, plgpu.ACC((ROWS, tiles.keys), jnp.float32))
                            p_ref[...], alpha_ref[...], m_ref[...], total_ref[...] = finish_scores(s)

                        acc, p, alpha, m, total = pl.run_state(both)((plgpu.ACC.init(acc), p, m, m, total))
                    plgpu.barrier_arrive(v_free.at[before])
                    return rescale(acc, alpha), p, m, total

                plgpu.barrier_wait(q_full)
                slot = lax.rem(used, tiles.stages)
                plgpu.barrier_wait(k_full.at[slot])
                take_turn()

                def first_scores(s_ref):
                    issue_scores(s_ref, slot)
                    give_turn()
                    return s_ref[...]

                s = pl.run_scoped(first_scores, plgpu.ACC((ROWS, tiles.keys), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                row = plgpu.Layout.WGMMA.reduce(1)
                m = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), row)
                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row)
                # Every query sees key 0, so that from the first tile on each maximum is finite.
                p, _, m, total = soften(hide(s, 0), m, total)
                acc = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
                carry = (acc, p, m, total)
                carry = lax.fori_loop(1, whole, lambda j, c: step(j, c, masked=False), carry)
                carry = lax.fori_loop(jnp.maximum(whole, 1), count, lambda j, c: step(j, c, masked=True), carry)
                acc, p, m, total = carry
                plgpu.barrier_arrive(q_free)

                slot = lax.rem(used + count - 1, tiles.stages)
                plgpu.barrier_wait(v_full.at[slot])
                if interpret is not None:
                    acc = weigh_interpreted(acc, p, slot)
                else:
                    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, v_smem.at[slot]))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[slot])

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the item before may still be on its way out
                out_smem[mine] = rescale(acc, 1 / total).astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[mine], out_ref.at[b, pl.ds(my_first, ROWS), head])
                return used + count

            for_items(visit, jnp.int32(0))

            @pl.when(wg == 0)
            def _():
                plgpu.barrier_wait(turn.at[0])

            plgpu.wait_smem_to_gmem(0)

    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def smem(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=swizzle)

    ring = dict(num_barriers=tiles.stages)
    barriers = (
        plgpu.Barrier(),  # q_full
        plgpu.Barrier(num_arrivals=CONSUMERS),  # q_free
        plgpu.Barrier(**ring),  # k_full
        plgpu.Barrier(num_arrivals=CONSUMERS, **ring),  # k_free
        plgpu.Barrier(**ring),  # v_full
        plgpu.Barrier(num_arrivals=CONSUMERS, **ring),  # v_free
        plgpu.Barrier(num_barriers=CONSUMERS),  # turn
    )
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(
            smem(item_rows, D),
            smem(tiles.stages, tiles.keys, D),
            smem(tiles.stages, tiles.keys, D),
            smem(item_rows, D),
            None if interpret is None else smem(item_rows, tiles.keys),
            barriers,
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        interpret=interpret,
        kernel_name="flash_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(start, q, k, v)
    return out[:, :real_T]


def pad_rows(x: jax.Array, axis: int) -> jax.Array:
    """Zeros behind ``axis`` up to the 8 rows of a shared memory tile; a copy only for a length that needs them."""
    missing = -x.shape[axis] % 8
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
