"""What the multiplying warpgroups of a product for few rows do: `pallas_kernels.skinny` has the launch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent_layouts import outputs
from pallas_kernels.ring import first_of_mine, my_stages
from pallas_kernels.skinny_plan import Plan, SkinnyTiles
from pallas_kernels.tiles import WGMMA_ROWS, Format, load_shuffled, scale_column, spread, widen_shuffled

CHUNK = 128  # inputs that are widened at a time, while the products of the last so many run
MOST_REGISTERS = 64  # of a thread, for accumulators


def consume(me: Any, scales: Any, out_ref: Any, turns: Any, piece: Any, fmt: Format, p: Plan, tiles: SkinnyTiles,
            dtype: Any, *, w_ring: Any, x_ring: Any, sums: Any, full: Any, free: Any, summed: Any = None,
            stored: Any = None, widened: Any = None, **ends: Any) -> None:  # fmt: skip
    """Multiply the stages whose turn it is, then add up what the consumers have."""
    last = tiles.consumers - 1
    accumulator = plgpu.ACC((WGMMA_ROWS, p.rows), jnp.float32)
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

    def multiply_all(slot: Any, accs: list[Any], which: range) -> None:
        """Some tiles of a stage; ``accs`` [tile][group]."""
        integers = integers_of(slot, which[0]) if fmt.quantized else None
        for tile, mine in zip(which, accs, strict=True):
            multiply(slot, tile, mine, integers)
            if fmt.quantized and tile + 1 in which:
                integers = integers_of(slot, tile + 1)
        plgpu.wgmma_wait(0)

    def fold(start: Any, end: Any, count: Any, stage: Any, carry: Any) -> Any:
        """``stage(step, slot, carry)`` over the stages of a piece that are this consumer's."""

        def one(number: Any, slot: Any, carry: Any) -> Any:
            return stage(start + number, slot, carry)

        return my_stages(me, tiles.consumers, count, end - start, p.depth, full, free, one, carry)

    def scale_of(row: Any, tile: int, column: Any) -> jax.Array:
        return scale_column(scales, row - p.shift(row) + p.tiles[tile], column, WGMMA_ROWS)

    def one_scale_a_row(start: Any, end: Any, count: Any, row: Any) -> list[jax.Array]:
        # Loaded now, for the end: what comes from memory takes as long as several stages.
        factors = [scale_of(row, tile, 0) for tile in range(len(p.tiles))] if scales is not None else None

        def scoped(*accs: Any) -> list[jax.Array]:
            def stage(_: Any, slot: Any, carry: Any) -> Any:
                multiply_all(slot, [[acc] for acc in accs], range(len(accs)))
                return carry

            fold(start, end, count, stage, None)
            return [acc[...] for acc in accs]

        totals = pl.run_scoped(scoped, *[accumulator] * len(p.tiles))
        if factors is None:
            return totals
        return [total * spread(factor, total.shape) for total, factor in zip(totals, factors, strict=True)]

    def one_scale_a_group(start: Any, end: Any, count: Any, row: Any) -> list[jax.Array]:
        groups = tiles.step // group
        together = max(1, min(len(p.tiles), MOST_REGISTERS // (groups * p.rows // 2)))  # tiles in flight

        def scales_of(step: Any) -> list[list[jax.Array]]:
            step = jnp.minimum(step, p.steps - 1)
            return [[scale_of(row, tile, step * groups + g) for g in range(groups)] for tile in range(len(p.tiles))]

        def stage(step: Any, slot: Any, carry: Any) -> Any:
            totals, factors = list(carry[0]), carry[1]
            following = scales_of(step + tiles.consumers)  # as above: one stage ahead
            for begin in range(0, len(p.tiles), together):
                which = range(begin, min(begin + together, len(p.tiles)))

                def scoped(*accs: Any, which: range = which) -> list[jax.Array]:
                    multiply_all(slot, [list(accs[i : i + groups]) for i in range(0, len(accs), groups)], which)
                    return [acc[...] for acc in accs]

                parts = iter(pl.run_scoped(scoped, *[accumulator] * (len(which) * groups)))
                for tile in which:
                    for factor in factors[tile]:
                        totals[tile] = totals[tile] + next(parts) * spread(factor, (WGMMA_ROWS, p.rows))
            return totals, following

        zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, p.rows), jnp.float32), plgpu.Layout.WGMMA)
        carry = [zero] * len(p.tiles), scales_of(start + first_of_mine(me, tiles.consumers, count))
        return fold(start, end, count, stage, carry)[0]

    def turn(t: Any, count: Any) -> Any:
        row, cut, start, end = piece(t)
        totals = (one_scale_a_group if fmt.grouped else one_scale_a_row)(start, end, count, row)
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
    sums = plgpu.load(turned.at[:, pl.ds(p.shift(row), p.strip)], layout=outputs(), optimized=False)
    finished[...] = sums.astype(finished.dtype)
    plgpu.commit_smem()
    rows = out_ref.shape[0]
    plgpu.copy_smem_to_gmem(finished.at[pl.ds(0, rows)], out_ref.at[:, pl.ds(row, p.strip)])
