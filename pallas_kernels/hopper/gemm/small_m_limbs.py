"""Consumers of a small-M GEMM that multiply integer weights in integers. The inputs are split into int8 limbs.

A row of x has one scale for all inputs of a block's K split (see `small_m_prologue`). So the sums need no scale until
the end of a work tile or, if the weights have them, of a group.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from ..common.limbs import INT4_FACTOR, load_int4_as_int8
from ..common.ring import consumer_barrier
from ..common.thread_ops import (
    SCALAR,
    WARPGROUP_SIZE,
    add,
    load_per_thread,
    mul,
    prefetch_cache_line,
    store_per_thread,
    volatile_thread_in_warpgroup,
)
from ..common.tiles import WGMMA_ROWS, store, swizzled
from .small_m_block import Block, LimbScratch, Ref
from .small_m_plan import LIMBS, SmallMPlan
from .small_m_prologue import WARPS, split_inputs
from .small_m_sums import OwnStages

INT4_CHUNK = 256  # 4-bit inputs that are widened to int8 at a time, while the products of the chunk before run
CACHE_LINE = 128  # bytes


def limb_scratch(p: SmallMPlan) -> LimbScratch:
    """Shared memory and barriers."""
    widened = p.interpret and p.fmt.bits == 4
    return LimbScratch(
        factors=plgpu.SMEM((p.columns,), jnp.float32),
        free=plgpu.Barrier(num_arrivals=1, num_barriers=p.depth),
        full=plgpu.Barrier(num_arrivals=1, num_barriers=p.depth),
        int8_weights=swizzled((p.consumers, WGMMA_ROWS, p.step), jnp.int8, p.fmt.group) if widened else None,
        max_abs=plgpu.SMEM((p.rows, WARPS * p.consumers), jnp.int32),
        sums=plgpu.SMEM((p.consumers, p.columns, p.padded_stage_rows), jnp.float32),
        consumers_meet=plgpu.Barrier(num_arrivals=p.consumers),
        w_ring=swizzled((p.depth, p.stage_rows, p.step), p.fmt.dtype),
        x=swizzled((p.split_steps, p.columns, p.step), jnp.int8, p.fmt.group),
    )


def consume_limbs(block: Block, scratch: LimbScratch) -> None:
    """Multiply the stages whose turn it is, then finish some of the outputs."""
    p, scales = block.plan, block.scales
    first_tile = block.work_tile(0)  # all work tiles of a block have the same K split
    _prefetch_scales(block, scales, first_tile.row)
    with jax.named_scope("limbs"):
        split_inputs(block, scratch, first_tile.start * p.step, first_tile.end * p.step)

    def multiply(step: Any, slot: Any, accs: list[Any], which: range) -> None:
        for tile, mine in zip(which, accs, strict=True):
            weights = scratch.w_ring.at[slot, pl.ds(p.wgmma_tiles[tile], WGMMA_ROWS)]
            _multiply_tile(block, scratch, weights, scratch.x.at[step - first_tile.start], mine)
        plgpu.wgmma_wait(0)

    def turn(t: Any, count: Any) -> Any:
        tile = block.work_tile(t)
        pl.when(t + 1 < block.turns)(lambda: _prefetch_scales(block, scales, block.work_tile(t + 1).row))
        # Loaded before the products, used after them: a load from memory takes as long as several stages.
        by_row = [] if p.fmt.grouped else _ranges(p)
        row_scales = [load_per_thread(p, scales.at[:, 0], [(tile.row + at,)], n)[0] for at, n in by_row]
        group_scales = scales if p.fmt.grouped else None
        stages = OwnStages(block, tile, count, group_scales, multiply, jnp.int32, scratch.full, scratch.free)
        for first_row, total in zip(p.wgmma_tiles, stages.sums(), strict=True):
            _store_sums(scratch.sums.at[block.me, :, pl.ds(first_row, WGMMA_ROWS)], total, scratch.factors)
        consumer_barrier(scratch.consumers_meet)
        _write_rows(block, scratch, block.out if p.direct else block.out.at[tile.k_split], tile.row, row_scales)
        # All consumers have read the sums before the next work tile's are stored.
        pl.when(t + 1 < block.turns)(lambda: consumer_barrier(scratch.consumers_meet))
        return count + tile.end - tile.start

    lax.fori_loop(0, block.turns, turn, jnp.int32(0))


def _prefetch_scales(block: Block, scales: Ref, row: Any) -> None:
    """Prefetch the groups' scales of an N tile into the L2 cache. A stage reads only a few of each row."""
    p = block.plan
    if not p.fmt.grouped or p.interpret:
        return
    row_bytes = scales.shape[1] * scales.dtype.itemsize
    lines = math.ceil(p.n_tile * row_bytes / CACHE_LINE) + 1

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
    def prefetch(_: Any, scales: Any, row: Any, me: Any) -> None:
        threads = WARPGROUP_SIZE * p.consumers
        begin = mul(row.registers.item(), row_bytes)
        thread = add(mul(me.registers.item(), WARPGROUP_SIZE), volatile_thread_in_warpgroup())
        for first in range(0, lines, threads):
            byte = add(begin, mul(add(thread, first), CACHE_LINE))
            inside = arith.cmpi(arith.CmpIPredicate.ult, byte, add(begin, p.n_tile * row_bytes))
            prefetch_cache_line(scales, byte, inside)

    prefetch(scales, row, block.me)  # type: ignore[call-arg]


