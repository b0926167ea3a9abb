"""Consumers of a small-M GEMM that multiply floats. Integer weights are widened in registers on their way to wgmma."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.layouts import pair_per_lane
from ..common.tiles import WGMMA_ROWS, swizzled
from ..common.widen import load_shuffled, widen_shuffled
from .small_m_block import Block, FloatScratch
from .small_m_plan import SmallMPlan
from .small_m_sums import OwnStages

WIDEN_CHUNK = 128  # inputs that are widened at a time, while the products of the chunk before run


def float_scratch(p: SmallMPlan, dtype: Any, out_dtype: Any) -> FloatScratch:
    """Shared memory and barriers, for inputs of ``dtype``."""
    others = p.consumers - 1
    widened = p.interpret and p.fmt.quantized
    return FloatScratch(
        finished=plgpu.SMEM((p.columns, p.n_tile), out_dtype) if p.direct else None,
        free=plgpu.Barrier(num_arrivals=1, num_barriers=p.depth),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=p.depth),
        stored=plgpu.Barrier(num_arrivals=1) if others else None,
        summed=plgpu.Barrier(num_arrivals=others) if others else None,
        sums=plgpu.SMEM((max(1, others), p.stage_rows, p.columns), jnp.float32),
        transposed=plgpu.SMEM((p.columns, p.stage_rows), jnp.float32) if p.direct else None,
        w_ring=swizzled((p.depth, p.stage_rows, p.step), p.fmt.dtype),
        widened=swizzled((p.consumers, WGMMA_ROWS, p.step), dtype, p.fmt.group) if widened else None,
        x_ring=swizzled((p.depth, p.columns, p.step), dtype, p.fmt.group),
    )


def consume_floats(block: Block, scratch: FloatScratch) -> None:
    """Multiply the stages whose turn it is, then add up the sums of all consumers."""
    p = block.plan

    def multiply(_: Any, slot: Any, accs: list[Any], which: range) -> None:
        loaded = _load_weights(block, scratch, slot, which[0]) if p.fmt.quantized else None
        for tile, mine in zip(which, accs, strict=True):
            _multiply_tile(block, scratch, slot, tile, mine, loaded)
            if p.fmt.quantized and tile + 1 in which:
                loaded = _load_weights(block, scratch, slot, tile + 1)
        plgpu.wgmma_wait(0)

    def turn(t: Any, count: Any) -> Any:
        tile = block.work_tile(t)
        stages = OwnStages(block, tile, count, block.scales, multiply, jnp.float32, scratch.full, scratch.free)
        _reduce_consumers(block, scratch, tile.row, tile.k_split, stages.sums())
        return count + tile.end - tile.start

    lax.fori_loop(0, block.turns, turn, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _load_weights(block: Block, scratch: FloatScratch, slot: Any, tile: int) -> jax.Array | None:
    """One wgmma tile of integer weights in registers. The interpreter has no wgmma with an operand in registers: there
    they are widened to shared memory, and None is returned."""
    weights = scratch.w_ring.at[slot, pl.ds(block.plan.wgmma_tiles[tile], WGMMA_ROWS)]
    if scratch.widened is None:
        return load_shuffled(weights)
    scratch.widened[block.me] = weights[...].astype(block.dtype)
    plgpu.commit_smem()
    return None


def _multiply_tile(block: Block, scratch: FloatScratch, slot: Any, tile: int, accs: list[Any], loaded: Any) -> None:
    """accs[group] += one wgmma tile of weights times a stage of inputs. ``loaded``: see `_load_weights`."""
    p, chunk = block.plan, min(WIDEN_CHUNK, block.plan.step)

    def product(group: int, weights: Any, begin: int, end: int) -> None:
        plgpu.wgmma(accs[group], weights, scratch.x_ring.at[slot, :, begin:end].T)

    if not p.fmt.quantized:
        product(0, scratch.w_ring.at[slot, pl.ds(p.wgmma_tiles[tile], WGMMA_ROWS)], 0, p.step)
        return
    for c in range(0, p.step, chunk):
        if scratch.widened is None:
            floats = widen_shuffled(loaded[:, c : c + chunk], block.dtype)
        else:
            floats = scratch.widened.at[block.me, :, c : c + chunk]
        width = min(p.group, chunk)
        for g in range(0, chunk, width):
            weights = floats[:, g : g + width] if scratch.widened is None else floats.at[:, g : g + width]
            product((c + g) // p.group, weights, c + g, c + g + width)
        # The registers of the chunk before are free once its products are done.
        plgpu.wgmma_wait(0 if scratch.widened is not None else chunk // width)


def _reduce_consumers(block: Block, scratch: FloatScratch, row: Any, k_split: Any, totals: list[jax.Array]) -> None:
    """The last consumer adds the sums of the others to its own, in their order, and writes the result."""
    p, last = block.plan, block.plan.consumers - 1
    places = [pl.ds(tile, WGMMA_ROWS) for tile in p.wgmma_tiles]

    if last:

        @pl.when(block.me < last)
        def _() -> None:
            for place, total in zip(places, totals, strict=True):
                scratch.sums[block.me, place] = total
            plgpu.barrier_arrive(scratch.summed)
            plgpu.barrier_wait(scratch.stored)

    @pl.when(block.me == last)
    def _() -> None:
        whole = list(totals)
        if last:
            plgpu.barrier_wait(scratch.summed)
        for other in range(last):
            for i, place in enumerate(places):
                whole[i] = whole[i] + plgpu.load(scratch.sums.at[other, place], layout=plgpu.Layout.WGMMA)
        if p.direct:
            if last:
                plgpu.barrier_arrive(scratch.stored)
            _write_rows(block, scratch, row, whole)
            return
        for place, total in zip(places, whole, strict=True):
            scratch.sums[0, place] = total  # every thread has read what it needs of the old values
        plgpu.commit_smem()
        source = scratch.sums.at[0, pl.ds(p.shift(row), p.n_tile)]
        plgpu.copy_smem_to_gmem(source, block.out.at[k_split, pl.ds(row, p.n_tile)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if last:
            plgpu.barrier_arrive(scratch.stored)


def _write_rows(block: Block, scratch: FloatScratch, row: Any, totals: list[jax.Array]) -> None:
    """Transpose the sums of an N tile and write them as parts of the result's rows."""
    p = block.plan
    assert scratch.transposed is not None
    assert scratch.finished is not None
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for tile, total in zip(p.wgmma_tiles, totals, strict=True):
        place = scratch.transposed.at[:, pl.ds(tile, WGMMA_ROWS)]
        place.T[...] = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)
    rows = scratch.transposed.at[:, pl.ds(p.shift(row), p.n_tile)]
    sums = plgpu.load(rows, layout=pair_per_lane(), optimized=False)
    scratch.finished[...] = sums.astype(scratch.finished.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.finished.at[pl.ds(0, block.out.shape[0])], block.out.at[:, pl.ds(row, p.n_tile)])
