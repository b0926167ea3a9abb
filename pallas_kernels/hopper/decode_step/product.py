"""A product phase, as its consumers run it.

Every phase is: fill x into shared memory (all of it, or a chunk at a time), multiply the stages of weights that the
producer keeps coming, add up what the consumers have, finish. What x is and what becomes of the sums are the phase's
prologue and epilogue.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.tiles import WGMMA_ROWS, store
from .block import Block
from .outputs import own_outputs
from .phase import ProductPhase, Prologue
from .plan import LIMB_BLOCK
from .prologues import own_units
from .schedule import TileStages, over_tiles
from .thread_ops import SUMS


def product(b: Block, phase: ProductPhase, count: Any) -> Callable[[], Any]:
    """x · weightᵀ over this block's N tile, in one fixed order of sums.

    What can be read before the grid barrier is read now; the rest is in the function that is returned, which gives the
    count of stages after the phase."""
    prologue, outputs = phase.prologue(b, phase), own_outputs(b, phase)

    def run() -> Any:
        after = multiply(b, phase, prologue, count)
        with jax.named_scope("consumer_barrier"):
            b.consumer_barrier()
        if b.plan.exchanges(phase):
            with jax.named_scope("exchange"):
                outputs.send()
                if not b.plan.interpret:
                    outputs.receive()
        else:
            outputs.finish()
        return after

    return run


def multiply(b: Block, phase: ProductPhase, prologue: Prologue, count: Any) -> Any:
    """Put this consumer's sums over the N tile into shared memory; returns the count of stages after them.

    Consumers share the tokens of x, or the units of a single token."""
    plan, p, grouped, slot = b.plan, b.product(phase), b.plan.shape.fmt.grouped, phase.scale_slot
    single, tile_sums = plan.shape.tokens == 1, _integer_tile if plan.shape.fmt.quantized else _float_tile

    def fill(chunk: Any, first_step: Any, fetched: Any) -> Any:
        if p.chunks > 1:
            # Before the first chunk nobody reads x: the consumers met after the previous phase.
            pl.when(chunk > 0)(b.consumer_barrier)
        with jax.named_scope("fill"):
            if single:
                b.ops.store_x(b, phase, prologue.make(fetched), own_units(b, phase), jnp.int32(0))
            else:
                _store_tokens(b, phase, prologue, first_step)
            plgpu.commit_smem()
            b.consumer_barrier()
        if single and p.chunks > 1:  # the next chunk's x is in flight meanwhile
            fetched = prologue.fetch(0, jnp.minimum(chunk + 1, p.chunks - 1) * p.held_steps)
        return fetched

    def tile(stages: TileStages, count: Any) -> Any:
        with jax.named_scope("multiply"):
            tile_sums(b, phase, stages, count)
            return stages.after(count)

    if grouped:
        plgpu.barrier_wait(b.scratch.scales_full.at[slot])
    count = over_tiles(b, phase, count, tile, fill=fill, carry=prologue.fetch(0, 0) if single else None)
    if grouped:
        plgpu.commit_smem()  # ordinary reads of scales are over before TMA writes others there
        plgpu.barrier_arrive(b.scratch.scales_free.at[slot])
    return count


def _store_tokens(b: Block, phase: ProductPhase, prologue: Prologue, first_step: Any) -> None:
    """Put this consumer's tokens into shared memory; each is fetched while the previous one is made."""
    tokens, consumers, first = b.plan.shape.tokens, b.plan.tiles.consumers, b.warpgroup

    def one_token(i: Any, fetched: Any) -> Any:
        token = first + i * consumers
        ahead = prologue.fetch(jnp.minimum(token + consumers, tokens - 1), first_step)
        b.ops.store_x(b, phase, prologue.make(fetched), own_units(b, phase), token)
        return ahead

    own_tokens = (tokens - first + consumers - 1) // consumers
    lax.fori_loop(0, own_tokens, one_token, prologue.fetch(jnp.minimum(first, tokens - 1), first_step))


