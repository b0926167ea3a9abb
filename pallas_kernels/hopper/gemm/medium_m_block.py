"""What the producer and the consumers of a medium-M GEMM know in common: its work tiles, and its shared memory."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.tiles import WGMMA_ROWS, swizzled
from .medium_m_plan import MediumMPlan

Ref = Any  # Pallas has no public type for a reference


class WorkTile(NamedTuple):
    """An N tile over one K split."""

    out: Any  # first output
    k_split: Any
    start: Any  # first stage
    end: Any  # one past the last stage


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scratch:
    """Shared memory and barriers of a block. Pallas lays them out in the order of the fields."""

    consumers_meet: Ref  # barrier of all consumers; None with float weights, as `staged`
    free: Ref  # a barrier a stage: all consumers are done with it
    full: Ref  # a barrier a stage: its copies have arrived
    staged: Ref  # [columns, n_tile and more], sums on their way to global memory, transposed
    w_ring: Ref  # [depth, n_tile, step]
    widened: Ref | None  # [consumers, 64, step], only for the interpreter
    x_ring: Ref  # [depth, x_rows, step]


def scratch_of(p: MediumMPlan) -> Scratch:
    """Shared memory and barriers for a plan."""
    problem, fmt = p.problem, p.problem.fmt
    widened, transposed = p.interpret and problem.widens, not problem.rows_first
    return Scratch(
        consumers_meet=plgpu.Barrier(num_arrivals=p.consumers) if transposed else None,
        free=plgpu.Barrier(num_arrivals=p.consumers, num_barriers=p.depth),
        full=plgpu.Barrier(num_arrivals=3 if problem.swiglu else 2, num_barriers=p.depth),
        staged=plgpu.SMEM(p.staged_shape, p.result_dtype) if transposed else None,
        w_ring=swizzled((p.depth, p.n_tile, p.step), fmt.dtype),
        widened=swizzled((p.consumers, WGMMA_ROWS, p.step), problem.dtype, fmt.group) if widened else None,
        x_ring=swizzled((p.depth, p.x_rows, p.step), problem.dtype, fmt.group),
    )


@dataclass(frozen=True)
class Block:
    """One warpgroup of one block: what is known while tracing, its indices, and references to memory."""

    plan: MediumMPlan
    me: Any  # index of this warpgroup
    index: Any  # of this block
    x: Ref  # [rows, inputs], or its limbs [2 * rows, inputs]
    x_scale: Ref | None  # [rows], of limbs
    w: Ref  # [rows of the weight, inputs], of one layer
    scale: Ref | None  # [rows of the weight, groups], of one layer
    out: Ref  # [rows, outputs], or [k_splits, rows, outputs]
    scratch: Scratch

    @property
    def turns(self) -> Any:
        """Work tiles of this block."""
        p = self.plan
        return (p.work_tiles - self.index + p.blocks - 1) // p.blocks

    @property
    def scales_packed(self) -> bool:
        """Whether `widen_scaled` widens and scales 4-bit integers. It takes scales of 11 bits."""
        fmt, scale = self.plan.problem.fmt, self.scale
        ours = not self.plan.interpret and fmt.bits == 4
        return ours and scale is not None and scale.dtype.itemsize == 2

    @property
    def first_row(self) -> Any:
        """The first of this consumer's rows of a stage."""
        p = self.plan
        return pl.multiple_of(jnp.minimum(self.me * p.consumer_rows, p.left_rows - p.consumer_rows), 8)

    def work_tile(self, turn: Any) -> WorkTile:
        """The work tile that this block takes at this turn."""
        p = self.plan
        index = turn * p.blocks + self.index
        n_tile, split = index // p.k_splits, lax.rem(index, p.k_splits)
        # If the last N tile would pass the end, it begins earlier. It then overlaps the tile before it, and both write
        # the same values to the shared outputs.
        out = pl.multiple_of(jnp.minimum(n_tile * p.n_out, p.problem.outputs - p.n_out), 8)
        return WorkTile(out, split, split * p.steps // p.k_splits, (split + 1) * p.steps // p.k_splits)

    def release(self, slot: Any) -> None:
        """This consumer is done with the stage in a slot of the ring."""
        plgpu.barrier_arrive(self.scratch.free.at[slot])
