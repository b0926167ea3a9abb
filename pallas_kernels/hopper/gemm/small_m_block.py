"""What the producer and the consumers of a small-M GEMM know in common: the block's work tiles, and its shared memory.

Fields of a scratch stand in the order in which shared memory is laid out.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .small_m_plan import SmallMPlan

Ref = Any  # Pallas has no public type for a reference


class WorkTile(NamedTuple):
    """An N tile over one K split."""

    row: Any  # first output row
    k_split: Any
    start: Any  # first stage
    end: Any  # one past the last stage

    @property
    def stages(self) -> Any:
        """Stages of this work tile."""
        return self.end - self.start


@dataclass(frozen=True)
class Block:
    """One warpgroup of one block: what is known while tracing, its indices, and references to global memory."""

    plan: SmallMPlan
    dtype: Any  # of the inputs
    me: Any  # index of this warpgroup
    index: Any  # of this block
    turns: Any  # work tiles of this block
    x: Ref  # [rows, inputs]
    w: Ref  # [layers, out, inputs]
    scale: Ref | None  # [layers, out, groups]
    out: Ref
    layer: Any

    @property
    def scales(self) -> Ref:
        """The scales of this layer, [out, groups]; None if they are not applied in the kernel."""
        return None if self.scale is None else self.scale.at[self.layer]

    def work_tile(self, turn: Any) -> WorkTile:
        """The work tile that this block takes at this turn."""
        p = self.plan
        index = turn * p.blocks + self.index
        n_tile, split = index // p.k_splits, lax.rem(index, p.k_splits)
        # If the last N tile would pass the end, it begins earlier. It then overlaps the tile before it, and both write
        # the same values to the shared outputs.
        row = pl.multiple_of(jnp.minimum(n_tile * p.n_tile, p.out - p.n_tile), 8)
        return WorkTile(row, split, split * p.steps // p.k_splits, (split + 1) * p.steps // p.k_splits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FloatScratch:
    """Shared memory and barriers of a block that multiplies floats."""

    finished: Ref | None  # [columns, n_tile], the result as rows; where the kernel writes it
    free: Ref  # a barrier a stage: its readers are done
    full: Ref  # a barrier a stage: its copies have arrived
    stored: Ref | None  # barrier: `sums` may be written again; where there are several consumers
    summed: Ref | None  # barrier: `sums` are written
    sums: Ref  # [consumers - 1, stage_rows, columns]
    transposed: Ref | None  # [columns, stage_rows]; where the kernel writes the result
    w_ring: Ref  # [depth, stage_rows, step]
    widened: Ref | None  # [consumers, 64, step], only for the interpreter
    x_ring: Ref  # [depth, columns, step]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LimbScratch:
    """Shared memory and barriers of a block that multiplies limbs with integer weights."""

    factors: Ref  # [columns], what a limb is worth
    free: Ref  # a barrier a stage: its reader is done
    full: Ref  # a barrier a stage: its copy has arrived
    int8_weights: Ref | None  # [consumers, 64, step], only for the interpreter
    max_abs: Ref  # [rows, warps], bits of the largest input that a warp has
    sums: Ref  # [consumers, columns, padded_stage_rows]
    consumers_meet: Ref  # barrier of all consumers
    w_ring: Ref  # [depth, stage_rows, step]
    x: Ref  # [split_steps, columns, step], limbs of all inputs of the K split
