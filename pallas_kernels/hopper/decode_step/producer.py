"""The producer: the warpgroup that copies weights, and their scales, into shared memory.

It does not wait for other blocks, so that the ring fills during a grid barrier too.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import ring
from .block import Block
from .phase import Phase, ProductPhase
from .schedule import TileStages, over_phases, over_tiles


def produce(b: Block) -> None:
    """The producer's whole step."""

    def visit(phase: Phase, layer: Any, count: Any) -> Any:
        if not isinstance(phase, ProductPhase):
            return count
        return copy_phase(replace(b, layer=layer), phase, count, b.plan.scale_fills_before(phase, layer))

    drain(b, over_phases(b.plan, visit), b.plan.product_phases)


def copy_phase(b: Block, phase: ProductPhase, count: Any, scale_fills: Any) -> Any:
    """Copy this block's weights of a phase into the ring; ``count`` stages went before. Returns the count after."""
    p, (weight, scales) = b.product(phase), b.weight(phase)
    first_row = p.first_row(b.index)
    if b.plan.shape.fmt.grouped:
        _copy_scales(b, phase, scales, first_row, scale_fills)

    def tile(stages: TileStages, count: Any) -> Any:
        copies = list(p.copies(stages.tile))

        def copy(step: Any, count: Any) -> None:
            slot = ring.acquire(count, b.plan.depth, b.scratch.ring_free)
            for c in copies:
                # A K split with a step less than the others ends with weights of no matter: x is zero there.
                at = jnp.minimum(c.k_split * p.split_steps + stages.first_step + step, p.steps - 1)
                rows = pl.ds(pl.multiple_of(c.half * p.outer + first_row + c.row, 8), c.rows)
                source = weight.at[rows, pl.ds(at * p.step, p.step)]
                target = b.scratch.ring.at[slot, pl.ds(c.tile_row, c.rows)]
                plgpu.copy_gmem_to_smem(source, target, b.scratch.ring_full.at[slot])
            for _ in range(b.plan.copies_per_stage - len(copies)):
                plgpu.barrier_arrive(b.scratch.ring_full.at[slot])

        return stages.each(count, copy)

    return over_tiles(b, phase, count, tile, unroll=True)


def _copy_scales(b: Block, phase: ProductPhase, scales: Any, first_row: Any, fills: Any) -> None:
    """Copy the scales of a whole phase. The phases take turns with the slots, so that this may run a phase ahead;
    ``fills`` is how often the slot was filled before."""
    p, slot, target = b.product(phase), phase.scale_slot, b.scales(phase)

    @pl.when(fills > 0)
    def _() -> None:
        plgpu.barrier_wait(b.scratch.scales_free.at[slot])

    # Blocks without an N tile take part: otherwise each would have its own count of fills.
    full = b.scratch.scales_full.at[slot]
    for half in range(p.halves):
        rows = pl.ds((half * p.outer + first_row) // 8, p.n_tile // 8)
        plgpu.copy_gmem_to_smem(scales.at[rows], target.at[half, pl.ds(0, p.n_tile // 8)], full)
    for _ in range(2 - p.halves):
        plgpu.barrier_arrive(full)


def drain(b: Block, count: Any, phases: Iterable[ProductPhase]) -> None:
    """Wait until the last stages, and the last scales of ``phases``, are used: every completion of a barrier must be
    awaited before the block ends."""
    ring.drain(count, b.plan.depth, b.scratch.ring_free)
    if b.plan.shape.fmt.grouped:
        for slot in sorted({phase.scale_slot for phase in phases}):
            plgpu.barrier_wait(b.scratch.scales_free.at[slot])
