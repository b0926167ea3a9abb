"""What the multiplying warpgroups of a product for few rows do with floats: integer weights are widened on their way.

`small_m` has the launch, `small_m_limbs` what is done with integers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.layouts import pair_per_lane
from ..common.tiles import WGMMA_ROWS, Format
from ..common.widen import load_shuffled, widen_shuffled
from .small_m_plan import Plan, SkinnyTiles
from .small_m_sums import sums_of

CHUNK = 128  # inputs that are widened at a time, while the products of the last so many run


def consume(me: Any, scales: Any, out_ref: Any, turns: Any, piece: Any, fmt: Format, p: Plan, tiles: SkinnyTiles,
            dtype: Any, *, w_ring: Any, x_ring: Any, sums: Any, full: Any, free: Any, summed: Any = None,
            stored: Any = None, widened: Any = None, **ends: Any) -> None:  # fmt: skip
    """Multiply the stages whose turn it is, then add up what the consumers have."""
    last = tiles.consumers - 1
    chunk = min(CHUNK, tiles.step)
    group = min(fmt.group or tiles.step, tiles.step)

    def integers_of(slot: Any, tile: int) -> Any:
        weights = w_ring.at[slot, pl.ds(p.tiles[tile], WGMMA_ROWS)]
        if widened is None:
            return load_shuffled(weights)
        widened[me] = weights[...].astype(dtype)  # the interpreter has no wgmma with an operand in registers
        plgpu.commit_smem()
        return None

    def multiply(slot: Any, tile: int, accs: Any, integers: Any) -> None:
        """accs[group] += one tile of weights times a stage of activations."""

        def product(i: int, weights: Any, begin: int, end: int) -> None:
            plgpu.wgmma(accs[i], weights, x_ring.at[slot, :, begin:end].T)

        if not fmt.quantized:
            product(0, w_ring.at[slot, pl.ds(p.tiles[tile], WGMMA_ROWS)], 0, tiles.step)
            return
        for c in range(0, tiles.step, chunk):
            if widened is None:
                floats = widen_shuffled(integers[:, c : c + chunk], dtype)
            else:
                floats = widened.at[me, :, c : c + chunk]
            width = min(group, chunk)
            for g in range(0, chunk, width):
                weights = floats[:, g : g + width] if widened is None else floats.at[:, g : g + width]
                product((c + g) // group, weights, c + g, c + g + width)
            plgpu.wgmma_wait(0 if widened is not None else chunk // width)  # the last chunk's registers are free

    def multiply_all(_: Any, slot: Any, accs: list[Any], which: range) -> None:
        integers = integers_of(slot, which[0]) if fmt.quantized else None
        for tile, mine in zip(which, accs, strict=True):
            multiply(slot, tile, mine, integers)
            if fmt.quantized and tile + 1 in which:
                integers = integers_of(slot, tile + 1)
        plgpu.wgmma_wait(0)

    def turn(t: Any, count: Any) -> Any:
        row, cut, start, end = piece(t)
        totals = sums_of(
            (row, cut, start, end), count, me, scales, multiply_all, fmt, p, tiles, jnp.float32, full=full, free=free
        )
        places = [pl.ds(tile, WGMMA_ROWS) for tile in p.tiles]

        if last:

            @pl.when(me < last)
            def _() -> None:
                for place, total in zip(places, totals, strict=True):
                    sums[me, place] = total
                plgpu.barrier_arrive(summed)
                plgpu.barrier_wait(stored)

        @pl.when(me == last)
        def _() -> None:
            whole = list(totals)
            if last:
                plgpu.barrier_wait(summed)
            for other in range(last):
                for i, place in enumerate(places):
                    whole[i] = whole[i] + plgpu.load(sums.at[other, place], layout=plgpu.Layout.WGMMA)
            if p.direct:
                if last:
                    plgpu.barrier_arrive(stored)
                finish(whole, row, out_ref, p, **ends)
            else:
                for place, total in zip(places, whole, strict=True):
                    sums[0, place] = total  # every thread has read all that it needs of it
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(sums.at[0, pl.ds(p.shift(row), p.strip)], out_ref.at[cut, pl.ds(row, p.strip)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if last:
                    plgpu.barrier_arrive(stored)

        return count + end - start

    lax.fori_loop(0, turns, turn, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def finish(totals: list[jax.Array], row: Any, out_ref: Any, p: Plan, *, turned: Any, finished: Any) -> None:
    """Write the sums of a piece as a row of the result has them: side by side."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for tile, total in zip(p.tiles, totals, strict=True):
        place = turned.at[:, pl.ds(tile, WGMMA_ROWS)]
        place.T[...] = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)
    sums = plgpu.load(turned.at[:, pl.ds(p.shift(row), p.strip)], layout=pair_per_lane(), optimized=False)
    finished[...] = sums.astype(finished.dtype)
    plgpu.commit_smem()
    rows = out_ref.shape[0]
    plgpu.copy_smem_to_gmem(finished.at[pl.ds(0, rows)], out_ref.at[:, pl.ds(row, p.strip)])