def _multiply_tile(block: Block, scratch: LimbScratch, weights: Ref, x: Ref, accs: list[Any]) -> None:
    """accs[group] += one wgmma tile of a stage of weights times its inputs.

    8-bit weights are read from shared memory. 4-bit weights are widened to 8 bits in registers."""
    p = block.plan
    chunk = p.step if p.fmt.bits == 8 else min(INT4_CHUNK, p.step)
    if scratch.int8_weights is not None:  # the interpreter has no wgmma with an operand in registers
        scratch.int8_weights[block.me] = weights[...].astype(jnp.int8) * INT4_FACTOR
        plgpu.commit_smem()
        weights = scratch.int8_weights.at[block.me]
    in_registers = p.fmt.bits == 4 and scratch.int8_weights is None
    for begin in range(0, p.step, chunk):
        width = min(p.group, chunk)
        tile = weights.at[:, begin : begin + chunk]
        widened = load_int4_as_int8(tile, chunk // width) if in_registers else None
        for g in range(0, chunk, width):
            inputs = slice(begin + g, begin + g + width)
            left = weights.at[:, inputs] if widened is None else widened[g // width]
            plgpu.wgmma(accs[(begin + g) // p.group], left, x.at[:, inputs].T)
        if in_registers:  # the registers of the chunk before are free once its products are done
            plgpu.wgmma_wait(chunk // width)
    if scratch.int8_weights is not None:
        plgpu.wgmma_wait(0)


def _store_sums(sums: Ref, total: jax.Array, factors: Ref) -> None:
    """Write the sums of a wgmma tile [64, columns] to ``sums`` [columns, 64], times what each limb is worth."""
    worth = plgpu.load(factors, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    total = total * lax.broadcast_in_dim(worth, total.shape, (1,))
    store(sums.T, plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED))


def _ranges(p: SmallMPlan) -> list[tuple[int, int]]:
    """First outputs and sizes of the ranges of an N tile, with at most one output a thread."""
    return [(at, min(WARPGROUP_SIZE, p.n_tile - at)) for at in range(0, p.n_tile, WARPGROUP_SIZE)]


def _write_rows(block: Block, scratch: LimbScratch, out: Ref, row: Any, row_scales: list[jax.Array]) -> None:
    """Add up the sums of all consumers and limbs, in a fixed order, and write parts of the result's rows. Consumers
    share the rows and the ranges of the N tile."""
    p, consumers = block.plan, block.plan.consumers
    for number, (at, n) in enumerate(_ranges(p)):
        first = lax.rem(block.me + consumers - number % consumers, consumers)

        def write(turn: Any, _: Any, number: int = number, at: int = at, n: int = n, first: Any = first) -> None:
            token = first + turn * consumers
            columns = [p.limb_column(limb, token) for limb in range(LIMBS)]
            places = [(other, column, p.shift(row) + at) for other in range(consumers) for column in columns]
            total = functools.reduce(jnp.add, load_per_thread(p, scratch.sums, places, n))
            total = total * row_scales[number] if row_scales else total
            store_per_thread(p, out, [(token, row + at)], [total.astype(out.dtype)], n)

        lax.fori_loop(0, (p.rows - first + consumers - 1) // consumers, write, None)
