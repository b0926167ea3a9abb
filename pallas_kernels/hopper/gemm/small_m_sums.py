"""The sums of one work tile of a small-M GEMM: what one consumer's stages add up to, with the weights' scales."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.ring import first_own_stage, fold_own_stages
from ..common.tiles import WGMMA_ROWS, broadcast_rows, scale_column
from .small_m_block import Block, Ref, WorkTile
from .small_m_plan import SmallMPlan

MAX_ACCUMULATOR_REGISTERS = 64  # of a thread

# ``multiply(step, slot, accumulators [tile][group], tiles)``: add the products of some wgmma tiles of a stage.
Multiply = Callable[[Any, Any, list[Any], range], None]


@dataclass(frozen=True)
class OwnStages:
    """The stages of a work tile that one consumer multiplies. ``count`` stages of the ring went before the tile."""

    block: Block
    tile: WorkTile
    count: Any
    scales: Ref | None  # [out, groups], where they are applied here
    multiply: Multiply
    accumulator_dtype: Any
    full: Ref
    free: Ref

    def sums(self) -> list[jax.Array]:
        """What they add to each wgmma tile of the work tile, [64, columns] each in float32."""
        return self._one_scale_a_group() if self.block.plan.fmt.grouped else self._one_scale_a_row()

    @property
    def plan(self) -> SmallMPlan:
        """The plan of the block."""
        return self.block.plan

    @property
    def accumulator(self) -> Any:
        """One wgmma tile's sums in registers."""
        return plgpu.ACC((WGMMA_ROWS, self.plan.columns), self.accumulator_dtype)

    def fold(self, stage: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
        """``stage(step, slot, carry)`` over the stages."""

        def one(number: Any, slot: Any, carry: Any) -> Any:
            return stage(self.tile.start + number, slot, carry)

        p = self.plan
        return fold_own_stages(
            self.block.me, p.consumers, self.count, self.tile.stages, p.depth, self.full, self.free, one, carry
        )

    def scale_of(self, wgmma_tile: int, group: Any) -> jax.Array:
        """The scales [64] of a wgmma tile's rows."""
        row = self.tile.row - self.plan.shift(self.tile.row) + self.plan.wgmma_tiles[wgmma_tile]
        return scale_column(self.scales, row, group, WGMMA_ROWS)

    def _one_scale_a_row(self) -> list[jax.Array]:
        tiles = range(len(self.plan.wgmma_tiles))
        # Loaded before the products, used after them: a load from memory takes as long as several stages.
        factors = [self.scale_of(tile, 0) for tile in tiles] if self.scales is not None else None

        def scoped(*accs: Any) -> list[jax.Array]:
            def stage(step: Any, slot: Any, carry: Any) -> Any:
                self.multiply(step, slot, [[acc] for acc in accs], range(len(accs)))
                return carry

            self.fold(stage, None)
            return [acc[...] for acc in accs]

        totals = [a.astype(jnp.float32) for a in pl.run_scoped(scoped, *[self.accumulator] * len(tiles))]
        if factors is None:
            return totals
        return [total * broadcast_rows(factor, total.shape) for total, factor in zip(totals, factors, strict=True)]

    def _one_scale_a_group(self) -> list[jax.Array]:
        p, tiles = self.plan, range(len(self.plan.wgmma_tiles))
        groups = p.step // p.group
        in_flight = max(1, min(len(tiles), MAX_ACCUMULATOR_REGISTERS // (groups * p.columns // 2)))  # wgmma tiles

        def scales_of(step: Any) -> list[list[jax.Array]]:
            step = jnp.minimum(step, p.steps - 1)
            return [[self.scale_of(tile, step * groups + g) for g in range(groups)] for tile in tiles]

        def stage(step: Any, slot: Any, carry: Any) -> Any:
            totals, factors = list(carry[0]), carry[1]
            following = scales_of(step + p.consumers)  # one stage ahead, for the same reason
            for begin in range(0, len(tiles), in_flight):
                which = range(begin, min(begin + in_flight, len(tiles)))

                def scoped(*accs: Any, which: range = which) -> list[jax.Array]:
                    self.multiply(step, slot, [list(accs[i : i + groups]) for i in range(0, len(accs), groups)], which)
                    return [acc[...] for acc in accs]

                sums = iter(pl.run_scoped(scoped, *[self.accumulator] * (len(which) * groups)))
                for tile in which:
                    for factor in factors[tile]:
                        group_sum = next(sums).astype(jnp.float32)
                        totals[tile] = totals[tile] + group_sum * broadcast_rows(factor, (WGMMA_ROWS, p.columns))
            return totals, following

        zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, p.columns), jnp.float32), plgpu.Layout.WGMMA)
        first = self.tile.start + first_own_stage(self.block.me, p.consumers, self.count)
        return self.fold(stage, ([zero] * len(tiles), scales_of(first)))[0]
