"""The sums of a piece of a product for few rows, whatever its operands are: one warpgroup's share of the stages."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.ring import first_own_stage, fold_own_stages
from ..common.tiles import WGMMA_ROWS, Format, broadcast_rows, scale_column
from .small_m_plan import Plan, SkinnyTiles

MOST_REGISTERS = 64  # of a thread, for accumulators

# ``multiply(step, slot, accumulators [tile][group], tiles)``: add the products of some tiles of a stage.
Multiply = Callable[[Any, Any, list[Any], range], None]


def sums_of(
    piece: tuple[Any, Any, Any, Any], count: Any, me: Any, scales: Any, multiply: Multiply, fmt: Format, p: Plan,
    tiles: SkinnyTiles, dtype: Any, *, full: Any, free: Any,
) -> list[jax.Array]:  # fmt: skip
    """What this consumer's stages add to each tile of a piece, [64, columns] in float32; accumulators are of ``dtype``.
    ``scales``: those of rows or groups, where they are applied here."""
    row, _, start, end = piece
    accumulator = plgpu.ACC((WGMMA_ROWS, p.columns), dtype)
    group = min(fmt.group or tiles.step, tiles.step)

    def fold(stage: Any, carry: Any) -> Any:
        """``stage(step, slot, carry)`` over the stages of a piece that are this consumer's."""

        def one(number: Any, slot: Any, carry: Any) -> Any:
            return stage(start + number, slot, carry)

        return fold_own_stages(me, tiles.consumers, count, end - start, p.depth, full, free, one, carry)

    def scale_of(tile: int, column: Any) -> jax.Array:
        return scale_column(scales, row - p.shift(row) + p.tiles[tile], column, WGMMA_ROWS)

    def one_scale_a_row() -> list[jax.Array]:
        # Loaded now, for the end: what comes from memory takes as long as several stages.
        factors = [scale_of(tile, 0) for tile in range(len(p.tiles))] if scales is not None else None

        def scoped(*accs: Any) -> list[jax.Array]:
            def stage(step: Any, slot: Any, carry: Any) -> Any:
                multiply(step, slot, [[acc] for acc in accs], range(len(accs)))
                return carry

            fold(stage, None)
            return [acc[...] for acc in accs]

        totals = [a.astype(jnp.float32) for a in pl.run_scoped(scoped, *[accumulator] * len(p.tiles))]
        if factors is None:
            return totals
        return [total * broadcast_rows(factor, total.shape) for total, factor in zip(totals, factors, strict=True)]

    def one_scale_a_group() -> list[jax.Array]:
        groups = tiles.step // group
        together = max(1, min(len(p.tiles), MOST_REGISTERS // (groups * p.columns // 2)))  # tiles in flight

        def scales_of(step: Any) -> list[list[jax.Array]]:
            step = jnp.minimum(step, p.steps - 1)
            return [[scale_of(tile, step * groups + g) for g in range(groups)] for tile in range(len(p.tiles))]

        def stage(step: Any, slot: Any, carry: Any) -> Any:
            totals, factors = list(carry[0]), carry[1]
            following = scales_of(step + tiles.consumers)  # as above: one stage ahead
            for begin in range(0, len(p.tiles), together):
                which = range(begin, min(begin + together, len(p.tiles)))

                def scoped(*accs: Any, which: range = which) -> list[jax.Array]:
                    multiply(step, slot, [list(accs[i : i + groups]) for i in range(0, len(accs), groups)], which)
                    return [acc[...] for acc in accs]

                parts = iter(pl.run_scoped(scoped, *[accumulator] * (len(which) * groups)))
                for tile in which:
                    for factor in factors[tile]:
                        part = next(parts).astype(jnp.float32)
                        totals[tile] = totals[tile] + part * broadcast_rows(factor, (WGMMA_ROWS, p.columns))
            return totals, following

        zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, p.columns), jnp.float32), plgpu.Layout.WGMMA)
        carry = [zero] * len(p.tiles), scales_of(start + first_own_stage(me, tiles.consumers, count))
        return fold(stage, carry)[0]

    return one_scale_a_group() if fmt.grouped else one_scale_a_row()
