"""The whole decode step in one launch: every block has a part of every phase, with a barrier of the whole grid between
two phases.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.layouts import pair_per_lane
from ..common.tiles import store
from ..common.warp_specialize import warp_specialize
from .block import Block, TileOps
from .consumer import consume
from .grid import GridBarrier
from .memory import StepBuffers, StepInputs, scratch_types, written_columns
from .plan import MAX_TOKENS, StepPlan
from .producer import produce

PRODUCER_REGISTERS = 40


def launch_step(
    plan: StepPlan, ops: TileOps, inputs: StepInputs, buffers: StepBuffers, interpret: Any = None
) -> StepBuffers:
    """All phases. ``buffers`` are changed in place where the caller donated them. The interpreter can run it with a
    single block."""

    def body(b: Block) -> None:
        barrier = GridBarrier.of(plan)
        pl.when((b.warpgroup == 0) & (b.index == 0))(lambda: zero_padding(b))
        warp_specialize(
            b.warpgroup,
            producer=lambda: produce(b),
            consumer=lambda: consume(b, barrier),
            consumers=plan.tiles.consumers,
            producer_registers=None if interpret else PRODUCER_REGISTERS,
        )

    return call(plan, ops, body, inputs, buffers, "decode_step", interpret)


def zero_padding(b: Block) -> None:
    """Write zeros to the columns of the buffers that products read beyond those that phases write."""
    for name, begin in written_columns(b.plan).items():
        buffer = b.buffers.of(name)
        missing = buffer.shape[-1] - begin
        if not missing:
            continue
        zeros = plgpu.layout_cast(jnp.zeros((MAX_TOKENS, missing), buffer.dtype), pair_per_lane())
        for rows in [buffer] if len(buffer.shape) == 2 else [buffer.at[i] for i in range(b.plan.key_splits)]:
            store(rows.at[:, pl.ds(begin, missing)], zeros)


def call(
    plan: StepPlan,
    ops: TileOps,
    body: Callable[[Block], None],
    inputs: StepInputs,
    buffers: StepBuffers,
    name: str,
    interpret: Any,
    layer: jax.Array | None = None,
) -> StepBuffers:
    """One launch: ``body`` in every warpgroup of every block. Returns the buffers after it. ``layer`` int32 [1]: the
    layer of a launch for a single phase."""
    structure = jax.tree.structure((layer, inputs, buffers))

    def kernel(*args: Any) -> None:
        *leaves, scratch = args
        layer_ref, inputs, buffers = jax.tree.unflatten(structure, leaves)
        index, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        body(Block(plan, inputs, buffers, scratch, ops, index, warpgroup, 0 if layer_ref is None else layer_ref[0]))

    run = plgpu.kernel(
        kernel,
        scratch_types=(scratch_types(plan),),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=plan.tiles.consumers + 1,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=None if interpret else plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )
    # Not jax.new_ref: a function with such effects has no rule under jax.custom_jvp.
    return pl.run_state(lambda refs: run(*jax.tree.leaves((layer, inputs, refs))))(buffers)