def _float_tile(b: Block, phase: ProductPhase, stages: TileStages, count: Any) -> None:
    """Put a tile's sums into shared memory: bfloat16 weights."""
    p, memory = b.product(phase), b.memory(phase)

    def scoped(acc: Any) -> jax.Array:
        def stage(step: Any, slot: Any, carry: Any) -> Any:
            plgpu.wgmma(acc, b.scratch.ring.at[slot], memory.x.at[step].T)
            plgpu.wgmma_wait(0)
            return carry

        stages.own(b, count, stage, None, release=True)
        return acc[...]

    total = pl.run_scoped(scoped, plgpu.ACC((WGMMA_ROWS, p.k_splits * b.plan.shape.columns), jnp.float32))
    rows = pl.ds(pl.multiple_of(stages.tile * WGMMA_ROWS, WGMMA_ROWS), WGMMA_ROWS)
    target = memory.sums.at[b.warpgroup, :, rows].T
    total = plgpu.layout_cast(_own_split(b, phase, total, stages.tile), plgpu.Layout.WGMMA_TRANSPOSED)
    if p.chunks > 1:
        before = plgpu.load(target, layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
        total = jnp.where(lax.broadcast(stages.chunk, total.shape) > 0, total + before, total)
    store(target, total)


def _own_split(b: Block, phase: ProductPhase, total: jax.Array, tile: Any) -> jax.Array:
    """[64, columns] of [64, columns of all K splits]: each row's sums with the x of its own K split."""
    p, columns = b.product(phase), b.plan.shape.columns
    own = total[:, :columns]
    row = plgpu.broadcasted_iota(jnp.int32, own.shape, 0, layout=plgpu.Layout.WGMMA) + tile * WGMMA_ROWS
    for split in range(1, p.k_splits):
        is_own = lax.rem(lax.div(row, p.n_tile), p.k_splits) == split
        own = jnp.where(is_own, total[:, split * columns : (split + 1) * columns], own)
    return own


def _integer_tile(b: Block, phase: ProductPhase, stages: TileStages, count: Any) -> None:
    """Put a tile's sums into shared memory: integer weights.

    Sums are integers over the inputs where both weights and x have one scale: a group, or a block of limbs. Where a
    whole row of weights has one scale, the phase multiplies it at the end."""
    plan, p, memory, fmt = b.plan, b.product(phase), b.memory(phase), b.plan.shape.fmt
    acc = plgpu.ACC((WGMMA_ROWS, p.k_splits * plan.shape.columns), jnp.int32)
    inputs = min(p.step, LIMB_BLOCK, fmt.group or LIMB_BLOCK)

    def stage(step: Any, slot: Any, total: Any) -> Any:
        weights = b.scratch.ring.at[slot] if fmt.bits == 8 else b.ops.load_int4(b, slot, p.step // inputs)

        def scoped(*accs: Any) -> list[jax.Array]:
            for i, acc in enumerate(accs):
                some = slice(i * inputs, (i + 1) * inputs)
                left = weights[i] if isinstance(weights, list) else weights.at[:, some]
                plgpu.wgmma(acc, left, memory.x.at[step, :, some].T)
            plgpu.wgmma_wait(0)
            return [acc[...] for acc in accs]

        for i, sums in enumerate(pl.run_scoped(scoped, *[acc] * (p.step // inputs))):
            group = (stages.chunk * p.held_steps + step) * (p.step // inputs) + i
            scales = [b.ops.load_scales(b, phase, stages.tile, group)] if fmt.grouped else []
            limb_scales = memory.limb_scales.at[(step * p.step + i * inputs) // LIMB_BLOCK]
            total = b.ops.combine_limbs(b, phase, sums, limb_scales, scales, stages.tile, total)
        return total

    zeros = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, plan.shape.token_slots), jnp.float32), SUMS)
    release = fmt.bits == 8 or not b.ops.int4_frees_slot
    total = stages.own(b, count, stage, zeros, release=release)
    b.ops.store_sums(b, memory.sums.at[b.warpgroup], total, stages.tile, stages.chunk > 0)
